"""How soon each optimizer reaches a target: all of ``contenders.py``, tuned alike, on the workloads of ``tasks.py``.

For each optimizer the same number of learning rates is tried in a shorter training, with a seed and on held-out data
that are not reported; the winner then trains in full on ``--seeds`` seeds. Rates and seeds are the outer loops, so a
machine that is slower for a while is slower for all. Seconds are of training with everything that an optimizer costs,
validation left out. Finished trainings are kept in the JSON file and not repeated: a run that was stopped goes on where
it was, and a new optimizer is all that is trained when the command is given again. (It cannot know that the code of an
optimizer has changed: ``--forget NAME`` trains that one anew.)

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

from benchmarks import race
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.environment import RESULTS, environment
from benchmarks.pictures import save_curves, save_robustness
from benchmarks.tasks import TASKS, Data, Task
from benchmarks.training import check_steps, train

TUNING_SEED = 1000


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
        """Drop the trainings of one optimizer on one workload."""
        self._take_in_the_file()
        runs = self.content["runs"]
        self.content["runs"] = {key: run for key, run in runs.items() if key.split()[:2] != [workload, optimizer]}
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

    def run(self, name: str, contender: Contender, lr: float, seed: int, tuning: bool) -> dict[str, Any]:
        """One training: stored, or done now."""
        task, kind = self.task, "tuning" if tuning else f"seed={seed}"
        steps = task.tuning_steps if tuning else task.steps
        facts = [task.words, steps, task.batch_size, task.decay, task.checks, self.scale, contender.options, seed]

        def now() -> dict[str, Any]:
            self.say(f"{self.name}: {contender.words}, lr {lr:g}, {kind}")
            return train(task, self.data, contender, lr, seed=seed, tuning=tuning, device=self.device)

        return self.results.get_or_train(f"{self.name} {name} lr={lr:g} {kind}", facts, now)


def tune(one: Measurement, contenders: Mapping[str, Contender]) -> dict[str, dict[float, float | None]]:
    """By optimizer and learning rate: the metric at the end of the shorter training; what has one rate is not tuned."""
    final: dict[str, dict[float, float | None]] = {name: {} for name in contenders}
    for trial in range(max(len(contender.rates) for contender in contenders.values())):
        for name, contender in contenders.items():
            if 1 < len(contender.rates) > trial:
                lr = contender.rates[trial]
                final[name][lr] = one.run(name, contender, lr, TUNING_SEED, tuning=True)["values"][-1]
    return final


def best_rate(task: Task, final: Mapping[float, float | None], contender: Contender) -> float:
    """The learning rate with the best value; the only one of a contender that is not tuned."""
    return max(final, key=lambda lr: task.goodness(final[lr]), default=contender.rates[0])


def measure(one: Measurement, contenders: Mapping[str, Contender], seeds: int) -> dict[str, Any]:
    """Tune, and train the winners if ``seeds`` is not 0; the summary."""
    final = tune(one, contenders)
    best = {name: best_rate(one.task, final[name], contender) for name, contender in contenders.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for seed in range(seeds):
        for name, contender in contenders.items():
            runs[name].append(one.run(name, contender, best[name], seed, tuning=False))
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


def warm_up(task: Task, data: Data, device: torch.device) -> None:
    """Two steps of SGD, or the first training would pay for torch's one-off choices."""
    short = Task(**{**vars(task), "steps": 2, "tuning_steps": 2, "checks": 1})
    train(short, data, CONTENDERS["sgd"], 1e-3, seed=0, tuning=True, device=device)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/ and tinyshakespeare/")
    parser.add_argument("--workload", choices=TASKS["cpu"], nargs="+", default=list(TASKS["cpu"]))
    parser.add_argument("--optimizer", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    parser.add_argument("--scale", choices=TASKS, default="cpu", help="sizes for two cores, or for a GPU")
    parser.add_argument("--seeds", type=int, default=3, help="full trainings of each optimizer")
    parser.add_argument("--robustness", action="store_true", help="only tune, and draw the metric over learning rates")
    parser.add_argument("--forget", choices=CONTENDERS, nargs="+", default=[], help="train these anew")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--steps", type=int, help="of full and tuning trainings, to try this file out")
    parser.add_argument("--out", type=Path, help="JSON file; pictures go beside it (default: benchmarks/results)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not yet in the JSON file, then write it, the pictures, and the table."""
    said = parse(arguments)
    torch.set_num_threads(said.threads)
    warnings.filterwarnings("ignore")  # of peers, about their own defaults
    device = torch.device("cuda" if said.scale == "gpu" else "cpu")
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
        warm_up(task, data, device)
        one = Measurement(name, said.scale, task, data, device, results, console.print)
        summary = measure(one, contenders, 0 if said.robustness else said.seeds)
        results.put("summary", name, summary)
        save_robustness(summary, path.with_name(f"{path.stem}_{name}_rates.png"))
        if summary["optimizers"]:
            save_curves(summary, path.with_name(f"{path.stem}_{name}.png"))
    console.print(race.table({name: results.content["summary"][name] for name in said.workload}))


if __name__ == "__main__":
    main()
