"""The all-reduce of the open window: bucket by bucket, begun while backward still runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakSet

from torch import Tensor

from lightning_thor.distributed.communicator import Communicator, Work
from lightning_thor.factors.layout import BlockIndex
from lightning_thor.factors.state import BACKWARD_POSITION, FactorState
from lightning_thor.linalg.memory import HostCopy

BucketFn = Callable[[Sequence[int], Sequence[int]], list[list[int]]]
"""From layers in the order of backward, and the bytes that each sends, to buckets in this order."""

# A bucket is sent when backward has reached the first of its layers: with DDP's 25 for gradients, all factors of a
# ResNet-50, 20 MB as triangles, would be one bucket, sent when backward is over. A few megabytes still outweigh the
# latency.
DEFAULT_BUCKET_MB = 4.0


def by_size(limit: float) -> BucketFn:
    """Buckets that are closed as soon as they have ``limit`` bytes.

    >>> by_size(10)([3, 2, 1, 0], [4, 7, 12, 1])
    [[3, 2], [1], [0]]
    """

    def bucket_fn(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
        buckets: list[list[int]] = []
        filled = limit
        for layer, size in zip(layers, n_bytes, strict=True):
            if filled >= limit:
                buckets.append([])
                filled = 0
            buckets[-1].append(layer)
            filled += size
        return buckets

    return bucket_fn


one_bucket = by_size(math.inf)
"""The `BucketFn` that sends all layers together."""


def by_layer(split_indices: Sequence[int], has_A: Sequence[bool]) -> BucketFn:
    """Buckets that end with the given layers, as nn.thor's ``split_indices``: [26, 53] makes 0 to 26 and 27 to 53.

    As there, layers are counted that have A and G; a norm goes with the layer before it. Layers after the last index
    are a bucket of their own.

    Args:
        split_indices: see `check_split_indices`.
        has_A: of every layer, in the order of the model.

    Raises:
        ValueError: an index that no layer has.

    >>> by_layer([0, 2], [True, False, True, True, True])([4, 3, 2, 1, 0], [1] * 5)
    [[4], [3, 2], [1, 0]]
    """
    n_counted = sum(has_A)
    if split_indices and split_indices[-1] >= n_counted:
        raise ValueError(
            f"split_indices={list(split_indices)!r} names layer {split_indices[-1]}, but this model has {n_counted} "
            f"layers with factors A and G, counted from 0. Give the last layer of each group, or factor_bucket_mb."
        )
    numbers = [max(sum(has_A[: layer + 1]) - 1, 0) for layer in range(len(has_A))]
    groups = [sum(number > index for index in split_indices) for number in numbers]

    def bucket_fn(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
        # In the order in which they are complete: that of each group's last layer.
        own = list(dict.fromkeys(groups[layer] for layer in reversed(layers)))
        return [[layer for layer in layers if groups[layer] == group] for group in reversed(own)]

    return bucket_fn


def bucket_bytes(factor_bucket_mb: Any) -> float:
    """Megabytes (2²⁰ bytes) as bytes; None stands for `DEFAULT_BUCKET_MB`.

    Raises:
        ValueError: not a number above 0.
    """
    if factor_bucket_mb is None:
        factor_bucket_mb = DEFAULT_BUCKET_MB
    number = isinstance(factor_bucket_mb, int | float) and not isinstance(factor_bucket_mb, bool)
    if not number or not (math.isfinite(factor_bucket_mb) and factor_bucket_mb > 0):
        raise ValueError(f"factor_bucket_mb must be a number of megabytes greater than 0, got {factor_bucket_mb!r}.")
    return float(factor_bucket_mb * 2**20)


def check_split_indices(split_indices: Any) -> None:
    """Raise a TypeError or ValueError unless it is None or increasing layer numbers, not below 0."""
    if split_indices is None:
        return
    if not isinstance(split_indices, list | tuple) or not all(type(index) is int for index in split_indices):
        raise TypeError(f"split_indices must be a list of ints (the last layer of each group), got {split_indices!r}.")
    if not split_indices or list(split_indices) != sorted(set(split_indices)) or split_indices[0] < 0:
        raise ValueError(
            f"split_indices must be one or more layer numbers that increase from 0 on, got {split_indices!r}."
        )


class Promise:
    """That a pair is to come; taken back as soon as nothing holds it any more, as when its graph is freed."""


class FactorReducer:
    """Sums the open window of the due layers over processes.

    Every process sums the same buckets in the same order, in that of backward: the last layers first, until a layer's
    first window has shown its position; a model may run in another order than its modules were registered in. Only
    *when* a bucket is sent is each process's own affair. It is sent from backward if all before it were, and each of
    its layers has had all pairs that its forward passes promised, but those whose graph was freed, and no fewer than in
    any earlier window. All others are sent in `sum`, zeros for layers that were silent here; so a layer that is used
    several times, late or never holds its bucket back, and nobody waits for it. Nothing is sent either before gradients
    were thrown away (`forget`) as often as before the last `sum`, so that what was sent is not thrown away with them.

    Args:
        factors: holds the windows.
        communicator: of the processes.
        due: returns the layers of the present step, equal on all processes.
        bucket_fn: makes buckets of them.
        is_sync_step: whether this backward is the last before the step; None never sends from backward.
    """

    def __init__(
        self,
        factors: FactorState,
        communicator: Communicator,
        due: Callable[[], tuple[int, ...]],
        bucket_fn: BucketFn = one_bucket,
        is_sync_step: Callable[[], bool] | None = None,
    ) -> None:
        self._factors, self._communicator, self._due = factors, communicator, due
        self._bucket_fn, self._is_sync_step = bucket_fn, is_sync_step
        n_layers = len(factors.updates)
        self._promises: list[WeakSet[Promise]] = [WeakSet() for _ in range(n_layers)]
        """Of pairs that backward has not brought yet, and still may."""
        self._ready = [0] * n_layers
        """Pairs in the open window."""
        self._most: list[float] = [0] * n_layers
        """The most pairs that a window ever had here; 0 for a layer of which nothing is known."""
        self._arrived: dict[int, None] = {}
        """The layers of the open window, in the order of their last pairs."""
        self._positions: list[float] = [-layer for layer in range(n_layers)]
        """Each layer's position in backward, equal on all processes; so is the set of unknown ones:"""
        self._unknown = set(range(n_layers))
        self._found: tuple[list[int], HostCopy] | None = None
        """Layers whose positions are on their way to the host."""
        self._plans: dict[tuple[int, ...], list[BlockIndex]] = {}
        self._buckets: list[BlockIndex] | None = None
        """Of the open window, once they are asked for: the layers of each, whose windows are one all-reduce."""
        self._sent: list[tuple[Tensor, Work]] = []
        self._forgotten, self._usually_forgotten = 0, 0
        """How often `forget` was called since the due step before, and how often before that one; equal on all
        processes."""

    @cached_property
    def world_size(self) -> int:
        """Number of processes, asked at the first pair: a curvature may be built before the process group."""
        return self._communicator.world_size

    def expect(self, layer: int) -> Promise:
        """Note a forward pass of ``layer``, whose pair is to come.

        Returns:
            The promise, to be held as long as the pair may come, and until it does.
        """
        promise = Promise()
        if self.world_size > 1:
            self._promises[layer].add(promise)
        return promise

    def is_late(self, layer: int) -> bool:
        """True if the layer's bucket was sent: a further pair cannot be taken any more. From then on its bucket is not
        sent from backward."""
        if self.world_size == 1:
            return False
        late = any(layer in bucket.numbers for bucket in (self._buckets or [])[: len(self._sent)])
        if late:
            self._most[layer] = math.inf
        return late

    def mark_ready(self, layer: int) -> None:
        """Note that a pair of ``layer`` was added to its window, and send the buckets that are complete."""
        if self.world_size == 1:
            return
        self._ready[layer] += 1
        self._arrived.pop(layer, None)
        self._arrived[layer] = None
        if self._is_sync_step is None or not self._is_sync_step() or self._forgotten < self._usually_forgotten:
            return
        buckets = self._opened()
        while len(self._sent) < len(buckets) and self._is_complete(buckets[len(self._sent)]):
            self._send_next()

    def sum(self) -> None:
        """Sum the windows of the due layers over all processes: send what was not sent, and wait."""
        if self.world_size == 1:
            return
        buckets = self._opened()
        unknown = self._note_positions()
        self._send_all()
        for bucket, (flat, work) in zip(buckets, self._sent, strict=True):
            work.wait()
            self._factors.unpack_window_(bucket, flat)
        if unknown:
            self._found = unknown, HostCopy(self._factors.counts[unknown, BACKWARD_POSITION])
        self._most = [max(most, ready) for most, ready in zip(self._most, self._ready, strict=True)]
        self._usually_forgotten = self._forgotten
        self.reset()

    def forget(self) -> bool:
        """Note that the open window of a due step is to be thrown away; on all processes alike, whatever they have seen
        of it: one that saw nothing calls it too.

        Returns:
            Whether some process may have sent a part of it, so that all have to finish; equal on all of them.
        """
        if self.world_size == 1 or self._is_sync_step is None:
            return False
        is_unusual = self._forgotten >= self._usually_forgotten
        self._forgotten += 1
        return is_unusual and not self._unknown.issuperset(self._due())

    def reset(self, *, finish: bool = False, keeps_graphs: bool = False) -> None:
        """Go back to an empty window.

        Args:
            finish: the window is thrown away, on all processes: let all-reduces that were begun anywhere come to their
                end.
            keeps_graphs: forward passes so far may still bring their pairs.
        """
        # Others may have sent buckets that were not complete here: all take part in all of them, or in none.
        if finish and self.world_size > 1 and self._is_sync_step is not None:
            self._send_all()
            for _, work in self._sent:
                work.wait()
        if not keeps_graphs:
            self._promises = [WeakSet() for _ in self._promises]
            self._forgotten = 0
        self._ready = [0] * len(self._ready)
        self._arrived = {}
        self._buckets = None
        self._sent = []

    def _note_positions(self) -> list[int]:
        """Add the position in backward of layers that have none yet to their counts, which the all-reduce sums; returns
        these layers.

        The sum over processes is equal on all of them, whatever each has seen; it holds from the next window on. A
        layer that was silent here comes last. Once for each layer this waits for the device.
        """
        # None of them was sent: buckets with a layer of which nothing is known are sent in `sum`.
        unknown = [] if self._is_sync_step is None else sorted(self._unknown.intersection(self._due()))
        if unknown:
            self._unknown.difference_update(unknown)
            positions = {layer: position for position, layer in enumerate(self._arrived)}
            own = [positions.get(layer, len(self._most)) for layer in unknown]
            self._factors.counts[unknown, BACKWARD_POSITION] = self._factors.counts.new_tensor(own)
        return unknown

    def _is_complete(self, bucket: BlockIndex) -> bool:
        # The first of a bucket's layers first: backward mostly reaches it last.
        return all(
            not self._promises[layer] and 0 < self._most[layer] <= self._ready[layer] for layer in bucket.numbers
        )

    def _send_all(self) -> None:
        for _ in self._opened()[len(self._sent) :]:
            self._send_next()

    def _send_next(self) -> None:
        flat = self._factors.pack_window(self._opened()[len(self._sent)])
        self._sent.append((flat, self._communicator.all_reduce(flat)))

    def _opened(self) -> list[BlockIndex]:
        if self._buckets is None:
            due = self._due()
            if self._found is not None:
                for layer, position in zip(self._found[0], self._found[1].read(), strict=True):
                    self._positions[layer] = position
                self._found = None
                self._plans.clear()
            if due not in self._plans:
                self._plans[due] = self._plan(due)
            self._buckets = self._plans[due]
        return self._buckets

    def _plan(self, due: tuple[int, ...]) -> list[BlockIndex]:
        layers = sorted(due, key=lambda layer: (self._positions[layer], -layer))
        n_bytes = [self._factors.packed_bytes(layer) for layer in layers]
        buckets = self._bucket_fn(layers, n_bytes) if layers else []
        return [self._factors.layout.index(tuple(sorted(bucket))) for bucket in buckets]
