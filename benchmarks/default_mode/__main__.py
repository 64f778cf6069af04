"""``python -m benchmarks.default_mode --data DIR``: all trials, each recorded in one file; finished ones are kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.contenders import DEFAULT_RATE
from benchmarks.common.environment import RESULTS, environment
from benchmarks.common.results import Results
from benchmarks.default_mode.confirmation import CONFIRMATION
from benchmarks.default_mode.development import DEVELOPMENT
from benchmarks.default_mode.figures import save_picture
from benchmarks.default_mode.later_confirmation import LATER_CONFIRMATION
from benchmarks.default_mode.problem import Problem, StudyTask
from benchmarks.default_mode.settings import SETTINGS
from benchmarks.default_mode.summary import summarise
from benchmarks.default_mode.trial import train

TUNING_SEED = 1000
SEEDS = (0, 1, 2)
TASKS = {**DEVELOPMENT, **CONFIRMATION, **LATER_CONFIRMATION}


class Study:
    """All trials of one task.

    Args:
        name: of the task.
        folder: of the data sets.
        results: the file of finished trials.
    """

    def __init__(self, name: str, folder: Path | None, results: Results) -> None:
        self.name, self.task, self._folder, self._results = name, TASKS[name], folder, results
        self._problem: Problem | None = None

    def trial(self, setting: str, lr: float, seed: int) -> dict[str, Any]:
        """The record of one training, see `train`; on the tuning seed scores are of the validation split."""
        task: StudyTask = self.task
        own = SETTINGS[setting].facts
        facts = [task.words, task.steps, task.decay, {**own, **task.facts} if "mode" in own else dict(own)]

        def run() -> dict[str, Any]:
            print(f"{self.name}: {SETTINGS[setting].label}, lr {lr:g}, seed {seed}", flush=True)
            self._problem = self._problem or task.make(self._folder)
            return train(task, self._problem, SETTINGS[setting], lr, seed, tuning=seed == TUNING_SEED)

        return self._results.get_or_train(f"{self.name} {setting} lr={lr:g} seed={seed}", facts, run)

    def tune(self, setting: str) -> dict[float, float | None]:
        """The final validation score at each of a setting's rates; None where a training diverged."""
        return {lr: self.trial(setting, lr, TUNING_SEED)["values"][-1] for lr in SETTINGS[setting].rates}

    def run(self, settings: list[str]) -> dict[str, Any]:
        """Tune each setting, then train it on all seeds with its best rate, and THOR with its default rate too."""
        tuning = {setting: self.tune(setting) for setting in settings}
        runs: dict[str, dict[str, Any]] = {}
        for setting, scores in tuning.items():
            best = min(scores, key=lambda lr: float("inf") if scores[lr] is None else float(scores[lr] or 0.0))
            for lr in dict.fromkeys([best, DEFAULT_RATE] if setting == "thor" else [best]):
                records = [self.trial(setting, lr, seed) for seed in SEEDS]
                runs[f"{setting}@{lr:g}"] = {"setting": setting, "lr": lr, "is_best": lr == best, "records": records}
        scores_by_rate = {s: {f"{lr:g}": v for lr, v in scores.items()} for s, scores in tuning.items()}
        return {"tuning": scores_by_rate, "runs": runs}


def main(argv: list[str] | None = None) -> None:
    """Run the trials of some tasks and settings, and add them to the summary of each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/ and tinyshakespeare/")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS / "default_mode.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(arguments.results, environment(torch.device("cpu")))
    for name in arguments.task:
        study = Study(name, arguments.data, results)
        found = study.run(arguments.setting)
        task = study.task
        summary = {"words": task.words, "metric": task.metric, "is_confirmation": name not in DEVELOPMENT}
        before = results.content["summary"].get(name, {"target": None, "tuning": {}, "runs": {}})
        results.put("summary", name, before | summary | summarise(found, before, results.environment))
    for kind, is_confirmation in (("confirmation", True), ("development", False)):
        picture = arguments.results.with_name(f"default_mode_{kind}.png")
        save_picture(results.content["summary"], picture, confirmation=is_confirmation)


if __name__ == "__main__":
    main()
