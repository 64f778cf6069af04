"""What a rank takes of a pair (a, g) whose features or rows tensor parallelism has shared out."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from lightning_thor.distributed.dtensor import is_sharded, local_parts
from lightning_thor.factors.state import FactorPart
from lightning_thor.layers.base import Layer
from lightning_thor.linalg.block_diagonal import BlockPartition


class LocalPair(NamedTuple):
    """What this rank adds to the factors of a layer; the sum over all ranks is the whole window."""

    a: Tensor
    g: Tensor
    layer: Layer
    """With the partitions of its share of A and G."""
    part: FactorPart | None = None
    """Its share of the blocks; None: of all."""
    n_same: int = 1
    """Ranks that see the same rows."""


def local_pair(layer: Layer, a: Tensor, g: Tensor) -> LocalPair:
    """Choose what a rank adds to the factors of a layer for which tensor parallelism made DTensors.

    Of a column-parallel layer A is whole on each rank and G is its own features', of a row-parallel layer the other way
    round: if the borders of blocks are borders of the shards, a rank takes the blocks of its own features, and nothing
    travels. Where sequence parallelism has shared out the rows, each rank takes its own. All else is gathered, and
    each rank takes the whole. The gradient is gathered too where rows without one are masked.

    What all n ranks take, rows and samples included, counts n times in the sum over ranks, numerators and denominators
    alike; so the blocks that one rank alone takes are multiplied by n.

    Args:
        layer: the one that was called.
        a: its input, a DTensor or the same on all ranks.
        g: the gradient of its output, likewise.
    """
    mesh = (a if is_sharded(a) else g).device_mesh  # type: ignore[attr-defined]
    dims = [_sharded_dim(x) for x in (a, g)]
    if mesh.ndim == 1 and isinstance(dims[0], int) and dims[0] == dims[1] and dims[0] < g.dim() - 1:
        a, g = local_parts((a, g))
        return LocalPair(a, g, layer)
    shares: list[_Share | None] = []
    # All features of a gradient say whether its row is masked.
    blocks_of_g = None if layer.masks_rows else layer.G
    for x, dim, blocks in zip((a, g), dims, (layer.A, blocks_of_g), strict=True):
        is_last = mesh.ndim == 1 and dim == x.dim() - 1
        shares.append(_share_of(layer, blocks, mesh.size(), mesh.get_local_rank()) if is_last else None)
    a, g = local_parts(
        x if dim is None or share is not None else x.full_tensor()  # type: ignore[attr-defined]
        for x, dim, share in zip((a, g), dims, shares, strict=True)
    )
    if shares == [None, None]:
        return LocalPair(a, g, layer, n_same=mesh.size())
    (A, places_A, scale_A), (G, places_G, scale_G) = (
        share or _Share(blocks, None, 1.0) for share, blocks in zip(shares, (layer.A, layer.G), strict=True)
    )
    assert G is not None
    part = FactorPart((A, G), (places_A, places_G), (scale_A, scale_G))
    return LocalPair(a, g, replace(layer, A=A, G=G), part, mesh.size())


class _Share(NamedTuple):
    """A rank's share of a factor."""

    blocks: BlockPartition | None
    places: slice | None
    scale: float
    """Of the rows."""


def _share_of(layer: Layer, blocks: BlockPartition | None, n: int, rank: int) -> _Share | None:
    """The blocks of this rank's features; None where a block is on two ranks, or a rank has none."""
    if blocks is None or not layer.kind.is_linear or layer.with_bias or layer.G.groups * blocks.groups > 1:
        return None
    held = -(-blocks.width // n)  # as `torch.chunk`
    borders = [min(k * held, blocks.width) for k in range(n + 1)]
    if any(border % blocks.size for border in borders[:-1]) or any(one == other for one, other in pairwise(borders)):
        return None
    start, stop = borders[rank : rank + 2]
    places = slice(start // blocks.size, -(-stop // blocks.size))
    own = blocks._replace(width=stop - start, n_blocks=places.stop - places.start)
    return _Share(own, places, math.sqrt(n))


def _sharded_dim(x: Tensor) -> int | str | None:
    """The dimension that a DTensor is sharded along over a mesh of one; None if it is the same on all ranks."""
    if not is_sharded(x):
        return None
    placements = x.placements  # type: ignore[attr-defined]
    if all(one.is_replicate() for one in placements):
        return None
    if len(placements) > 1 or type(placements[0]).__name__ != "Shard":
        return "other"
    dim: int = placements[0].dim
    return dim % x.dim()
