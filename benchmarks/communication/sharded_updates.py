"""What a step of a sharded model (thor_fsdp2) sends from gradients to directions, against gathering all gradients.

Bytes and work follow from the shapes of a model, so they are counted without other processes and hold on any machine.
"All gathered" is ``full_tensor()``: each rank gathers all gradients and computes all directions.

    python -m benchmarks.communication.sharded_updates    # the JSON file, and the table of docs/scaling.md
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.environment import RESULTS
from benchmarks.communication.scaling import MODELS
from benchmarks.readme import markdown_table
from lightning_thor import Curvature
from lightning_thor.fsdp.row_partition import assign_rows, row_transfers
from lightning_thor.fsdp.sharded_curvature import row_blocks_of_layers

RANKS = (2, 4, 8, 64)
MODES = ("natural", "polar")
HEADS = ("model", "mode", "ranks", "all gathered, MB", "sent, MB", "of that", "busiest, MB", "its work, %")


def counted(curvature: Curvature, n_ranks: int) -> dict[str, float]:
    """What each rank sends in a step, in bytes, and how much of all work the busiest has.

    Rows go to the rank that computes their direction, and the directions back; gathering sends each rank's shard to all
    others (rings), and leaves all of the work to all.
    """
    everything = {p for layer in curvature.layers.values() for p in layer.parameters}
    ranges = assign_rows(row_blocks_of_layers(curvature, everything, is_polar=curvature.mode == "polar"), n_ranks)
    sent, work = [0.0] * n_ranks, [0.0] * n_ranks
    for one in ranges:
        work[one.owner] += one.row_blocks.cost(one.stop - one.start)
    for transfer in row_transfers(ranges, n_ranks):
        if transfer.holder != transfer.owner:
            for rank in (transfer.holder, transfer.owner):
                sent[rank] += transfer.numel * transfer.parameter.element_size()
    n_bytes = sum(p.numel() * p.element_size() for p in everything)
    return {
        "gathered": n_bytes * (n_ranks - 1) / n_ranks,
        "sent": statistics.fmean(sent),
        "busiest": max(sent),
        "work": max(work) / sum(work),
    }


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The rows of the table."""
    return [
        [
            model,
            mode,
            n_ranks,
            f"{one['gathered'] / 1e6:.0f}",
            f"{one['sent'] / 1e6:.1f}",
            f"{one['sent'] / one['gathered']:.0%}",
            f"{one['busiest'] / 1e6:.1f}",
            f"{one['work']:.1%}".removesuffix("%"),
        ]
        for model, modes in results.items()
        for mode, by_ranks in modes.items()
        for n_ranks, one in by_ranks.items()
    ]


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/scaling.md."""
    return markdown_table(HEADS, cells(results), words=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "sharded_updates.json")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for name in options.models:
        model = MODELS[name]()
        curvatures = {mode: Curvature(model, mode=mode) for mode in MODES}
        results[name] = {mode: {str(n): counted(one, n) for n in RANKS} for mode, one in curvatures.items()}
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
