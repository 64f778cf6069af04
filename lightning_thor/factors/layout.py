"""Which blocks belong to which factor: all blocks of one size, of all layers, are consecutive in one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_thor.linalg.block_diagonal import BlockPartition
from lightning_thor.linalg.packing import packed_numel

Side = Literal["A", "G"]
SIDES: tuple[Side, ...] = get_args(Side)
"""In this order, the columns of every tensor ``[layers, 2]``."""
FactorShapes = tuple[BlockPartition | None, BlockPartition]
"""How A and G of a layer are partitioned; A is None where there is no input factor."""
Index = Tensor | slice
"""Some rows of a tensor; a slice wherever possible, since it copies nothing."""

MOST_INDICES = 256
"""Sets of layers whose index a layout remembers."""


class BlockIndex(NamedTuple):
    """Where some layers are in the tensors of a `FactorState`."""

    layers: Index
    """Their rows in tensors ``[layers, ...]``."""
    blocks: dict[int, Index]
    """By block size: their blocks."""
    stored: dict[int, tuple[Index, Index]]
    """By block size: the blocks whose inverses this process stores, and the rows of these inverses."""
    numbers: tuple[int, ...]
    """The layers, in order."""
    owners: Tensor
    """The factor of each of `blocks`, size after size, as a row of ``[layers, 2]`` flattened."""
    lengths: list[int]
    """How many of them have each size."""
    stored_owners: Tensor
    """The factor of each block of `stored`, likewise."""
    stored_lengths: list[int]
    """How many of them have each size."""
    rows: Index
    """The places of the blocks of `stored` among all whose inverses this process stores, size after size."""


class FactorLayout:
    """The order of blocks. Layers are numbered 0, 1, ...; a factor is ``(layer, "A" | "G")``.

    Args:
        shapes: of each layer.
        device: of index tensors.
    """

    def __init__(self, shapes: Sequence[FactorShapes], device: torch.device) -> None:
        self.shapes, self._device = shapes, device
        self._offsets: dict[tuple[int, Side], tuple[int, slice]] = {}
        self._stored: dict[tuple[int, Side], tuple[int, slice]] = {}
        self.n_blocks: dict[int, int] = {}
        """By block size."""
        owners: dict[int, list[int]] = {}
        # The factors of layers with equal shapes are adjacent, all A and then all G: a product takes them as one batch.
        first = {one: layer for layer, one in reversed(list(enumerate(shapes)))}
        factors = [(first[shapes[layer]], column, layer) for layer in range(len(shapes)) for column in (0, 1)]
        for _, column, layer in sorted(factors):
            partition = shapes[layer][column]
            if partition is not None:
                start = self.n_blocks.get(partition.size, 0)
                self.n_blocks[partition.size] = stop = start + _count(partition)
                self._offsets[layer, SIDES[column]] = partition.size, slice(start, stop)
                owners.setdefault(partition.size, []).extend([2 * layer + column] * (stop - start))
        self._owners = owners
        self.owners = {size: torch.tensor(numbers, device=device) for size, numbers in owners.items()}
        """By block size: the factor of each block, ``[n]``, as a row of ``[layers, 2]`` flattened."""
        self.set_inverse_owner(range(len(shapes)))

    def partition(self, layer: int, side: Side) -> BlockPartition:
        """The partition of a factor."""
        partition = self.shapes[layer][SIDES.index(side)]
        assert partition is not None, f"layer {layer} has no {side}"
        return partition

    def factors(self, layer: int) -> Iterator[tuple[Side, BlockPartition]]:
        """The factors that a layer has, with their partitions."""
        return ((side, one) for side, one in zip(SIDES, self.shapes[layer], strict=True) if one is not None)

    def offset(self, layer: int, side: Side, *, stored: bool = False) -> tuple[int, slice]:
        """Where a factor is.

        Args:
            layer: its number.
            side: ``"A"`` or ``"G"``.
            stored: among the inverses that this process stores, rather than among all blocks.

        Returns:
            The block size, and the blocks of this size.
        """
        return (self._stored if stored else self._offsets)[layer, side]

    def set_inverse_owner(self, layers: Iterable[int]) -> None:
        """Store on this process the inverses of ``layers`` alone."""
        self.has_inverse = set(layers)
        self._indices: dict[tuple[int, ...], BlockIndex] = {}
        self._stored.clear()
        self.n_stored = dict.fromkeys(self.n_blocks, 0)
        """By block size: inverses on this process."""
        for (layer, side), (size, blocks) in self._offsets.items():
            if layer in self.has_inverse:
                start = self.n_stored[size]
                self.n_stored[size] += blocks.stop - blocks.start
                self._stored[layer, side] = size, slice(start, self.n_stored[size])

    def index(self, layers: tuple[int, ...]) -> BlockIndex:
        """The index of ``layers``, in order; the latest `MOST_INDICES` are remembered, since the same layers come again
        (under a trace rule also ever new ones)."""
        if layers not in self._indices:
            if len(self._indices) == MOST_INDICES:
                del self._indices[next(iter(self._indices))]
            owned = [layer for layer in layers if layer in self.has_inverse]
            blocks, own = self._blocks(layers, self._offsets), self._blocks(owned, self._offsets)
            inverses = self._blocks(owned, self._stored)
            starts = dict(zip(self.n_stored, accumulate(self.n_stored.values(), initial=0), strict=False))
            rows = [starts[size] + number for size, numbers in inverses.items() for number in numbers]
            self._indices[layers] = BlockIndex(
                self._as_index(list(layers)),
                {size: self._as_index(numbers) for size, numbers in blocks.items()},
                {size: (self._as_index(own[size]), self._as_index(numbers)) for size, numbers in inverses.items()},
                layers,
                self._owners_of(blocks),
                list(map(len, blocks.values())),
                self._owners_of(own),
                list(map(len, own.values())),
                self._as_index(rows),
            )
        return self._indices[layers]

    def packed_numel(self, layer: int) -> int:
        """Numbers in the triangles of one layer's blocks."""
        return sum(_count(one) * packed_numel(one.size) for _, one in self.factors(layer))

    def numel(self, layer: int) -> int:
        """Numbers in one layer's blocks."""
        return sum(_count(one) * one.size**2 for _, one in self.factors(layer))

    def _blocks(
        self, layers: Iterable[int], offsets: Mapping[tuple[int, Side], tuple[int, slice]]
    ) -> dict[int, list[int]]:
        """The blocks of some layers by size, both in the order of memory."""
        found: dict[int, list[int]] = {}
        for factor in ((layer, side) for layer in layers for side in SIDES):
            if factor in offsets:
                size, blocks = offsets[factor]
                found.setdefault(size, []).extend(range(blocks.start, blocks.stop))
        return {size: sorted(found[size]) for size in self.n_blocks if size in found}

    def _owners_of(self, blocks: Mapping[int, list[int]]) -> Tensor:
        return torch.tensor(
            [self._owners[size][number] for size, numbers in blocks.items() for number in numbers],
            dtype=torch.int64,
            device=self._device,
        )

    def _as_index(self, numbers: list[int]) -> Index:
        start, stop = (numbers[0], numbers[-1] + 1) if numbers else (0, 0)
        return slice(start, stop) if stop - start == len(numbers) else torch.tensor(numbers, device=self._device)


def _count(partition: BlockPartition) -> int:
    return partition.groups * partition.n_blocks
