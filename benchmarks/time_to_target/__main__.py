"""How soon each optimizer reaches a target: all of ``contenders.py``, tuned alike, on the workloads of ``tasks.py``.

For each optimizer the same number of learning rates is tried in a shorter training, with a seed and on held-out data
that are not reported. The winners then run heats, one for each seed: all optimizers train in full in one process, in
turns of a few steps, so that a machine that is slower for a while is slower for all, and seconds of a heat can be
compared. They are of training with everything that an optimizer costs, validation left out. What is finished is kept in
the JSON file and not repeated: a run that was stopped goes on where it was. A new optimizer, or a new rate of one, runs
in heats with all others. (The file cannot know that the code of an optimizer has changed: ``--forget NAME`` tunes that
one anew, and repeats the heats.)

    python -m benchmarks.time_to_target --workload gpt --data DIR                # DIR holds cifar10/, tinyshakespeare/
    python -m benchmarks.time_to_target --workload gpt --data DIR --robustness   # the trainings that tune, no others
"""

import argparse
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.contenders import CONTENDERS, Contender
from benchmarks.common.environment import RESULTS, environment, use
from benchmarks.common.pictures import save_curves, save_robustness
from benchmarks.time_to_target import race
from benchmarks.time_to_target.tasks import TASKS, Data, Task
from benchmarks.time_to_target.training import check_steps, train, train_in_turns

TUNING_SEED = 1000
HEAT = "heat"
"""Stands where the name of an optimizer would, in the key of what all of them did together."""


class Results:
    """The JSON file: a summary per workload, and finished trainings by key, written after each one.

    Another process may write it too (another workload), so each change is made to what the file holds by then.
    """

    def __init__(self, path: Path, here: Mapping[str, str | int]) -> None:
        self.path = path
        self.here = dict(here)
        # A training belongs to what it ran on; the date alone makes no difference.
        self.machine = {key: value for key, value in here.items() if key != "date"}
        self.content: dict[str, dict[str, Any]] = {"summary": {}, "runs": {}}
        self._take_in_the_file()

    def get_or_train(self, key: str, facts: Any, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is stored of the training ``key`` with these ``facts`` on this machine; or train now, and store."""
        fingerprint = hashlib.sha256(json.dumps([facts, self.machine], sort_keys=True).encode()).hexdigest()[:8]
        runs: dict[str, dict[str, Any]] = self.content["runs"]
        if f"{key} {fingerprint}" not in runs:
            self.put("runs", f"{key} {fingerprint}", run())
        stored: dict[str, Any] = self.content["runs"][f"{key} {fingerprint}"]
        return stored

    def put(self, part: str, key: str, entry: dict[str, Any]) -> None:
        """Store one entry of ``"summary"`` or ``"runs"``."""
        self._take_in_the_file()
        self.content[part][key] = entry
        self._write()

    def forget(self, workload: str, optimizer: str) -> None:
        """Drop what ran of one optimizer on one workload, alone or with others."""
        self._take_in_the_file()
        runs = self.content["runs"]
        of_it = ([workload, optimizer], [workload, HEAT])
        self.content["runs"] = {key: run for key, run in runs.items() if key.split()[:2] not in of_it}
        self._write()

    def _take_in_the_file(self) -> None:
        if self.path.is_file():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In one move, so that a stopped benchmark never leaves half of a file.
        beside = self.path.with_suffix(f".{os.getpid()}.part")
        beside.write_text(json_in_lines(self.content), encoding="utf-8")
        os.replace(beside, self.path)


def json_in_lines(content: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with one line for each entry of each part: short to scroll, and a difference shows what changed."""
    parts = []
    for name, part in content.items():
        lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in part.items())
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


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

    def tuning(self, name: str, contender: Contender, lr: float) -> dict[str, Any]:
        """One shorter training: stored, or done now."""
        task = self.task
        facts = [*self._facts(task.tuning_steps), contender.options, TUNING_SEED]

        def now() -> dict[str, Any]:
            self.say(f"{self.name}: {contender.words}, lr {lr:g}, tuning")
            return train(task, self.data, contender, lr, seed=TUNING_SEED, tuning=True, device=self.device)

        return self.results.get_or_train(f"{self.name} {name} lr={lr:g} tuning", facts, now)

    def heat(self, contenders: Mapping[str, tuple[Contender, float]], seed: int) -> dict[str, Any]:
        """All full trainings of one seed, by contender: stored, or done now."""
        task = self.task
        own = {name: [lr, contender.options] for name, (contender, lr) in contenders.items()}
        facts = [*self._facts(task.steps), task.checks, own, seed]

        def now() -> dict[str, Any]:
            self.say(f"{self.name}: heat of all with seed {seed}")
            return train_in_turns(task, self.data, contenders, seed=seed, tuning=False, device=self.device)

        return self.results.get_or_train(f"{self.name} {HEAT} seed={seed}", facts, now)

    def _facts(self, steps: int) -> list[Any]:
        return [self.task.words, steps, self.task.batch_size, self.task.decay, self.scale]


