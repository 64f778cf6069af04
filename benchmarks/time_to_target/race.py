"""Figures from the trainings of ``time_to_target``: steps and seconds to the target, with intervals, and as words."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.common.contenders import CONTENDERS, Contender
from benchmarks.time_to_target.tasks import Task
from benchmarks.time_to_target.training import check_steps

OWN = "thor"
"""Prefix of this package's contenders."""
HEADS = (
    "workload and target", "optimizer", "lr", "steps to target", "seconds to target", "of the fastest other's",
    "ms per step", "final",
)  # fmt: skip

# The 97.5 % point of Student's t, by degrees of freedom; beyond the last, that one is used (a little too wide).
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(values: Sequence[float]) -> list[float]:
    """The mean and half the width of its 95 % confidence interval (Student's t; infinite for a single value).

    >>> interval([1.0, 2.0, 3.0])
    [2.0, 2.484]
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return [mean, math.inf]
    t = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return [mean, t * statistics.stdev(values) / math.sqrt(len(values))]


def first_reached(task: Task, run: Mapping[str, Any]) -> int | None:
    """The first check at which a training's record reached the target; None if none did."""
    return next((check for check, value in enumerate(run["values"]) if task.reached(value)), None)


def summarise(
    task: Task,
    runs: Mapping[str, list[dict[str, Any]]],
    rates: Mapping[str, float],
    contenders: Mapping[str, Contender],
) -> dict[str, Any]:
    """Compute the figures of each optimizer from the records ``runs`` of its seeds, the same seeds for all.

    ``[mean, half width]`` are 95 % intervals over seeds. Steps and seconds to the target are None unless every seed
    reached it; ``reached`` counts those that did. ``seconds_ratio`` compares seconds, on the same seed, with the
    fastest optimizer outside this package: the geometric mean and its interval ``[mean, low, high]``; None for that
    optimizer itself. ``final`` is None if a seed ended with a value that is not finite. ``curve`` and ``seconds`` are
    the runs themselves, for the picture.
    """
    steps = check_steps(task.steps, task.checks)
    checks = {name: [first_reached(task, run) for run in own] for name, own in runs.items()}
    to_target = {
        name: [run["seconds"][check] for run, check in zip(runs[name], own, strict=True) if check is not None]
        for name, own in checks.items()
    }
    seeds = len(next(iter(runs.values())))
    whole = {name for name, seconds in to_target.items() if len(seconds) == seeds}
    others = [name for name in runs if name in whole and not name.startswith(OWN)]
    reference = min(others, key=lambda name: statistics.fmean(to_target[name]), default=None)
    out: dict[str, Any] = {}
    for name, own in runs.items():
        got = [steps[check] for check in checks[name] if check is not None]
        finals = [run["values"][-1] for run in own]
        out[name] = {
            "lr": rates[name],
            "lr_is_at_an_end_of_its_grid": len(contenders[name].rates) > 1
            and rates[name] in (contenders[name].rates[0], contenders[name].rates[-1]),
            "seeds": seeds,
            "reached": len(got),
            "steps_to_target": _rounded(interval(got)) if name in whole else None,
            "seconds_to_target": _rounded(interval(to_target[name])) if name in whole else None,
            "seconds_ratio": (
                None
                if reference in (None, name) or name not in whole
                else _ratio(to_target[name], to_target[reference])
            ),
            "milliseconds_per_step": _rounded(
                interval([1e3 * run["seconds"][-1] / steps[len(run["seconds"]) - 1] for run in own])
            ),
            "final": None if None in finals else _rounded(interval(finals)),
            "curve": [run["values"] for run in own],
            "seconds": [run["seconds"] for run in own],
        }
    return out


def _ratio(own: Sequence[float], others: Sequence[float]) -> list[float]:
    mean, half = interval([math.log(mine / other) for mine, other in zip(own, others, strict=True)])
    return _rounded([math.exp(mean), math.exp(mean - half), math.exp(mean + half)])


def _rounded(values: Sequence[float]) -> list[float]:
    # JSON has no infinity.
    return [float(f"{value:.4g}") if math.isfinite(value) else 1e9 for value in values]


def cells(summary: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row under ``HEADS`` for each workload and optimizer; the terminal and the page show the same."""
    for task in summary.values():
        seeds = max(one["seeds"] for one in task["optimizers"].values())
        words = f"{task['words']}: {goal(task)}; {seeds} seeds"
        for i, (name, one) in enumerate(task["optimizers"].items()):
            ratio = one["seconds_ratio"]
            yield (
                words if i == 0 else "",
                label_of(name),
                f"{one['lr']:g}" + (" (end of its grid)" if one["lr_is_at_an_end_of_its_grid"] else ""),
                missed(one) or with_interval(one["steps_to_target"], ".0f"),
                "–" if missed(one) else with_interval(one["seconds_to_target"], ".1f"),
                "–" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f}–{ratio[2]:.2f})",
                with_interval(one["milliseconds_per_step"], ".0f"),
                "not finite" if one["final"] is None else with_interval(one["final"], ".3f"),
            )


def label_of(name: str) -> str:
    """The label of an optimizer; its name, where results hold one that is no contender any more."""
    return CONTENDERS[name].label if name in CONTENDERS else name


def goal(task: Mapping[str, Any]) -> str:
    """The target in words."""
    return f"{task['metric']} {'≥' if task['higher_is_better'] else '≤'} {task['target']:g}"


def short_heads(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Heads of the table of seconds alone: a column for each workload."""
    return ("optimizer", *(f"{name}: {goal(task)}" for name, task in summary.items()))


def short_cells(summary: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row under ``short_heads`` for each optimizer: seconds to the target, or how many seeds reached it."""
    columns = [task["optimizers"] for task in summary.values()]
    for name in dict.fromkeys(name for column in columns for name in column):
        own = [column.get(name) for column in columns]
        yield (
            label_of(name),
            *("" if one is None else missed(one) or with_interval(one["seconds_to_target"], ".2f") for one in own),
        )


def missed(one: Mapping[str, Any]) -> str:
    """How many seeds reached the target, in words; empty if all did."""
    if one["reached"] == one["seeds"]:
        return ""
    return f"{one['reached'] or 'none'} of {one['seeds']} got there"


def with_interval(pair: Sequence[float], form: str) -> str:
    """``mean ± half width``; the mean alone if there is a single value.

    >>> with_interval([1.5, 0.25], ".2f"), with_interval([1.5, 1e9], ".2f")
    ('1.50 ± 0.25', '1.50')
    """
    return f"{pair[0]:{form}}" + (f" ± {pair[1]:{form}}" if pair[1] < 1e9 else "")
