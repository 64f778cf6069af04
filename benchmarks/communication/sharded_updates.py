"""Bytes that a step of a sharded model (thor_fsdp2) sends between gradients and directions, against gathering all.

Bytes and work follow from a model's shapes, so they are counted without other processes and hold on any machine.
"All gathered" is ``full_tensor()``: each rank gathers all gradients and computes all directions.

    python -m benchmarks.communication.sharded_updates    # the JSON file, and the table of docs/scaling.md
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common.environment import RESULTS
from benchmarks.common.tables import markdown_table
from benchmarks.communication.messages import Counting, curvature_of
from benchmarks.communication.scaling import MODELS
from lightning_thor import Curvature
from lightning_thor.distributed.communicator import SingleProcess, WorkerGrid
from lightning_thor.distributed.dtensor import Box
from lightning_thor.fsdp.box_partition import assign_parts, transfers_of
from lightning_thor.fsdp.sharded_curvature import layer_blocks_of_layers

RANKS = (2, 4, 8, 64)
MODES = ("natural", "polar")
FEW = "natural, `inverse_workers=n/8`"
"""At least 1."""
HEADS = (
    *("model", "mode", "ranks", "all gathered, MB", "sent, MB", "of that", "busiest, MB"),
    *("at once, MB", "its work, %"),
)


def row_shards(n_rows: int, world_size: int, n_columns: int = 1) -> dict[int, Box]:
    """The boxes of a parameter that is sharded along its first dimension over all ranks, as ``fully_shard`` does: the
    last ranks have fewer rows or none (`torch.chunk`)."""
    held = -(-n_rows // world_size)
    starts = [min(rank * held, n_rows) for rank in range(world_size + 1)]
    return {rank: Box(slice(*ends), slice(0, n_columns)) for rank, ends in enumerate(pairwise(starts))}


def counted(curvature: Curvature, n_ranks: int, inverse_workers: int | None = None) -> dict[str, float]:
    """Count the bytes that each of ``n_ranks`` sends in a step, and the work of the busiest.

    Rows of gradients go to the rank that computes their direction, and the directions go back; gathering sends each
    rank's shard to all others (rings), and each rank then does all of the work.

    Args:
        curvature: of the model; connected anew.
        n_ranks: number of ranks.
        inverse_workers: ranks that store a layer's inverses; None: all.

    Returns:
        ``"gathered"``, ``"sent"`` (mean over ranks) and ``"busiest"``: bytes; ``"at_once"``: bytes of all gradients
        whose directions one rank computes, the most of any; ``"work"``: the busiest rank's share.
    """
    n_rows = n_ranks // (inverse_workers or n_ranks)
    columns = [list(range(first, first + n_rows)) for first in range(0, n_ranks, n_rows)]
    curvature.connect(SingleProcess(), worker_grid=WorkerGrid(SingleProcess(), Counting(n_rows), columns))
    # Only the package's own plan knows which rows go where: it offers no count of them.
    everything = {p for layer in curvature.layers.values() for p in layer.parameters}
    boxes = {p: row_shards(p.shape[0], n_ranks, p.shape[1] if p.dim() > 1 else 1) for p in everything}
    parts = assign_parts(layer_blocks_of_layers(curvature, everything, is_polar=curvature.mode == "polar"), boxes)
    sent, work, own = [0.0] * n_ranks, [0.0] * n_ranks, [0.0] * n_ranks
    for one in parts:
        work[one.owner] += one.layer_blocks.cost(one.box)
        own[one.owner] += sum(p.numel() * p.element_size() for p in one.layer.parameters)
    for transfer in transfers_of(parts, boxes):
        if transfer.holder != transfer.owner:
            for rank in (transfer.holder, transfer.owner):
                sent[rank] += transfer.numel * transfer.parameter.element_size()
    n_bytes = sum(p.numel() * p.element_size() for p in everything)
    return {
        "gathered": n_bytes * (n_ranks - 1) / n_ranks,
        "sent": statistics.fmean(sent),
        "busiest": max(sent),
        "at_once": max(own),
        "work": max(work) / sum(work),
    }


def cells(results: dict[str, Any]) -> list[list[str]]:
    """Rows under ``HEADS``."""
    return [
        [
            model,
            mode,
            n_ranks,
            f"{one['gathered'] / 1e6:.0f}",
            f"{one['sent'] / 1e6:.1f}",
            f"{one['sent'] / one['gathered']:.0%}",
            f"{one['busiest'] / 1e6:.1f}",
            f"{one['at_once'] / 1e6:.1f}",
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
    args = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for name in args.models:
        curvatures = {mode: curvature_of(MODELS[name], mode=mode) for mode in MODES}
        results[name] = {mode: {str(n): counted(one, n) for n in RANKS} for mode, one in curvatures.items()}
        results[name][FEW] = {str(n): counted(curvatures["natural"], n, max(1, n // 8)) for n in RANKS}
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
