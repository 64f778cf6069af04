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

MOST_PASSES = 4
"""How many times as many blocks as there are they may have together: a table has a block for each of its rows."""


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
    """The order of blocks. Layers are numbered 0, 1, ..., in the order of their ``shapes``; a factor is
    ``(layer, "A" | "G")``. Index tensors are on ``device``."""

    def __init__(self, shapes: Sequence[FactorShapes], device: torch.device) -> None:
        self.shapes, self._device = shapes, device
        self._offsets: dict[tuple[int, Side], tuple[int, slice]] = {}
        self._stored: dict[tuple[int, Side], tuple[int, slice]] = {}
        self.n_blocks: dict[int, int] = {}
        """By block size."""
        owners: dict[int, list[tuple[int, int]]] = {}
        # The factors of layers with equal shapes are adjacent, all A and then all G: a product takes them as one batch.
        first = {one: layer for layer, one in reversed(list(enumerate(shapes)))}
        factors = [(first[shapes[layer]], column, layer) for layer in range(len(shapes)) for column in (0, 1)]
        for _, column, layer in sorted(factors):
            partition = shapes[layer][column]
            if partition is not None:
                start = self.n_blocks.get(partition.size, 0)
                self.n_blocks[partition.size] = stop = start + _count(partition)
                self._offsets[layer, SIDES[column]] = partition.size, slice(start, stop)
                owners.setdefault(partition.size, []).append((2 * layer + column, stop - start))
        self._owners = {size: _repeated(pairs) for size, pairs in owners.items()}
        self.owners = {size: numbers.to(device) for size, numbers in self._owners.items()}
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
        """Where a factor is: its block size, and its place among all blocks of this size, or (``stored``) among the
        inverses of this size that this process stores."""
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
        """The index of ``layers``, in order; the latest `MOST_INDICES` are remembered, with at most `MOST_PASSES` times
        all blocks, since the same layers come again (under a trace rule also ever new ones)."""
        if layers not in self._indices:
            made = self._index(layers)
            room = MOST_PASSES * sum(self.n_blocks.values()) - sum(made.lengths)
            n_blocks = sum(sum(index.lengths) for index in self._indices.values())
            while self._indices and (len(self._indices) >= MOST_INDICES or n_blocks > room):
                n_blocks -= sum(self._indices.pop(next(iter(self._indices))).lengths)
            self._indices[layers] = made
        return self._indices[layers]

    def _index(self, layers: tuple[int, ...]) -> BlockIndex:
        owned = [layer for layer in layers if layer in self.has_inverse]
        blocks = self._blocks(layers, self._offsets)
        own = blocks if len(owned) == len(layers) else self._blocks(owned, self._offsets)
        inverses = self._blocks(owned, self._stored)
        starts = dict(zip(self.n_stored, accumulate(self.n_stored.values(), initial=0), strict=False))
        rows = [
            range(starts[size] + run.start, starts[size] + run.stop) for size, runs in inverses.items() for run in runs
        ]
        places, owners = {size: self._as_index(runs) for size, runs in blocks.items()}, self._owners_of(blocks)
        is_same = own is blocks
        return BlockIndex(
            self._as_index(_runs((layer, layer + 1) for layer in layers)),
            places,
            {
                size: (places[size] if is_same else self._as_index(own[size]), self._as_index(runs))
                for size, runs in inverses.items()
            },
            layers,
            owners,
            [sum(map(len, runs)) for runs in blocks.values()],
            owners if is_same else self._owners_of(own),
            [sum(map(len, runs)) for runs in own.values()],
            self._as_index(_runs((run.start, run.stop) for run in rows)),
        )

    def packed_numel(self, layer: int) -> int:
        """Numbers in the triangles of one layer's blocks."""
        return sum(_count(one) * packed_numel(one.size) for _, one in self.factors(layer))

    def numel(self, layer: int) -> int:
        """Numbers in one layer's blocks."""
        return sum(_count(one) * one.size**2 for _, one in self.factors(layer))

    def _blocks(
        self, layers: Iterable[int], offsets: Mapping[tuple[int, Side], tuple[int, slice]]
    ) -> dict[int, list[range]]:
        """The blocks of some layers by size, both in the order of memory; adjacent ones as one run."""
        found: dict[int, list[tuple[int, int]]] = {}
        for factor in ((layer, side) for layer in layers for side in SIDES):
            if factor in offsets:
                size, blocks = offsets[factor]
                found.setdefault(size, []).append((blocks.start, blocks.stop))
        return {size: _runs(sorted(found[size])) for size in self.n_blocks if size in found}

    def _owners_of(self, blocks: Mapping[int, list[range]]) -> Tensor:
        parts = [self._owners[size][run.start : run.stop] for size, runs in blocks.items() for run in runs]
        return torch.cat([_repeated([]), *parts]).to(self._device)

    def _as_index(self, runs: list[range]) -> Index:
        if len(runs) < 2:
            return slice(runs[0].start, runs[0].stop) if runs else slice(0, 0)
        n_before, offsets = 0, []
        for run in runs:
            offsets.append((run.start - n_before, len(run)))
            n_before += len(run)
        return _repeated(offsets).add_(torch.arange(n_before, device="cpu")).to(self._device)


def _repeated(pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Each first number as many times as the second says, on the host.

    >>> _repeated([(5, 2), (7, 1)])
    tensor([5, 5, 7])
    """
    numbers, times = torch.tensor(pairs, dtype=torch.int64, device="cpu").view(-1, 2).unbind(1)
    return numbers.repeat_interleave(times)


def _runs(places: Iterable[tuple[int, int]]) -> list[range]:
    """Places ``(start, stop)`` in order, as few ranges as possible.

    >>> _runs([(0, 2), (2, 3), (5, 6)])
    [range(0, 3), range(5, 6)]
    """
    runs: list[range] = []
    for start, stop in places:
        if runs and runs[-1].stop == start:
            start = runs.pop().start
        runs.append(range(start, stop))
    return runs


def _count(partition: BlockPartition) -> int:
    return partition.groups * partition.n_blocks
