"""The refreshes that the paper's trace rule saves, and their cost in accuracy, on CIFAR-10 as in ``time_to_target``.

THOR at one learning rate, with each rule at each interval, on the same seeds; the seeds are the outer loop. Figures are
of the test split. Trainings that are in the JSON file already are not repeated.

    python -m benchmarks.studies.trace_rule --data DIR      # DIR holds cifar10/
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.common.contenders import Contender, Stepper
from benchmarks.common.environment import RESULTS, environment
from benchmarks.common.tables import rich_table
from benchmarks.time_to_target.race import interval, with_interval
from benchmarks.time_to_target.tasks import TASKS, Task
from benchmarks.time_to_target.training import train
from lightning_thor import Curvature, Thor

RULES: Mapping[str, Any] = {
    "none": None,
    "THOR (0.01, 0)": "THOR",
    "THOR_stop (0.01, 0.001)": "THOR_stop",
    "(0.1, 0.01)": (0.1, 0.01),
}
INTERVALS = (5,)
HEADS = ("interval", "trace rule", "refreshes done of possible", "accuracy", "ms per step")


def one(task: Task, data: Any, rule: Any, every: int, lr: float, seed: int) -> dict[str, Any]:
    """Train once: the final metric, the seconds, and the refreshes done and possible, counted by layer."""
    built: list[Curvature] = []

    def build(model: nn.Module, lr: float, options: Mapping[str, Any], per_position: bool) -> Stepper:
        built.append(Curvature(model, trace_rule=rule, update_every_n_steps=every))
        return Thor(model.parameters(), lr=lr, preconditioner=built[0])

    contender = Contender("THOR", build, (lr,), "tab:red")
    ran = train(task, data, contender, lr, seed=seed, tuning=False, device=torch.device("cpu"))
    done, possible = built[0].refreshes
    return {"final": ran["values"][-1], "seconds": ran["seconds"][-1], "done": done, "possible": possible}


def cells(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row under ``HEADS`` for each interval and rule: means over seeds with 95 % intervals."""
    for key in dict.fromkeys(key.rpartition(" ")[0] for key in results["runs"]):
        runs = [run for name, run in results["runs"].items() if name.rpartition(" ")[0] == key]
        every, _, rule = key.partition(" ")
        yield (
            every,
            rule,
            f"{100 * sum(run['done'] for run in runs) / sum(run['possible'] for run in runs):.0f} %",
            with_interval(interval([run["final"] for run in runs]), ".3f"),
            with_interval(interval([1e3 * run["seconds"] / results["steps"] for run in runs]), ".0f"),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not in the JSON file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/")
    parser.add_argument("--workload", choices=TASKS["cpu"], default="cifar10")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="to try this file out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "trace_rule.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    task = TASKS["cpu"][args.workload]
    if args.steps is not None:
        task = replace(task, steps=args.steps)
    data = task.data(args.data, task.batch_size, device)
    facts = {"words": task.words, "lr": args.lr, "steps": task.steps, "environment": environment(device)}
    runs = json.loads(args.out.read_text(encoding="utf-8"))["runs"] if args.out.is_file() else {}
    results: dict[str, Any] = {**facts, "runs": runs}
    console = Console()
    for seed in range(args.seeds):
        for every in INTERVALS:
            for name, rule in RULES.items():
                key = f"{every} {name} seed={seed}"
                if key in runs:
                    continue
                console.print(key)
                runs[key] = one(task, data, rule, every, args.lr, seed)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    title = f"The trace rule on {task.words}, lr {args.lr:g}"
    console.print(rich_table(title, HEADS, cells(results), words=2))


if __name__ == "__main__":
    main()
