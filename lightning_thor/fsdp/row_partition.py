"""Which rank computes which rows of a sharded model's directions, and which rows ranks exchange for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_thor.distributed.assignment import assign_greedily, product_cost, sign_cost
from lightning_thor.layers.base import Layer
from lightning_thor.linalg.block_diagonal import BlockPartition
from lightning_thor.preconditioning.grouping import FactorPair


class RowBlocks(NamedTuple):
    """A layer, or one parameter of a norm, whose rows form blocks: a block's direction is computed at once.

    Rows are slices along the parameters' first dimension, counted from the layer's own first row.
    """

    layer: Layer
    pair: FactorPair
    """Its stored blocks."""
    side: str | None
    """The factor along the rows, ``"A"`` or ``"G"``, whose blocks these are; None: all rows are one block."""
    n_rows: int
    coordinates: int = 1
    """Coordinates of that factor in one row: more than one where a norm's scale has several dimensions."""
    is_polar: bool = False
    """Whether its direction is polar; then all rows are one block."""

    @property
    def blocks(self) -> BlockPartition | None:
        """The blocks of the factor along the rows."""
        return self.layer.A if self.side == "A" else self.layer.G if self.side == "G" else None

    @property
    def rows_per_block(self) -> int:
        """Rows in a block; where the factor has several groups, rows in a group."""
        blocks = self.blocks
        if blocks is None:
            return self.n_rows
        return max(1, (blocks.size if blocks.groups == 1 else blocks.width) // self.coordinates)

    def cost(self, n_rows: int) -> float:
        """Multiplications that the direction of ``n_rows`` rows takes, about."""
        factors = self.layer.A, self.layer.G
        if self.is_polar:
            return 2 * product_cost(factors) + sign_cost(factors)
        return n_rows * (product_cost(factors) / self.n_rows)

    def param_rows(self, parameter: nn.Parameter, start: int, stop: int) -> tuple[int, int]:
        """Rows ``start`` to ``stop`` of the layer as first row and end in its ``parameter``."""
        if self.layer.param_slice is not None:
            return self.layer.param_slice.start + start, self.layer.param_slice.start + stop
        # The bias of a weight [in, out] of one block has another number of rows: its own.
        return (0, parameter.shape[0]) if self.side is None else (start, stop)

    def borders(self, held: int) -> list[int]:
        """Rows, from 0 to ``n_rows``, at which the layer is cut into ranges: the borders of blocks that are nearest to
        borders of shards, which have ``held`` rows of the parameter each.

        >>> from lightning_thor.layers.discovery import discover_layers
        >>> layers, _ = discover_layers(nn.Linear(2, 12, bias=False), block_size=4, precondition_bias=False)
        >>> [one] = row_blocks_of(layers[""], (None, torch.empty(1, 3, 4, 4)))
        >>> one.borders(6), one.borders(3), one.borders(4)
        ([0, 4, 8, 12], [0, 4, 8, 12], [0, 4, 8, 12])
        """
        first_row = 0 if self.layer.param_slice is None else self.layer.param_slice.start
        first_border, size = held - first_row % held, self.rows_per_block
        borders = {0, self.n_rows}
        for border in range(first_border, self.n_rows, held):
            below = border // size * size
            borders |= {below, below if below == border else min(below + size, self.n_rows)}
        return sorted(borders)


def row_blocks_of(layer: Layer, pair: FactorPair, *, is_polar: bool = False) -> Iterator[RowBlocks]:
    """Find the blocks of rows in the direction of a layer, or of each parameter of a norm.

    In the natural direction ``G⁻¹ grad A⁻¹`` the factor along the rows is block-diagonal, and the other one acts within
    each row. A norm's direction is a division, so its scale and its shift are apart too.

    Args:
        layer: one with curvature.
        pair: its stored blocks.
        is_polar: whether its direction is polar.
    """
    if layer.A is not None:
        part, weight = layer.param_slice, layer.parameters[0]
        is_one_block = is_polar or (layer.kind.row_factor == "A" and layer.with_bias)
        n_rows = weight.shape[0] if part is None else part.stop - part.start
        yield RowBlocks(layer, pair, None if is_one_block else layer.kind.row_factor, n_rows, is_polar=is_polar)
        return
    start, (_, G) = 0, pair
    for p in layer.parameters:
        n = p.numel()
        own = replace(layer, parameters=(p,), G=layer.G._replace(width=n, n_blocks=n))
        yield RowBlocks(own, (None, G[:, start : start + n]), "G", p.shape[0], n // p.shape[0])
        start += n


def layer_of_rows(row_blocks: RowBlocks, start: int, stop: int) -> tuple[Layer, FactorPair]:
    """Rows ``start`` to ``stop`` of ``row_blocks``, which are borders of blocks, as a layer and its stored blocks.

    The layer's parameters are placeholders: new, without storage, in the shape of the rows. The blocks are views.
    """
    layer, (A_stored, G_stored), blocks = row_blocks.layer, row_blocks.pair, row_blocks.blocks
    A, G = layer.A, layer.G
    if blocks is not None:
        width = (stop - start) * row_blocks.coordinates
        first, last = start * row_blocks.coordinates, stop * row_blocks.coordinates
        places = slice(first // row_blocks.rows_per_block, -(-last // row_blocks.rows_per_block))
        # Groups of a convolution have an A and a G each; the parts of a fused linear layer share their A.
        if row_blocks.side == "G" or G.groups == blocks.groups > 1:
            G, G_stored = _some_of(G, G_stored, places, width)
        if A is not None and A_stored is not None and (row_blocks.side == "A" or A.groups == blocks.groups > 1):
            A, A_stored = _some_of(A, A_stored, places, width)
    placeholders = []
    for p in layer.parameters:
        first, last = row_blocks.param_rows(p, start, stop)
        rows = torch.empty((last - first, *p.shape[1:]), dtype=p.dtype, device="meta")
        placeholders.append(nn.Parameter(rows, requires_grad=False))
    use = replace(layer.uses[0], param_slice=None)
    return replace(layer, uses=(use,), parameters=tuple(placeholders), A=A, G=G), (A_stored, G_stored)


def _some_of(blocks: BlockPartition, stored: Tensor, places: slice, width: int) -> tuple[BlockPartition, Tensor]:
    """Some groups of a factor, or some blocks of its only group; a view."""
    n = places.stop - places.start
    if blocks.groups > 1:
        return blocks._replace(groups=n), stored[places]
    return blocks._replace(width=width, n_blocks=n), stored[:, places]


class RowRange(NamedTuple):
    """Rows of a layer whose direction one rank computes."""

    row_blocks: RowBlocks
    start: int
    stop: int
    owner: int
    """The rank that computes it."""
    layer: Layer
    """These rows alone, see `layer_of_rows`."""
    pair: FactorPair
    """The stored blocks of ``layer``."""


class RowTransfer(NamedTuple):
    """Rows of a parameter in one rank's shard that go to the range of another rank, or are in one of the same rank."""

    parameter: nn.Parameter
    placeholder: nn.Parameter
    """The parameter's rows in the range, see `layer_of_rows`."""
    range_rows: slice
    """In ``placeholder``, whose direction ``owner`` computes."""
    shard_rows: slice
    """In the shard of ``parameter`` that ``holder`` has."""
    holder: int
    owner: int

    @property
    def numel(self) -> int:
        """Numbers in these rows."""
        n_rows: int = self.shard_rows.stop - self.shard_rows.start
        return n_rows * (self.parameter.numel() // self.parameter.shape[0])


def rows_per_rank(n_rows: int, world_size: int) -> int:
    """Rows in each rank's shard of a parameter of ``n_rows``; the last ranks have fewer or none (`torch.chunk`)."""
    return -(-n_rows // world_size)


def assign_rows(layers: Sequence[RowBlocks], world_size: int) -> list[RowRange]:
    """Assign the rows of all layers to ranks; the same on all ranks.

    A block goes to the rank that holds most of its rows, and of several such ranks to the one with the least load so
    far. Layers of one block come last and go, the most expensive first, to the rank with the least load.

    Args:
        layers: all whose directions are computed.
        world_size: number of ranks.

    Returns:
        Ranges of all rows; neighbours have different owners.
    """
    ranges: list[tuple[RowBlocks, int, int]] = []
    candidates: list[list[int]] = []
    for row_blocks in layers:
        if row_blocks.side is None:
            continue
        weight = row_blocks.layer.parameters[0]
        held = rows_per_rank(weight.shape[0], world_size)
        for start, stop in pairwise(row_blocks.borders(held)):
            shards = _by_holder(*row_blocks.param_rows(weight, start, stop), held)
            most = max(rows.stop - rows.start for _, rows, _ in shards)
            ranges.append((row_blocks, start, stop))
            candidates.append([holder for holder, rows, _ in shards if rows.stop - rows.start == most])
    whole = [row_blocks for row_blocks in layers if row_blocks.side is None]
    ranges += [(one, 0, one.n_rows) for one in sorted(whole, key=lambda one: -one.cost(one.n_rows))]
    costs = [row_blocks.cost(stop - start) for row_blocks, start, stop in ranges]
    owners = assign_greedily(costs, world_size, allowed=candidates)
    joined: list[tuple[RowBlocks, int, int, int]] = []
    for (row_blocks, start, stop), owner in zip(ranges, owners, strict=True):
        if joined and joined[-1][0] is row_blocks and joined[-1][3] == owner:
            start = joined.pop()[1]
        joined.append((row_blocks, start, stop, owner))
    return [RowRange(*one, *layer_of_rows(*one[:3])) for one in joined]


def row_transfers(ranges: Sequence[RowRange], world_size: int) -> list[RowTransfer]:
    """The rows that each of all ``ranges`` needs from each of ``world_size`` ranks, in the order of ranges, parameters
    and rows."""
    return [
        RowTransfer(p, placeholder, range_rows, shard_rows, holder, one.owner)
        for one in ranges
        for p, placeholder in zip(one.row_blocks.layer.parameters, one.layer.parameters, strict=True)
        for holder, range_rows, shard_rows in _by_holder(
            *one.row_blocks.param_rows(p, one.start, one.stop), rows_per_rank(p.shape[0], world_size)
        )
    ]


def _by_holder(start: int, stop: int, held: int) -> list[tuple[int, slice, slice]]:
    """Split rows of a parameter by the rank that holds them, at most ``held`` each: the rank, and where its rows are
    counted from ``start`` and in its shard."""
    found = []
    for rank in range(start // held, (stop - 1) // held + 1):
        first, last = max(start, rank * held), min(stop, (rank + 1) * held)
        found.append((rank, slice(first - start, last - start), slice(first - rank * held, last - rank * held)))
    return found
