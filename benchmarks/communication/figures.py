"""Tables and the timeline from counted messages and timed refreshes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.pictures import save, subplots
from benchmarks.communication.messages import moved

COUNT_HEADS = ("workload", "way", "ranks", "collectives", "factors, MB", "of whole blocks", "moved per rank, MB")
TIME_HEADS = (
    "workload", "way", "ranks", "backward, ms", "update, ms", "waiting for sums, ms", "gathering, ms", "hidden",
    "inverting, ms",
)  # fmt: skip
SHARE_HEADS = (
    "workload", "ranks", "sums hidden", "inverting, ms", "times ranks, over one rank's", "SGD's step, ms",
    "THOR's over it, %", "without refreshes, %", "refreshes, %", "both sharded, %",
)  # fmt: skip
TIMELINE_RANKS = "2"
TIMELINE_WAYS = ("at once", "buckets")
COLOURS = {
    "backward": "tab:gray", "sum": "tab:blue", "wait": "tab:red", "invert": "tab:green", "gather": "tab:purple",
    "update": "lightgray",
}  # fmt: skip
"""By kind of event; from the top of the timeline down."""


def count_cells(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows under ``COUNT_HEADS``."""
    for name, result in results.items():
        for way, by_ranks in result["counts"].items():
            for n_ranks, one in by_ranks.items():
                yield (
                    name,
                    way,
                    n_ranks,
                    f"{len(one['factors'])} + {len(one['inverses'])}",
                    f"{one['travelling_bytes'] / 2**20:.1f}",
                    f"{one['travelling_bytes'] / one['whole_bytes']:.3f}",
                    f"{moved(one['factors'] + one['inverses'], int(n_ranks)) / 2**20:.1f}",
                )


def hidden_share(one: dict[str, Any]) -> str:
    """The share of the wait for sums at once that buckets save."""
    at_once = one["ways"]["at once"]["wait"]
    return f"{1 - one['ways']['buckets']['wait'] / at_once:.0%}" if at_once else "–"


def time_cells(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows under ``TIME_HEADS``."""
    for name, result in results.items():
        for n_ranks, one in result.get("times", {}).items():
            for way, times in one["ways"].items():
                hidden = hidden_share(one) if way == "buckets" else "–"
                figures = (f"{times[event]:.1f}" for event in ("backward", "update", "wait", "gather"))
                yield name, way, n_ranks, *figures, hidden, f"{max(times['inverting']):.1f}"


def share_cells(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows under ``SHARE_HEADS``."""
    for name, result in results.items():
        times = result.get("times", {})
        busiest = {n_ranks: max(shares) for n_ranks, shares in result.get("inverting", {}).items()}
        for n_ranks in sorted({*times, *busiest}, key=int):
            one = times.get(n_ranks)
            inverting, hidden, figures, both_sharded = ("–", "–"), "–", ["–"] * 4, "–"
            if n_ranks in busiest:
                # 1: the work falls as one over the ranks.
                inverting = f"{busiest[n_ranks]:.1f}", f"{busiest[n_ranks] * int(n_ranks) / busiest['1']:.2f}"
            if one is not None:
                hidden = hidden_share(one)
            if one is not None and (steps := one["steps"]) is not None:
                percents = (steps["every_10"] - 1, steps["plain"] - 1, steps["refreshing"])
                figures = [f"{steps['sgd_ms']:.0f}", *(f"{100 * percent:+.1f}" for percent in percents)]
            if one is not None and (sharded := one.get("sharded_steps")) is not None:
                both_sharded = f"{100 * (sharded['every_10'] - 1):+.1f}"
            yield name, n_ranks, hidden, *inverting, *figures, both_sharded


def save_timeline(results: dict[str, Any], path: Path) -> None:
    """Draw, into a PNG file, the events of rank 0 in the last refresh on ``TIMELINE_RANKS`` ranks, if there is one."""
    timed = [
        (name, way, result["times"][TIMELINE_RANKS]["ways"][way])
        for name, result in results.items()
        if TIMELINE_RANKS in result.get("times", {})
        for way in TIMELINE_WAYS
    ]
    if not timed:
        return
    lanes = list(COLOURS)
    figure, rows = subplots(len(timed), 1, figsize=(9, 1.9 * len(timed)))
    for axes, (name, way, one) in zip(rows[:, 0], timed, strict=True):
        for event, start, stop in one["timeline"]:
            bar = {"left": 1e3 * start, "color": COLOURS[event], "edgecolor": "black", "linewidth": 0.3}
            axes.barh(lanes.index(event), 1e3 * (stop - start), **bar)
        axes.set_yticks(range(len(lanes)), lanes)
        axes.invert_yaxis()
        axes.set_title(f"{name}, {way}, {TIMELINE_RANKS} ranks; milliseconds since backward began", fontsize=9)
    save(figure, path)
