"""Figures from timed steps: ratios to momentum SGD, and the rows of both tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.step_cost.parts import PARTS

REPORTED_INTERVAL = 10
INTERVALS = (1, 10, 100)
HEADS_OF_TIMES = (
    "workload", "SGD, ms", "AdamW", "THOR, plain step", "THOR, refresh step", "every 10", "every 100",
    "staggered, every 10",
)  # fmt: skip
HEADS = (*HEADS_OF_TIMES, "p99 / p50", "state", "memory")
PARTS_HEADS = ("workload", *PARTS, "every 10", "floor, every 10", "SINGD, refresh step")


def ratios_by_kind(measured: Mapping[str, Any]) -> dict[str, list[float]]:
    """Ratios to SGD's step of the same round (see `rounds.measure`), by optimizer, or by optimizer and kind where steps
    are of two kinds: ``"thor_plain"``, ``"thor_refresh"``; a ValueError if no step of some kind was timed."""
    seconds, refreshes = measured["seconds"], measured["refreshes"]
    ratios: dict[str, list[float]] = {}
    for name in seconds.keys() - {"sgd"}:
        own = [mine / sgd for mine, sgd in zip(seconds[name], seconds["sgd"], strict=True)]
        if name not in refreshes:
            ratios[name] = own
            continue
        for kind, wanted in (("plain", False), ("refresh", True)):
            values = [ratio for ratio, is_refresh in zip(own, refreshes[name], strict=True) if is_refresh is wanted]
            if not values:
                raise ValueError(f"No step of the kind '{name}_{kind}' was timed: take more rounds than {len(own)}.")
            ratios[f"{name}_{kind}"] = values
    return ratios


def summarise(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Summarise `rounds.measure`: ``[first quartile, median, third quartile]`` of each kind's ratios, and more.

    ``"amortised"`` is the mean cost at each interval: ``((interval - 1) * plain + refresh) / interval`` of the medians;
    under ``"staggered"`` the sum of all staggered steps over SGD's. ``"p99_over_p50"`` shows how uneven steps are at
    the interval 10: 1 if all take the same time. SGD's own shows the machine's share of it. ``"intervals"``, if they
    were measured: whole intervals of 10 steps over SGD's, as training takes them, without waiting between steps.
    """
    seconds, refreshes = measured["seconds"], measured["refreshes"]
    quartiles = {
        kind: quantiles(values, [1.0] * len(values), (0.25, 0.5, 0.75))
        for kind, values in ratios_by_kind(measured).items()
    }
    plain, refresh = (quartiles[kind][1] for kind in ("thor_plain", "thor_refresh"))
    amortised = {str(every): ((every - 1) * plain + refresh) / every for every in INTERVALS}
    every = REPORTED_INTERVAL
    of_thor = refreshes["thor"]
    share = {False: (1 - 1 / every) / of_thor.count(False), True: 1 / every / of_thor.count(True)}
    weights = {"thor": [share[is_refresh] for is_refresh in of_thor]}
    uneven = {}
    for name, values in seconds.items():
        if name in ("sgd", "thor", "thor_staggered"):
            p50, p99 = quantiles(values, weights.get(name, [1.0] * len(values)), (0.5, 0.99))
            uneven[name] = p99 / p50
    whole = measured.get("intervals", {})
    intervals = {
        name: quantiles(
            [mine / sgd for mine, sgd in zip(whole[name], whole["sgd"], strict=True)],
            [1.0] * len(whole[name]),
            (0.25, 0.5, 0.75),
        )
        for name in whole.keys() - {"sgd"}
    }
    return {
        "rounds": len(of_thor),
        "sgd_milliseconds": 1e3 * quantiles(seconds["sgd"], [1.0] * len(of_thor), (0.5,))[0],
        **{kind: quartiles[kind] for kind in sorted(quartiles)},
        "amortised": amortised | {"staggered": sum(seconds["thor_staggered"]) / sum(seconds["sgd"])},
        "p99_over_p50": uneven,
        **({"intervals": {name: intervals[name] for name in sorted(intervals)}} if intervals else {}),
        "state_over_parameters": {k: v / measured["parameter_bytes"] for k, v in measured["state_bytes"].items()},
    }


def quantiles(values: Sequence[float], weights: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Weighted quantiles: for each of ``shares``, the smallest value at which the cumulated weight has that share.

    >>> quantiles([3.0, 1.0, 2.0], [1.0, 1.0, 1.0], (0.25, 0.5, 1.0))
    [1.0, 2.0, 3.0]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    cumulated = torch.tensor([weights[i] for i in order], dtype=torch.float64).cumsum(0)
    places = torch.searchsorted(cumulated, torch.tensor(shares, dtype=torch.float64) * cumulated[-1]).tolist()
    return [values[order[place]] for place in places]


def rounded(value: Any) -> Any:
    """Round every float in nested dicts and lists to four digits: more is noise.

    >>> rounded({"a": [1.23456, 7], "b": None})
    {'a': [1.235, 7], 'b': None}
    """
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def cells(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row under ``HEADS`` for each workload; the terminal and the README show the same. Where whole intervals were
    measured, they are what is told of the interval 10."""
    for result in results.values():
        summary, memory = result["summary"], result["memory"]
        every = dict(summary["amortised"])
        if "intervals" in summary:
            every |= {"10": summary["intervals"]["thor"][1], "staggered": summary["intervals"]["thor_staggered"][1]}
        yield (
            result["words"],
            f"{summary['sgd_milliseconds']:.1f}",
            *(with_quartiles(summary[kind]) for kind in ("adamw", "thor_plain", "thor_refresh")),
            *(f"{every[key]:.2f}" for key in ("10", "100", "staggered")),
            " / ".join(f"{summary['p99_over_p50'][name]:.2f}" for name in ("sgd", "thor", "thor_staggered")),
            " / ".join(f"{summary['state_over_parameters'][name]:.1f}" for name in ("sgd", "adamw", "thor")),
            f"{memory['thor'] / memory['adamw']:.2f}" if memory.get("thor") and memory.get("adamw") else "–",
        )


def parts_cells(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row under ``PARTS_HEADS`` for each workload whose parts were measured."""
    for result in results.values():
        if not result["parts"]:
            continue
        parts, floor, summary = result["parts"]["parts"], result["parts"]["floor"], result["summary"]
        at_ten = 1 + floor["preconditioning"] + (floor["statistics"] + floor["inversion"]) / REPORTED_INTERVAL
        yield (
            result["words"],
            *(f"{parts[part]:.3f} (≥ {floor[part]:.3f})" for part in PARTS),
            f"{summary['amortised'][str(REPORTED_INTERVAL)]:.2f}",
            f"{at_ten:.2f}",
            with_quartiles(summary["singd_refresh"]) if "singd_refresh" in summary else "–",
        )


def with_quartiles(quartiles: Sequence[float]) -> str:
    """``median (first to third quartile)``.

    >>> with_quartiles([1.0, 1.25, 2.0])
    '1.25 (1.00–2.00)'
    """
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"
