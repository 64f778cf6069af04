"""What a refresh says to other ranks: collectives, bytes, what backward hides of them, and inversions shared out.

Collectives and bytes follow from the shapes of a model, so they are counted without other processes and hold on any
machine. Times are measured on real processes over gloo, all on this machine: each rank is one process with one thread.

    python -m benchmarks.communication                      # counts alone
    python -m benchmarks.communication --measure 1 2 4      # and times with 1, 2 and 4 ranks
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.environment import RESULTS, environment
from benchmarks.communication.inversion_times import share_ms
from benchmarks.communication.messages import WAYS, counts, moved
from benchmarks.communication.rank_times import WORKLOADS, measure

COUNTED_RANKS = (2, 4, 8, 64)
INVERTING_RANKS = (1, 2, 4)
INVERTING_ROUNDS = 15
COUNT_HEADS = ("workload", "way", "ranks", "collectives", "factors, MB", "of whole blocks", "moved per rank, MB")
TIME_HEADS = (
    "workload",
    "way",
    "ranks",
    "backward, ms",
    "update, ms",
    "waiting for sums, ms",
    "gathering, ms",
    "hidden",
    "inverting, ms",
)
SHARE_HEADS = (
    "workload",
    "ranks",
    "sums hidden",
    "inverting, ms",
    "times ranks, over one rank's",
    "SGD's step, ms",
    "THOR's over it, %",
    "without refreshes, %",
    "refreshes, %",
    "both sharded, %",
)
TIMELINE_RANKS = "2"
PICTURED = ("at once", "buckets")


# ── words and pictures ──


def count_cells(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows under ``COUNT_HEADS``."""
    for name, result in results.items():
        for way, by_ranks in result["counts"].items():
            for n_ranks, one in by_ranks.items():
                both = one["factors"] + one["inverses"]
                yield (
                    name,
                    way,
                    n_ranks,
                    f"{len(one['factors'])} + {len(one['inverses'])}",
                    f"{one['travelling_bytes'] / 2**20:.1f}",
                    f"{one['travelling_bytes'] / one['whole_bytes']:.3f}",
                    f"{moved(both, int(n_ranks)) / 2**20:.1f}",
                )


def hidden_of(one: dict[str, Any]) -> str:
    """What buckets save of the waiting that sums at once have."""
    at_once = one["ways"]["at once"]["wait"]
    return f"{1 - one['ways']['buckets']['wait'] / at_once:.0%}" if at_once else "–"


def time_cells(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows under ``TIME_HEADS``."""
    for name, result in results.items():
        for n_ranks, one in result.get("times", {}).items():
            for way, took in one["ways"].items():
                hidden = hidden_of(one) if way == "buckets" else "–"
                figures = (f"{took[what]:.1f}" for what in ("backward", "update", "wait", "gather"))
                yield name, way, n_ranks, *figures, hidden, f"{max(took['inverting']):.1f}"


def share_cells(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows under ``SHARE_HEADS``."""
    for name, result in results.items():
        times = result.get("times", {})
        busiest = {n_ranks: max(shares) for n_ranks, shares in result.get("inverting", {}).items()}
        for n_ranks in sorted({*times, *busiest}, key=int):
            one = times.get(n_ranks)
            inverting, hidden, figures, both_sharded = ("–", "–"), "–", ["–"] * 4, "–"
            if n_ranks in busiest:
                # 1 is a fall as one over the ranks.
                inverting = f"{busiest[n_ranks]:.1f}", f"{busiest[n_ranks] * int(n_ranks) / busiest['1']:.2f}"
            if one is not None:
                hidden = hidden_of(one)
            if one is not None and (steps := one["steps"]) is not None:
                percents = (steps["every_10"] - 1, steps["plain"] - 1, steps["refreshing"])
                figures = [f"{steps['sgd_ms']:.0f}", *(f"{100 * percent:+.1f}" for percent in percents)]
            if one is not None and (sharded := one.get("sharded_steps")) is not None:
                both_sharded = f"{100 * (sharded['every_10'] - 1):+.1f}"
            yield name, n_ranks, hidden, *inverting, *figures, both_sharded


def save_timeline(results: dict[str, Any], path: Path) -> None:
    """The last measured refresh with ``TIMELINE_RANKS`` ranks: what rank 0 did when."""
    timed = [
        (name, way, ranks, result["times"][ranks]["ways"][way])
        for name, result in results.items()
        if (ranks := TIMELINE_RANKS) in result.get("times", {})
        for way in PICTURED
    ]
    if not timed:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lanes = ("backward", "sum", "wait", "invert", "gather", "update")
    colours = ("tab:gray", "tab:blue", "tab:red", "tab:green", "tab:purple", "lightgray")
    figure, axes = pyplot.subplots(len(timed), 1, figsize=(9, 1.9 * len(timed)), squeeze=False, layout="constrained")
    for axis, (name, way, n_ranks, one) in zip(axes[:, 0], timed, strict=True):
        for what, start, stop in one["timeline"]:
            lane = lanes.index(what)
            axis.barh(
                lane, 1e3 * (stop - start), left=1e3 * start, color=colours[lane], edgecolor="black", linewidth=0.3
            )
        axis.set_yticks(range(len(lanes)), lanes)
        axis.invert_yaxis()
        axis.set_title(f"{name}, {way}, {n_ranks} ranks; milliseconds since backward began", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(title: str, heads: Sequence[str], rows: Iterator[tuple[str, ...]]) -> Table:
    """For a terminal."""
    out = Table(title=title)
    for index, head in enumerate(heads):
        out.add_column(head, justify="left" if index < 2 else "right")
    for row in rows:
        out.add_row(*row)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, measure if asked to, write the JSON file and the picture beside it, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workload", choices=WORKLOADS, nargs="+", default=[name for name in WORKLOADS if name != "tiny"]
    )
    parser.add_argument("--measure", type=int, nargs="+", default=[], metavar="RANKS", help="time so many processes")
    parser.add_argument("--rounds", type=int, default=10, help="timed refreshes of each way")
    parser.add_argument("--out", type=Path, default=RESULTS / "communication.json")
    options = parser.parse_args(arguments)
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for name in options.workload:
        result: dict[str, Any] = results.setdefault(name, {})
        result["words"] = WORKLOADS[name].words
        model = WORKLOADS[name].model()
        result["counts"] = {way: {str(n): counts(model, one, n) for n in COUNTED_RANKS} for way, one in WAYS.items()}
        if options.measure:
            result["environment"] = environment(torch.device("cpu"))
            result["inverting"] = share_ms(model, INVERTING_RANKS, INVERTING_ROUNDS)
            result["times"] = {str(n): measure(name, n, options.rounds) for n in options.measure}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # By way of text, so that what is printed is what another reader of the file sees: lists for tuples.
    text = json.dumps(results, ensure_ascii=False)
    results = json.loads(text)
    options.out.write_text(text + "\n", encoding="utf-8")
    console = Console()
    console.print(table("A refresh of all layers: what each rank says", COUNT_HEADS, count_cells(results)))
    if any("times" in result for result in results.values()):
        console.print(table("A refresh of all layers: what it takes", TIME_HEADS, time_cells(results)))
        console.print(table("What is shared out, and what a step takes", SHARE_HEADS, share_cells(results)))
        save_timeline(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
