"""From the records of a task's trials to figures, by the rules of README.md beside this file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summarise(found: Mapping[str, Any], before: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the target and what each optimizer makes of it.

    Args:
        found: ``"tuning"``, final scores by setting and rate, and ``"runs"``, each with its ``"records"`` by seed.
        before: the summary so far, whose other optimizers stay; whose target too, unless ``found`` has AdamW.
        environment: in which the trainings of ``found`` ran.

    Returns:
        ``"target"`` (None without AdamW), ``"tuning"``, and ``"runs"`` with ``"final"`` and its ``"error"`` (the
        standard error of its mean), ``"steps"`` and ``"seconds"`` to the target (None if a seed did not get there),
        ``"ms_per_step"``, ``"curve"``, the steps, mean seconds and mean scores at the checks, and ``"environment"``.

    Raises:
        ValueError: AdamW was trained anew, so that the target of others changes.
    """
    runs = found["runs"]
    adamw = next((run for run in runs.values() if run["setting"] == "adamw"), None)
    target = before["target"] if adamw is None else _mean_final(adamw["records"])
    kept = {name: run for name, run in before["runs"].items() if run["setting"] not in found["tuning"]}
    if kept and target != before["target"]:
        raise ValueError(f"AdamW was trained anew: train {', '.join(sorted(kept))} too, whose target it is.")
    own = {name: _summary_of(run, target) | {"environment": dict(environment)} for name, run in runs.items()}
    return {"target": target, "tuning": {**before["tuning"], **found["tuning"]}, "runs": {**kept, **own}}


def _summary_of(run: Mapping[str, Any], target: float | None) -> dict[str, Any]:
    records: Sequence[Mapping[str, Any]] = run["records"]
    finals = [record["values"][-1] for record in records]
    is_finite = None not in finals
    reached = [] if target is None else [first_check(record, target) for record in records]
    all_reached = [one for one in reached if one is not None]
    there = len(all_reached) == len(records)
    return {
        "setting": run["setting"],
        "lr": run["lr"],
        "is_best": run["is_best"],
        "final": statistics.fmean(finals) if is_finite else None,
        "error": statistics.stdev(finals) / len(finals) ** 0.5 if is_finite and len(finals) > 1 else None,
        "n_reached": len(all_reached),
        "steps": statistics.fmean(step for step, _ in all_reached) if there else None,
        "seconds": statistics.fmean(seconds for _, seconds in all_reached) if there else None,
        "ms_per_step": statistics.fmean(1000 * r["seconds"][-1] / r["steps"][-1] for r in records),
        "curve": {
            "steps": records[0]["steps"],
            "seconds": [round(statistics.fmean(at), 3) for at in zip(*(r["seconds"] for r in records), strict=False)],
            "values": [_mean(at) for at in zip(*(r["values"] for r in records), strict=False)],
        },
    }


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return round(statistics.fmean(finite), 6) if len(finite) == len(values) else None


def _mean_final(records: Sequence[Mapping[str, Any]]) -> float | None:
    return _mean([record["values"][-1] for record in records])


def first_check(record: Mapping[str, Any], target: float) -> tuple[int, float] | None:
    """Find the first check whose score is the target or better.

    >>> record = {"steps": [10, 20, 30], "values": [3.0, 1.9, 2.1], "seconds": [0.1, 0.2, 0.3]}
    >>> first_check(record, 2.0), first_check(record, 1.0)
    ((20, 0.2), None)

    Args:
        record: of `train`.
        target: less is better.

    Returns:
        The step and the seconds; None if there is none.
    """
    for step, value, seconds in zip(record["steps"], record["values"], record["seconds"], strict=True):
        if value is not None and value <= target:
            return step, seconds
    return None