def tune(one: Measurement, contenders: Mapping[str, Contender]) -> dict[str, dict[float, float | None]]:
    """By optimizer and learning rate: the metric at the end of the shorter training; what has one rate is not tuned."""
    final: dict[str, dict[float, float | None]] = {name: {} for name in contenders}
    for trial in range(max(len(contender.rates) for contender in contenders.values())):
        for name, contender in contenders.items():
            if 1 < len(contender.rates) > trial:
                lr = contender.rates[trial]
                final[name][lr] = one.tuning(name, contender, lr)["values"][-1]
    return final


def best_rate(task: Task, final: Mapping[float, float | None], contender: Contender) -> float:
    """The learning rate with the best value; the only one of a contender that is not tuned."""
    return max(final, key=lambda lr: task.goodness(final[lr]), default=contender.rates[0])


def measure(one: Measurement, contenders: Mapping[str, Contender], seeds: int) -> dict[str, Any]:
    """Tune, and train the winners if ``seeds`` is not 0; the summary."""
    final = tune(one, contenders)
    best = {name: best_rate(one.task, final[name], contender) for name, contender in contenders.items()}
    with_rates = {name: (contender, best[name]) for name, contender in contenders.items()}
    heats = [one.heat(with_rates, seed) for seed in range(seeds)]
    runs = {name: [heat[name] for heat in heats] for name in contenders}
    task = one.task
    return {
        "words": task.words,
        "scale": one.scale,
        "environment": one.results.here,
        "metric": task.metric,
        "target": task.target,
        "higher_is_better": task.higher_is_better,
        "steps": check_steps(task.steps, task.checks),
        "tuning": {name: {f"{lr:g}": value for lr, value in values.items()} for name, values in final.items()},
        "optimizers": race.summarise(task, runs, best, contenders) if seeds else {},
    }


def warm_up(task: Task, data: Data, contenders: Mapping[str, Contender], device: torch.device) -> None:
    """Two steps of each, or the first training would pay for torch's one-off choices, and for imports."""
    short = Task(**{**vars(task), "steps": 2, "tuning_steps": 2, "checks": 1})
    each = {name: (contender, contender.rates[0]) for name, contender in contenders.items()}
    train_in_turns(short, data, each, seed=0, tuning=True, device=device)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/ and tinyshakespeare/")
    parser.add_argument("--workload", choices=TASKS["cpu"], nargs="+", default=list(TASKS["cpu"]))
    parser.add_argument("--optimizer", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    parser.add_argument("--scale", choices=TASKS, default="cpu", help="sizes for two cores, or for a GPU")
    parser.add_argument("--seeds", type=int, help="full trainings of each optimizer (default: see tasks.py)")
    parser.add_argument("--robustness", action="store_true", help="only tune, and draw the metric over learning rates")
    parser.add_argument(
        "--forget", choices=CONTENDERS, nargs="+", default=[], help="tune these anew, and repeat the heats"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--steps", type=int, help="of full and tuning trainings, to try this file out")
    parser.add_argument("--out", type=Path, help="JSON file; pictures go beside it (default: benchmarks/results)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not yet in the JSON file, then write it, the pictures, and the table."""
    said = parse(arguments)
    torch.set_num_threads(said.threads)
    warnings.filterwarnings("ignore")  # of peers, about their own defaults
    device = use(said.scale)
    suffix = "" if said.scale == "cpu" else f"_{said.scale}"
    path = said.out or RESULTS / f"time_to_target{suffix}.json"
    results = Results(path, environment(device))
    console = Console()
    contenders = {name: CONTENDERS[name] for name in said.optimizer}
    for name in said.workload:
        task = TASKS[said.scale][name]
        if said.steps is not None:
            task = Task(**{**vars(task), "steps": said.steps, "tuning_steps": said.steps})
        for optimizer in said.forget:
            results.forget(name, optimizer)
        data = task.data(said.data, task.batch_size, device)
        warm_up(task, data, contenders, device)
        one = Measurement(name, said.scale, task, data, device, results, console.print)
        seeds = task.seeds if said.seeds is None else said.seeds
        summary = measure(one, contenders, 0 if said.robustness else seeds)
        results.put("summary", name, summary)
        save_robustness(summary, path.with_name(f"{path.stem}_{name}_rates.png"))
        if summary["optimizers"]:
            save_curves(summary, path.with_name(f"{path.stem}_{name}.png"))
    console.print(race.table({name: results.content["summary"][name] for name in said.workload}))


if __name__ == "__main__":
    main()
