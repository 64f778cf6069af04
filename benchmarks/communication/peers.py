"""Bytes that each rank holds and sends in a step of data-parallel training: THOR's, and by the formulas of others.

Counted from a model's shapes, in float32. Held: weights, gradients and the optimizer's state, the mean over ranks,
without activations and buffers of messages. Sent: what the optimizer adds to the all-reduce of the gradients, the mean
over steps.

    python -m benchmarks.communication.peers    # the JSON file, and the table of docs/scaling.md
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from benchmarks.common.environment import RESULTS
from benchmarks.common.tables import markdown_table
from benchmarks.communication import memory
from benchmarks.communication.messages import WAYS, count_messages, curvature_of
from benchmarks.communication.scaling import BYTES, widths
from lightning_thor import Curvature
from lightning_thor.layers.discovery import matrix_layers

RANKS = (8, 64, 1024)
MODELS = ("1.3B", "7B")
SIZE = 4
"""Bytes of a number."""
REFRESH, FACTORS, EIGENVECTORS = 10, 10, 100
"""Steps from one refresh of THOR to the next; and of kfac-pytorch's factors and eigenvectors."""
SHAMPOO_BLOCK = 1024
"""Distributed Shampoo's default ``max_preconditioner_dim``."""
HEADS = ("model", "way", *(f"held at {n}, GB" for n in RANKS), *(f"sent at {n}, MB a step" for n in RANKS))


class Bytes(NamedTuple):
    """Of a rank."""

    held: float
    sent: float


def n_weights(curvature: Curvature) -> int:
    """Number of the model's weights."""
    return sum(p.numel() for p in curvature.model.parameters())


def hidden_widths(curvature: Curvature) -> list[tuple[int, int]]:
    """Widths of A and G of the linear layers but the last."""
    return [widths(curvature.layers[name]) for name in matrix_layers(curvature.model)[:-1]]


def adamw(curvature: Curvature, n_ranks: int) -> Bytes:
    """Weights, gradients and two moments."""
    return Bytes(4 * SIZE * n_weights(curvature), 0.0)


def thor_ddp(curvature: Curvature, n_ranks: int) -> Bytes:
    """Triangles of the factors' blocks are reduced, triangles of their inverses gathered."""
    counted = count_messages(curvature, WAYS["buckets"], n_ranks)
    sent = sum(getattr(BYTES, kind)(n, n_ranks) for kind, n in counted["factors"] + counted["inverses"])
    return Bytes(memory.held(curvature).total, sent / REFRESH)


def kfac(curvature: Curvature, n_ranks: int, workers: Callable[[int], int]) -> Bytes:
    """kfac-pytorch (KAISA: Pauloski et al. 2021, arXiv:2107.01739, section 3), on linear layers but the last.

    Whole factors on each rank, reduced as triangles. ``workers(n_ranks)`` ranks hold the eigenvectors and eigenvalues
    of a layer, which one of them broadcasts; they compute its direction and broadcast it to the others in each step.
    """
    some = workers(n_ranks)
    others = n_ranks // some
    held, sent = 3.0 * SIZE * n_weights(curvature), 0.0
    for a, g in hidden_widths(curvature):
        factors = SIZE * (a * a + g * g)
        eigen = factors + SIZE * (a + g)
        held += factors + eigen * some / n_ranks
        sent += BYTES.all_reduce(SIZE * (a * (a + 1) + g * (g + 1)) / 2, n_ranks) / FACTORS
        # Of a broadcast each rank but one receives all, so the mean rank sends that much: as a ring does.
        sent += (1 - 1 / some) * eigen / EIGENVECTORS
        sent += (1 - 1 / others) * SIZE * a * g
    return Bytes(held, sent)


def muon(curvature: Curvature, n_ranks: int) -> Bytes:
    """Muon's own distribution (Jordan et al. 2024, ``MuonWithAuxAdam``): a hidden matrix has its momentum and its step
    on one rank, and the new weights are gathered; Adam on every rank for all others."""
    hidden = sum(a * g for a, g in hidden_widths(curvature))
    held = SIZE * (2 * n_weights(curvature) + hidden / n_ranks + 2 * (n_weights(curvature) - hidden))
    return Bytes(held, BYTES.all_gather(SIZE * hidden / n_ranks, n_ranks))


def shampoo(curvature: Curvature, n_ranks: int) -> Bytes:
    """Distributed Shampoo with DDP (Shi et al. 2023, arXiv:2309.06497, section 4): blocks of a tensor are shared out to
    ranks with all of their state (two factors, two roots, filtered gradient, Adam's second moment for grafting), and
    all updates are gathered in each step."""
    state = 0
    for p in curvature.model.parameters():
        for sides in product(*(pieces(width) for width in p.shape)):
            state += 2 * sum(side * side for side in sides)
    n = n_weights(curvature)
    return Bytes(SIZE * (2 * n + (state + 2 * n) / n_ranks), BYTES.all_gather(SIZE * n / n_ranks, n_ranks))


def pieces(width: int) -> Iterator[int]:
    """Sides of the blocks of a dimension.

    >>> list(pieces(2500))
    [1024, 1024, 452]
    """
    for start in range(0, width, SHAMPOO_BLOCK):
        yield min(SHAMPOO_BLOCK, width - start)


COMPARED: dict[str, Callable[[Curvature, int], Bytes]] = {
    "AdamW": adamw,
    "THOR, `thor_ddp`": thor_ddp,
    "kfac-pytorch, COMM-OPT": partial(kfac, workers=lambda n: n),
    "kfac-pytorch, HYBRID ½": partial(kfac, workers=lambda n: n // 2),
    "kfac-pytorch, MEM-OPT": partial(kfac, workers=lambda n: 1),
    "Muon": muon,
    "Distributed Shampoo": shampoo,
}


def counted(model: Callable[[], nn.Module]) -> dict[str, Any]:
    """By way and number of ranks: what each rank holds and sends."""
    curvature = curvature_of(model)
    return {way: {str(n): of(curvature, n)._asdict() for n in RANKS} for way, of in COMPARED.items()}


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/scaling.md."""
    rows = [
        (
            model,
            way,
            *(f"{one['held'] / 1e9:.1f}" for one in by_ranks.values()),
            *(f"{one['sent'] / 1e6:,.0f}" for one in by_ranks.values()),
        )
        for model, ways in results.items()
        for way, by_ranks in ways.items()
    ]
    return markdown_table(HEADS, rows, words=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling_peers.json")
    args = parser.parse_args(arguments)
    results = {name: counted(memory.MODELS[name]) for name in MODELS}
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
