"""What one setting of THOR changes: each of ``ablation_settings`` beside the defaults, on two workloads, in both modes.

Trainings are as long as the tuning ones of ``time_to_target``, a third of its full ones, at the rate that won there,
with seeds that were used neither there nor to tune, and are judged by the validation split. A setting's figure is its
final loss less that of the defaults on the same seed: below 0 is better. Finished trainings are in the JSON file and
not repeated; seeds are the outer loop, and the most telling settings come first, so a run may be stopped at any time.

    python -m benchmarks.studies.ablations --data DIR          # DIR holds cifar10/, tinyshakespeare/
    python -m benchmarks.studies.ablations --draw              # only draws and prints what is in the file
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.environment import RESULTS, environment
from benchmarks.common.pictures import save, subplots
from benchmarks.common.results import Results
from benchmarks.common.tables import rich_table
from benchmarks.studies.ablation_settings import DEFAULT, NOISE, RATES, contender_of, model_of, settings
from benchmarks.time_to_target.tasks import TASKS, Data, Task
from benchmarks.time_to_target.training import train

# Neither those of the race (0, 1, 2) nor the one that tunes.
FIRST_SEED = 100
MODES = ("natural", "polar")
CPU = torch.device("cpu")

Finals = dict[str, dict[str, dict[str, float | None]]]
"""By ``"workload mode"``, setting and seed: the final loss on the validation split; None if it was not finite."""


def finals_of(results: Mapping[str, Any]) -> Finals:
    """Collect the trainings of a JSON file that are as long as its last ones, in the order of `settings`."""
    order = list(settings(steps=1, rows=1))
    steps = {workload: one["steps"] for workload, one in results["summary"].items()}
    runs = [run for run in results["runs"].values() if run["steps"] == steps[run["workload"]]]
    finals: Finals = {}
    for run in sorted(runs, key=lambda run: order.index(run["setting"])):
        by_setting = finals.setdefault(f"{run['workload']} {run['mode']}", {})
        by_setting.setdefault(run["setting"], {})[str(run["seed"])] = run["final"]
    return {f"{workload} {mode}": finals.get(f"{workload} {mode}", {}) for workload in RATES for mode in MODES}


def differences(by_setting: Mapping[str, Mapping[str, float | None]]) -> dict[str, list[float]]:
    """Each setting's final loss less the defaults', for each seed that both have; infinite if it was not finite.

    >>> differences({"default": {"1": 2.0, "2": 3.0}, "damping=2": {"1": 2.5, "2": None}})
    {'damping=2': [0.5, inf]}
    """
    return {
        name: [
            math.inf if own is None else round(own - base, 5)
            for seed, own in by_seed.items()
            if (base := by_setting[DEFAULT].get(seed)) is not None
        ]
        for name, by_seed in by_setting.items()
        if name != DEFAULT
    }


def in_words(values: Sequence[float], form: str) -> str:
    """The mean of ``values`` in format ``form``, and their range if there are several.

    >>> in_words([0.5, 1.0], "+.2f"), in_words([0.5], "+.2f"), in_words([], "+.2f"), in_words([0.5, math.inf], "+.2f")
    ('+0.75 (+0.50 to +1.00)', '+0.50', '–', 'not finite')
    """
    if not values:
        return "–"
    if math.inf in values:
        return "not finite"
    several = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{several}"


def heads() -> tuple[str, ...]:
    """Heads of the table."""
    return ("setting", *(f"{workload}, {mode}" for workload in RATES for mode in MODES))


def cells(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row under ``heads`` for each setting, the defaults' own loss first."""
    finals = finals_of(results)
    own = [finals[case].get(DEFAULT, {}).values() for case in finals]
    yield (
        "all at their defaults: the loss",
        *(in_words([math.inf if loss is None else loss for loss in losses], ".3f") for losses in own),
    )
    by_case = {case: differences(by_setting) for case, by_setting in finals.items() if by_setting}
    for name in settings(steps=1, rows=1):
        row = [in_words(by_case.get(case, {}).get(name, []), "+.3f") for case in finals]
        if any(cell != "–" for cell in row):
            yield (name, *row)


def train_all(results: Results, tasks: Mapping[str, tuple[Task, Data]], seeds: int, say: Any) -> None:
    """Train whatever is not in the results yet; ``say`` prints a line of progress."""
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for name in settings(steps=1, rows=1):
            for workload, (task, data) in tasks.items():
                for mode in MODES:
                    train_one(results, workload, task, data, mode, name, seed, say)


