"""Messages of a refresh: collectives, bytes, the share of them that backward hides, and shared inversions.

Collectives and bytes follow from a model's shapes, so they are counted without other processes and hold on any machine.
Times are measured on real processes over gloo, all on this machine: each rank is one process with one thread.

    python -m benchmarks.communication                      # counts alone
    python -m benchmarks.communication --measure 1 2 4      # and times with 1, 2 and 4 ranks
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.environment import RESULTS, environment
from benchmarks.common.tables import rich_table
from benchmarks.communication import figures
from benchmarks.communication.inversion_times import share_ms
from benchmarks.communication.messages import WAYS, count_messages, curvature_of
from benchmarks.communication.rank_times import measure
from benchmarks.communication.workloads import WORKLOADS

COUNTED_RANKS = (2, 4, 8, 64)
INVERTING_RANKS = (1, 2, 4)
INVERTING_ROUNDS = 15


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, measure if asked to, write the JSON file and the picture beside it, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workload", choices=WORKLOADS, nargs="+", default=[name for name in WORKLOADS if name != "tiny"]
    )
    parser.add_argument("--measure", type=int, nargs="+", default=[], metavar="RANKS", help="time so many processes")
    parser.add_argument("--rounds", type=int, default=10, help="timed refreshes of each way")
    parser.add_argument("--out", type=Path, default=RESULTS / "communication.json")
    args = parser.parse_args(arguments)
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    for name in args.workload:
        result: dict[str, Any] = results.setdefault(name, {})
        result["words"] = WORKLOADS[name].words
        curvature = curvature_of(WORKLOADS[name].model)
        result["counts"] = {
            way: {str(n): count_messages(curvature, one, n) for n in COUNTED_RANKS} for way, one in WAYS.items()
        }
        if args.measure:
            result["environment"] = environment(torch.device("cpu"))
            result["inverting"] = share_ms(curvature, INVERTING_RANKS, INVERTING_ROUNDS)
            result["times"] = {str(n): measure(name, n, args.rounds) for n in args.measure}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Print what a reader of the file sees: lists for tuples.
    text = json.dumps(results, ensure_ascii=False)
    results = json.loads(text)
    args.out.write_text(text + "\n", encoding="utf-8")
    console = Console()
    title = "A refresh of all layers: messages of each rank"
    console.print(rich_table(title, figures.COUNT_HEADS, figures.count_cells(results), words=2))
    if any("times" in result for result in results.values()):
        title = "A refresh of all layers: times"
        console.print(rich_table(title, figures.TIME_HEADS, figures.time_cells(results), words=2))
        title = "Shared inversions, and the cost of a step"
        console.print(rich_table(title, figures.SHARE_HEADS, figures.share_cells(results), words=2))
        figures.save_timeline(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
