"""Which rank computes which part of a sharded model's directions, and what ranks exchange for it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_thor.distributed.assignment import assign_greedily, product_cost, sign_cost
from lightning_thor.distributed.dtensor import Box, Boxes
from lightning_thor.layers.base import Layer
from lightning_thor.layers.discovery import name_some
from lightning_thor.linalg.block_diagonal import BlockPartition
from lightning_thor.preconditioning.grouping import FactorPair

BoxesOf = Mapping[nn.Parameter, Boxes]


class LayerBlocks(NamedTuple):
    """A layer, or one parameter of a norm, cut into boxes of whole blocks: a box's direction is computed at once.

    Rows are slices along the parameters' first dimension, counted from the layer's own first row, and columns along
    their second one.
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
    """Whether its direction is polar; then all of it is one block."""
    workers: Mapping[int, int] = {}
    """By a rank that holds a part of it, the rank that computes that part's direction; if not there, it does itself."""

    @property
    def blocks(self) -> BlockPartition | None:
        """The blocks of the factor along the rows."""
        return self.layer.A if self.side == "A" else self.layer.G if self.side == "G" else None

    @property
    def column_blocks(self) -> BlockPartition | None:
        """The blocks of the factor along the columns; None where columns must stay together."""
        across = self.layer.G if self.side == "A" else self.layer.A
        is_cut = self.side is not None and self.layer.parameters[0].dim() == 2 and not self.layer.with_bias
        return across if is_cut and across is not None and across.groups == 1 else None

    @property
    def rows_per_block(self) -> int:
        """Rows in a block; where the factor has several groups, rows in a group."""
        blocks = self.blocks
        if blocks is None:
            return self.n_rows
        return max(1, (blocks.size if blocks.groups == 1 else blocks.width) // self.coordinates)

    @property
    def whole(self) -> Box:
        """All rows and columns."""
        shape = self.layer.parameters[0].shape
        return Box(slice(0, self.n_rows), slice(0, shape[1] if len(shape) > 1 else 1))

    def cost(self, box: Box) -> float:
        """Multiplications that the direction of a box takes, about."""
        factors = self.layer.A, self.layer.G
        if self.is_polar:
            return 2 * product_cost(factors) + sign_cost(factors)
        return product_cost(factors) * box.area / self.whole.area

    def in_parameter(self, box: Box, parameter: nn.Parameter) -> Box:
        """A box of the layer as one of its ``parameter``."""
        columns = box.columns if parameter.dim() > 1 else slice(0, 1)
        part = self.layer.param_slice
        if part is not None:
            return Box(slice(part.start + box.rows.start, part.start + box.rows.stop), columns)
        # The bias of a weight [in, out] of one block has another number of rows: its own.
        return Box(slice(0, parameter.shape[0]) if self.side is None else box.rows, columns)

    def boxes(self, shards: Boxes) -> Iterator[Box]:
        """Cut the layer at the borders of blocks that are nearest to the borders of shards, column by column.

        >>> from lightning_thor.layers.discovery import discover_layers
        >>> layers, _ = discover_layers(nn.Linear(2, 12, bias=False), block_size=4, precondition_bias=False)
        >>> [one] = layer_blocks_of(layers[""], (None, torch.empty(1, 3, 4, 4)))
        >>> for held in (6, 3, 4):
        ...     shards = {first: Box(slice(first, first + held), slice(0, 1)) for first in range(0, 12, held)}
        ...     print([(box.rows.start, box.rows.stop) for box in one.boxes(shards)])
        [(0, 4), (4, 8), (8, 12)]
        [(0, 4), (4, 8), (8, 12)]
        [(0, 4), (4, 8), (8, 12)]
        """
        first_row = 0 if self.layer.param_slice is None else self.layer.param_slice.start
        rows, columns = {0, self.n_rows}, {0, self.whole.columns.stop}
        rows |= _borders([box.rows.start - first_row for box in shards.values()], self.n_rows, self.rows_per_block)
        across = self.column_blocks
        if across is not None:
            columns |= _borders([box.columns.start for box in shards.values()], across.width, across.size)
        for left, right in pairwise(sorted(columns)):
            for top, bottom in pairwise(sorted(rows)):
                yield Box(slice(top, bottom), slice(left, right))


def _borders(cuts: Sequence[int], n: int, size: int) -> set[int]:
    """The borders of blocks of a ``size`` next to ``cuts`` between 0 and ``n``."""
    borders = set()
    for cut in cuts:
        if 0 < cut < n:
            below = cut // size * size
            borders |= {below, below if below == cut else min(below + size, n)}
    return borders


def layer_blocks_of(
    layer: Layer, pair: FactorPair, *, is_polar: bool = False, workers: Mapping[int, int] = {}
) -> Iterator[LayerBlocks]:
    """Find the blocks in the direction of a layer, or of each parameter of a norm, as `LayerBlocks` of these arguments.

    In the natural direction ``G⁻¹ grad A⁻¹`` both factors are block-diagonal: a block of one times a block of the other
    is a box that needs no other. A norm's direction is a division, so its scale and its shift are apart too.
    """
    if layer.A is not None:
        part, weight = layer.param_slice, layer.parameters[0]
        is_one_block = is_polar or (layer.kind.row_factor == "A" and layer.with_bias)
        n_rows = weight.shape[0] if part is None else part.stop - part.start
        side = None if is_one_block else layer.kind.row_factor
        yield LayerBlocks(layer, pair, side, n_rows, is_polar=is_polar, workers=workers)
        return
    start, (_, G) = 0, pair
    for p in layer.parameters:
        n = p.numel()
        own = replace(layer, parameters=(p,), G=layer.G._replace(width=n, n_blocks=n))
        yield LayerBlocks(own, (None, G[:, start : start + n]), "G", p.shape[0], n // p.shape[0], workers=workers)
        start += n


def layer_of_box(layer_blocks: LayerBlocks, box: Box) -> tuple[Layer, FactorPair]:
    """A box, with borders of blocks, as a layer and its stored blocks.

    The layer's parameters are placeholders: new, without storage, in the shape of the box. The blocks are views.
    """
    layer, (A_stored, G_stored), blocks = layer_blocks.layer, layer_blocks.pair, layer_blocks.blocks
    A, G, across = layer.A, layer.G, layer_blocks.column_blocks
    if blocks is not None:
        first, last = (row * layer_blocks.coordinates for row in (box.rows.start, box.rows.stop))
        places = slice(first // layer_blocks.rows_per_block, -(-last // layer_blocks.rows_per_block))
        # Groups of a convolution have an A and a G each; the parts of a fused linear layer share their A.
        if layer_blocks.side == "G" or G.groups == blocks.groups > 1:
            G, G_stored = _some_of(G, G_stored, places, last - first)
        if A is not None and A_stored is not None and (layer_blocks.side == "A" or A.groups == blocks.groups > 1):
            A, A_stored = _some_of(A, A_stored, places, last - first)
    if across is not None and box.columns != layer_blocks.whole.columns:
        width = box.columns.stop - box.columns.start
        places = slice(box.columns.start // across.size, -(-box.columns.stop // across.size))
        if layer_blocks.side == "A":
            G, G_stored = _some_of(G, G_stored, places, width)
        elif A is not None and A_stored is not None:
            A, A_stored = _some_of(A, A_stored, places, width)
    placeholders = []
    for p in layer.parameters:
        rows, columns = layer_blocks.in_parameter(box, p)
        shape = rows.stop - rows.start, *((columns.stop - columns.start, *p.shape[2:]) if p.dim() > 1 else ())
        placeholders.append(nn.Parameter(torch.empty(shape, dtype=p.dtype, device="meta"), requires_grad=False))
    use = replace(layer.uses[0], param_slice=None)
    return replace(layer, uses=(use,), parameters=tuple(placeholders), A=A, G=G), (A_stored, G_stored)


def _some_of(blocks: BlockPartition, stored: Tensor, places: slice, width: int) -> tuple[BlockPartition, Tensor]:
    """Some groups of a factor, or some blocks of its only group; a view."""
    n = places.stop - places.start
    if blocks.groups > 1:
        return blocks._replace(groups=n), stored[places]
    return blocks._replace(width=width, n_blocks=n), stored[:, places]


class Part(NamedTuple):
    """A box of a layer whose direction one rank computes."""

    layer_blocks: LayerBlocks
    box: Box
    owner: int
    """The rank that computes it."""
    layer: Layer
    """This box alone, see `layer_of_box`."""
    pair: FactorPair
    """The stored blocks of ``layer``."""


class Transfer(NamedTuple):
    """A box of a parameter in one rank's shard that goes to the part of another rank, or is in one of the same rank."""

    parameter: nn.Parameter
    placeholder: nn.Parameter
    """The parameter's box in the part, see `layer_of_box`."""
    in_part: Box
    """In ``placeholder``, whose direction ``owner`` computes."""
    in_shard: Box
    """In the shard of ``parameter`` that ``holder`` has."""
    holder: int
    owner: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of these numbers."""
        rows, columns = ((side.stop - side.start) for side in self.in_shard)
        return (rows, columns, *self.parameter.shape[2:]) if self.parameter.dim() > 1 else (rows,)

    @property
    def numel(self) -> int:
        """Numbers in the box."""
        return torch.Size(self.shape).numel()


class ShardIndex:
    """Finds the shards of a parameter that a box overlaps without looking at all of them, which are many."""

    def __init__(self, shards: Boxes) -> None:
        self._shards = sorted(shards.items(), key=lambda one: one[1].rows.start)
        self._starts = [shard.rows.start for _, shard in self._shards]
        self._stops = list(accumulate((shard.rows.stop for _, shard in self._shards), max))

    def overlaps(self, box: Box) -> list[tuple[int, Box, Box]]:
        """Each rank that has something of ``box``, its shard, and what both have in common, in the order of ranks.

        >>> index = ShardIndex({rank: Box(slice(3 * rank, 3 * rank + 3), slice(0, 1)) for rank in range(3)})
        >>> [(rank, common.rows.start) for rank, _, common in index.overlaps(Box(slice(2, 4), slice(0, 1)))]
        [(0, 2), (1, 3)]
        """
        some = self._shards[bisect_right(self._stops, box.rows.start) : bisect_left(self._starts, box.rows.stop)]
        found = [(rank, shard, common) for rank, shard in some if (common := shard.overlap(box)) is not None]
        return sorted(found, key=lambda one: one[0])


def assign_parts(layers: Sequence[LayerBlocks], boxes: BoxesOf) -> list[Part]:
    """Assign all blocks to ranks; the same on all ranks.

    A block goes to the rank that holds most of it, or to the worker of that rank, and of several such ranks to the one
    with the least load so far. Layers of one block that one rank holds (an expert) stay there; the others come last and
    go, the most expensive first, to the rank with the least load among all, or among the workers.

    Args:
        layers: one or more, all whose directions are computed, with parameters that are sharded over the same ranks.
        boxes: of each of their parameters.

    Returns:
        Parts of all layers; neighbours in a column have different owners.

    Raises:
        ValueError: a layer's workers are not among the ranks that have its parameters.
    """
    ranks = list(boxes[layers[0].layer.parameters[0]])
    places = {rank: place for place, rank in enumerate(ranks)}

    def places_of(layer_blocks: LayerBlocks, holders: Iterable[int]) -> list[int]:
        """Of the ranks that may compute what ``holders`` hold."""
        found = {places.get(layer_blocks.workers.get(rank, rank)) for rank in holders}
        if None in found:
            raise ValueError(
                f"{layer_blocks.layer.name!r} is sharded over the ranks {name_some(list(map(str, ranks)))}, of which "
                "some would send their parts to others, who store its inverses: give inverse_workers=None; or, where "
                "these ranks are one of several replicas, ThorModelParallelStrategy(replicas=...)."
            )
        return sorted(place for place in found if place is not None)

    found: list[tuple[LayerBlocks, Box]] = []
    candidates: list[list[int]] = []
    indices = {p: ShardIndex(boxes[p]) for p in {one.layer.parameters[0] for one in layers}}
    for layer_blocks in layers:
        if layer_blocks.side is None:
            continue
        weight = layer_blocks.layer.parameters[0]
        shards = indices[weight]
        for box in layer_blocks.boxes(boxes[weight]):
            own = layer_blocks.in_parameter(box, weight)
            areas = {rank: common.area for rank, _, common in shards.overlaps(own)}
            most = max(areas.values())
            found.append((layer_blocks, box))
            candidates.append(places_of(layer_blocks, [rank for rank, area in areas.items() if area == most]))
    whole = [layer_blocks for layer_blocks in layers if layer_blocks.side is None]
    for layer_blocks in sorted(whole, key=lambda one: -one.cost(one.whole)):
        found.append((layer_blocks, layer_blocks.whole))
        weight = layer_blocks.layer.parameters[0]
        holders = [rank for rank, *_ in indices[weight].overlaps(layer_blocks.in_parameter(layer_blocks.whole, weight))]
        candidates.append(places_of(layer_blocks, holders if len(holders) == 1 else ranks))
    costs = [layer_blocks.cost(box) for layer_blocks, box in found]
    owners = assign_greedily(costs, len(ranks), allowed=candidates)
    joined: list[tuple[LayerBlocks, Box, int]] = []
    for (layer_blocks, box), owner in zip(found, owners, strict=True):
        if joined and joined[-1][0] is layer_blocks and joined[-1][2] == owner:
            above = joined[-1][1]
            if above.columns == box.columns:
                box = Box(slice(above.rows.start, box.rows.stop), box.columns)
                joined.pop()
        joined.append((layer_blocks, box, owner))
    return [Part(one, box, ranks[owner], *layer_of_box(one, box)) for one, box, owner in joined]


def transfers_of(parts: Sequence[Part], boxes: BoxesOf) -> list[Transfer]:
    """What each of all ``parts`` needs from each rank, in the order of parts, parameters and ranks."""
    found = []
    shards = {p: ShardIndex(boxes[p]) for p in {p for one in parts for p in one.layer_blocks.layer.parameters}}
    for one in parts:
        for p, placeholder in zip(one.layer_blocks.layer.parameters, one.layer.parameters, strict=True):
            own = one.layer_blocks.in_parameter(one.box, p)
            for holder, shard, common in shards[p].overlaps(own):
                in_part, in_shard = common.counted_from(own), common.counted_from(shard)
                found.append(Transfer(p, placeholder, in_part, in_shard, holder, one.owner))
    return found


def by_ranks(layers: Sequence[LayerBlocks], boxes: BoxesOf) -> list[list[LayerBlocks]]:
    """Group layers by the ranks that their parameters are sharded over.

    Raises:
        ValueError: a layer's weight and bias are on different ranks.
    """
    found: dict[tuple[int, ...], list[LayerBlocks]] = {}
    for one in layers:
        ranks: set[Any] = {tuple(boxes[p]) for p in one.layer.parameters}
        if len(ranks) > 1:
            raise ValueError(
                f"The weight of {one.layer.name!r} and its bias are on different ranks, as in a row-parallel layer: "
                "give ThorCallback or Curvature precondition_bias=False."
            )
        found.setdefault(ranks.pop(), []).append(one)
    return list(found.values())
