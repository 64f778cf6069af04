"""Bytes that each rank holds of weights, gradients, momentum and curvature, counted from a model's shapes.

float32, natural or polar mode (adam mode has a second moment besides), without activations and without the whole
weights of the layer at hand, which FSDP2 gathers for a moment.

    python -m benchmarks.communication.memory    # the table of docs/scaling.md
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from benchmarks.common.tables import markdown_table
from benchmarks.communication.messages import Counting, curvature_of
from examples.char_gpt import CharGPT
from lightning_thor import Curvature
from lightning_thor.distributed.shared_directions import SharedDirections

RANKS = (8, 64, 256, 1024)
TENSORS = 3
"""Of each weight's size: the weight, its gradient, its momentum."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2 small": lambda: CharGPT(vocab_size=50257, context=1024, width=768, layers=12, heads=12),
    "1.3B": lambda: CharGPT(vocab_size=50257, context=2048, width=2048, layers=24, heads=16),
    "7B": lambda: CharGPT(vocab_size=50257, context=2048, width=4096, layers=32, heads=32),
}
HEADS = ("model", "way", *(f"{n} ranks, GB" for n in RANKS), f"curvature of that at {RANKS[1]}, GB")


class Held(NamedTuple):
    """The most bytes that a rank holds: of weights the first one, of curvature the one with the most inverses."""

    weights: int
    curvature: int

    @property
    def total(self) -> int:
        """With gradients and momentum."""
        return TENSORS * self.weights + self.curvature


def held(curvature: Curvature, *, shards: int = 1, width: int = 1, n_rows: int = 1) -> Held:
    """Count what a rank holds.

    Args:
        curvature: of the model; its windows and averages are whole on each rank.
        shards: ranks over which FSDP2 shards a replica's weights, by rows.
        width: ranks of tensor parallelism, which share the matrices.
        n_rows: groups of ranks that store the inverses of different layers: ranks over ``inverse_workers``.
    """
    weights = 0
    for p in curvature.model.parameters():
        rows = -(-p.shape[0] // (width if p.dim() > 1 else 1))
        weights += -(-rows // shards) * p.shape[1:].numel() * p.element_size()
    products = len(curvature.factors.decomposition.products)
    shared = SharedDirections(Counting(n_rows), curvature.layers, products=products, polar=curvature.polar_layers)
    inverses = [0] * n_rows
    for layer, row in shared.group_of.items():
        inverses[row] += curvature.factors.layout.numel(layer) * curvature.factors.flat_sums.element_size()
    return Held(weights, sum(map(curvature.n_bytes, curvature.layers)) - sum(inverses) + max(inverses))


WAYS: dict[str, Callable[[Curvature, int], Held]] = {
    "`thor_ddp`": lambda curvature, n: held(curvature),
    "`thor_ddp`, `inverse_workers=1`": lambda curvature, n: held(curvature, n_rows=n),
    "`thor_fsdp2`": lambda curvature, n: held(curvature, shards=n),
    "`thor_fsdp2`, `inverse_workers=n/8`": lambda curvature, n: held(curvature, shards=n, n_rows=8),
    "`thor_fsdp2`, `inverse_workers=1`": lambda curvature, n: held(curvature, shards=n, n_rows=n),
    "`thor_fsdp2`, `replicas=n/8`": lambda curvature, n: held(curvature, shards=8),
    "the same, `inverse_workers=n/8`": lambda curvature, n: held(curvature, shards=8, n_rows=8),
    "`thor_fsdp2`, `tensor_parallel_size=8`": lambda curvature, n: held(curvature, shards=n // 8, width=8),
    "the same, `inverse_workers=8`": lambda curvature, n: held(curvature, shards=n // 8, width=8, n_rows=n // 8),
}


def rows() -> Iterator[tuple[str, ...]]:
    """Of the table, under ``HEADS``."""
    for name, model in MODELS.items():
        curvature = curvature_of(model)
        for way, held_by in WAYS.items():
            found = [held_by(curvature, n) for n in RANKS]
            yield name, way, *(_gb(one.total) for one in found), _gb(found[1].curvature)


def _gb(n_bytes: int) -> str:
    """Two significant digits below 10 GB.

    >>> _gb(1_234_000_000), _gb(56_700_000_000), _gb(45_600_000)
    ('1.2', '57', '0.046')
    """
    gigabytes = n_bytes / 1e9
    digits = max(0, 1 - math.floor(math.log10(gigabytes))) if gigabytes > 0 else 0
    return f"{gigabytes:.{digits}f}"


def markdown() -> str:
    """The table of docs/scaling.md."""
    return markdown_table(HEADS, list(rows()), words=2)


if __name__ == "__main__":
    print(markdown())