def train_one(
    results: Results, workload: str, task: Task, data: Data, mode: str, name: str, seed: int, say: Any
) -> None:
    """Train with the setting ``name``, unless the results hold that training."""
    steps = task.tuning_steps
    setting = settings(steps, rows_of(task, data))[name]
    contender = contender_of(name, setting, mode, RATES[workload][mode], steps)
    about = {"workload": workload, "mode": mode, "setting": name, "seed": seed, "steps": steps}

    def run() -> dict[str, Any]:
        say(f"{workload}: {contender.label}, seed {seed}")
        changed = replace(task, model=model_of(task, setting))
        ran = train(changed, data, contender, contender.rates[0], seed=seed, tuning=True, device=CPU)
        return {**about, "final": ran["values"][-1]}

    facts = [task.words, steps, task.batch_size, task.decay, contender.rates, repr(setting)]
    results.get_or_train(f"{workload} {mode} {name} seed={seed}", facts, run)


def rows_of(task: Task, data: Data) -> int:
    """Rows of a batch that the loss is a mean over: samples, or positions of all samples."""
    inputs, _ = data.draw(torch.Generator().manual_seed(0))
    return math.prod(inputs.shape[:2]) if task.per_position else len(inputs)


def save_picture(results: Mapping[str, Any], path: Path) -> None:
    """Draw a dot for each seed of each setting, a panel for each workload and mode; distant dots stand at the edge."""
    finals = finals_of(results)
    names = [name for name in settings(steps=1, rows=1) if name != DEFAULT]
    size = (2.9 * len(finals) + 2.6, 0.24 * len(names) + 1.6)
    figure, rows = subplots(1, len(finals), figsize=size, sharey=True)
    for axes, (case, by_setting) in zip(rows[0], finals.items(), strict=True):
        by_name = differences(by_setting)
        low, high = limits([value for values in by_name.values() for value in values])
        for name, own in by_name.items():
            values = [min(max(value, low), high) for value in own]
            axes.plot(values, [names.index(name)] * len(values), color="tab:red", linewidth=1, marker=".")
        noise = by_name.get(NOISE, [])
        if noise and math.isfinite(max(noise)):
            axes.axvspan(min(0.0, *noise), max(0.0, *noise), color="tab:gray", alpha=0.25, linewidth=0)
        axes.axvline(0, color="black", linewidth=0.8)
        margin = 0.02 * (high - low)
        axes.set_xlim(low - margin, high + margin)
        axes.set_title(case.replace(" ", ", "), fontsize="small")
        axes.grid(axis="y", alpha=0.3)
    rows[0][0].set_yticks(range(len(names)), names, fontsize="small")
    rows[0][0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("final loss less that of the defaults (left is better; at the edge: or worse)", fontsize="small")
    save(figure, path, "One setting changed at a time; grey: the effect of a learning rate that is 1 % higher")


def limits(values: Sequence[float]) -> tuple[float, float]:
    """The shown range of differences: all better than the defaults, and most of the worse ones.

    >>> limits([-0.1, 0.1, 0.2, math.inf])
    (-0.11, 0.22)
    """
    finite = sorted(value for value in values if math.isfinite(value)) or [0.0]
    best, worst = finite[0], finite[int(0.9 * (len(finite) - 1) + 0.5)]
    least = 0.1 * max(abs(best), abs(worst)) or 1.0
    return round(1.1 * min(best, -least), 6), round(1.1 * max(worst, least), 6)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not in the JSON file yet, then draw the picture and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/ and tinyshakespeare/")
    parser.add_argument("--workload", choices=RATES, nargs="+", default=list(RATES))
    parser.add_argument("--steps", type=int, help="of each training, to try this file out")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations.json", help="a picture goes beside it")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    console = Console()
    if not args.draw:
        results = Results(args.out, environment(CPU))
        tasks = {}
        for workload in args.workload:
            task = TASKS["cpu"][workload]
            task = replace(task, tuning_steps=args.steps or task.tuning_steps)
            tasks[workload] = (task, task.data(args.data, task.batch_size, CPU))
            about = {"words": task.words, "metric": task.metric, "steps": task.tuning_steps, "rates": RATES[workload]}
            results.put("summary", workload, {**about, "environment": results.environment})
        train_all(results, tasks, args.seeds, console.print)
    content = json.loads(args.out.read_text(encoding="utf-8"))
    save_picture(content, args.out.with_suffix(".png"))
    title = "Final loss less that of the defaults on the same seed: mean (range)"
    console.print(rich_table(title, heads(), cells(content)))


if __name__ == "__main__":
    main()
