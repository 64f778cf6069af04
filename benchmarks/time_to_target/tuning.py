"""Tuning and full trainings of one workload; finished ones come from the file of results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common.contenders import Contender
from benchmarks.common.results import Results
from benchmarks.time_to_target import race
from benchmarks.time_to_target.tasks import Data, Task
from benchmarks.time_to_target.training import check_steps, train, train_in_turns

TUNING_SEED = 1000
HEAT = "heat"
"""Takes the optimizer's place in the key of a training of all optimizers together."""


@dataclass(frozen=True)
class Measurement:
    """One workload at one scale: what all its trainings have in common."""

    name: str
    scale: str
    task: Task
    data: Data
    device: torch.device
    results: Results
    say: Callable[[str], None]
    """Prints a line of progress."""

    def tuning(self, name: str, contender: Contender, lr: float) -> dict[str, Any]:
        """The record of a shorter training of the contender ``name`` at peak rate ``lr``, see `train`."""
        task = self.task
        facts = [*self._facts(task.tuning_steps), contender.options, TUNING_SEED]

        def run() -> dict[str, Any]:
            self.say(f"{self.name}: {contender.label}, lr {lr:g}, tuning")
            return train(task, self.data, contender, lr, seed=TUNING_SEED, tuning=True, device=self.device)

        return self.results.get_or_train(f"{self.name} {name} lr={lr:g} tuning", facts, run)

    def heat(self, contenders: Mapping[str, tuple[Contender, float]], seed: int) -> dict[str, Any]:
        """The records of all full trainings with one seed, by contender; arguments as of `train_in_turns`."""
        task = self.task
        own = {name: [lr, contender.options] for name, (contender, lr) in contenders.items()}
        facts = [*self._facts(task.steps), task.checks, own, seed]

        def run() -> dict[str, Any]:
            self.say(f"{self.name}: heat of all with seed {seed}")
            return train_in_turns(task, self.data, contenders, seed=seed, tuning=False, device=self.device)

        return self.results.get_or_train(f"{self.name} {HEAT} seed={seed}", facts, run)

    def _facts(self, steps: int) -> list[Any]:
        return [self.task.words, steps, self.task.batch_size, self.task.decay, self.scale]


def tune(one: Measurement, contenders: Mapping[str, Contender]) -> dict[str, dict[float, float | None]]:
    """Train each contender with each of its learning rates, unless it has a single one; returns the final metric by
    contender and rate."""
    final: dict[str, dict[float, float | None]] = {name: {} for name in contenders}
    for trial in range(max(len(contender.rates) for contender in contenders.values())):
        for name, contender in contenders.items():
            if 1 < len(contender.rates) > trial:
                lr = contender.rates[trial]
                final[name][lr] = one.tuning(name, contender, lr)["values"][-1]
    return final


def best_rate(task: Task, final: Mapping[float, float | None], contender: Contender) -> float:
    """The learning rate with the best value in ``final``; the only one of an untuned contender."""
    return max(final, key=lambda lr: task.goodness(final[lr]), default=contender.rates[0])


def measure(one: Measurement, contenders: Mapping[str, Contender], seeds: int) -> dict[str, Any]:
    """Tune, then train all in full with their best rates on ``seeds`` seeds (0: tune only); returns the summary, in
    plain types."""
    final = tune(one, contenders)
    best = {name: best_rate(one.task, final[name], contender) for name, contender in contenders.items()}
    with_rates = {name: (contender, best[name]) for name, contender in contenders.items()}
    heats = [one.heat(with_rates, seed) for seed in range(seeds)]
    runs = {name: [heat[name] for heat in heats] for name in contenders}
    task = one.task
    return {
        "words": task.words,
        "scale": one.scale,
        "environment": one.results.environment,
        "metric": task.metric,
        "target": task.target,
        "higher_is_better": task.higher_is_better,
        "steps": check_steps(task.steps, task.checks),
        "tuning": {name: {f"{lr:g}": value for lr, value in values.items()} for name, values in final.items()},
        "optimizers": race.summarise(task, runs, best, contenders) if seeds else {},
    }
