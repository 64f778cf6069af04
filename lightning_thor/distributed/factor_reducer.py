"""The open window's way over the processes: bucket by bucket, begun while backward still runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_thor.distributed.communicator import Communicator, Work
from lightning_thor.factors.state import BlockIndex, FactorState
from lightning_thor.linalg.memory import HostCopy

BucketFn = Callable[[Sequence[int], Sequence[int]], list[list[int]]]
"""Layers in the order in which backward comes to them, and the bytes that each sends, to buckets in that order."""


# A bucket leaves when backward has the first of its layers: with DDP's 25 for gradients, all factors of a ResNet-50,
# 20 MB as triangles, would be one bucket that leaves when backward is over. A few megabytes still outweigh the latency.
DEFAULT_BUCKET_MB = 4.0


def one_bucket(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
    """All of them together."""
    return [list(layers)]


def by_size(limit: float) -> BucketFn:
    """Close a bucket as soon as it has ``limit`` bytes.

    >>> by_size(10)([3, 2, 1, 0], [4, 7, 12, 1])
    [[3, 2], [1], [0]]
    """

    def cut(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
        buckets: list[list[int]] = []
        filled = limit
        for layer, size in zip(layers, n_bytes, strict=True):
            if filled >= limit:
                buckets.append([])
                filled = 0
            buckets[-1].append(layer)
            filled += size
        return buckets

    return cut


def by_layer(split_indices: Sequence[int], has_A: Sequence[bool]) -> BucketFn:
    """Groups that end with the given layers, as nn.thor's ``split_indices``: [26, 53] makes 0 to 26 and 27 to 53.

    As there, layers are counted that have A and G; a norm goes with the layer before it. Layers after the last index
    are a group of their own.

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

    def cut(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
        # In the order in which they are whole: that of each group's last layer.
        own = list(dict.fromkeys(groups[layer] for layer in reversed(layers)))
        return [[layer for layer in layers if groups[layer] == group] for group in reversed(own)]

    return cut


def bucket_bytes(factor_bucket_mb: Any) -> float:
    """Megabytes (2²⁰ bytes) as bytes, `DEFAULT_BUCKET_MB` for None; a ValueError if they are no number above 0."""
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
        raise ValueError(f"split_indices must not be empty and increase from 0 on, got {split_indices!r}.")


DueLayers = tuple[tuple[int, ...], tuple[int, ...]]
"""The layers to refresh and those to probe at a step."""


class Bucket(NamedTuple):
    """What is summed in one go."""

    layers: list[int]
    selection: BlockIndex


class FactorReducer:
    """Sums the layers' windows over processes.

    Every process sums the same buckets in the same order, in that of backward: the last layers first, until a layer's
    first window has shown where it comes; a model may run in another order than its modules were registered in. Only
    *when* a bucket starts is each process's own affair. It starts from backward if it is its turn, each of its layers
    has handed over all pairs that its forward passes announced, and no fewer than in any earlier window. What has not
    started by then starts in `sum`, zeros for layers that were silent here; so a layer that is used several times, late
    or never holds its bucket back, and nobody waits for it.

    Args:
        stacks: where the windows lie.
        exchange: the processes.
        turn: the layers of the present step, which must be the same on all processes.
        cut: how they are shared out to buckets.
        may_start: whether this backward is the last before the step; None never starts from backward.
    """

    def __init__(
        self,
        stacks: FactorState,
        communicator: Communicator,
        turn: Callable[[], DueLayers],
        cut: BucketFn = one_bucket,
        is_sync_step: Callable[[], bool] | None = None,
    ) -> None:
        self._stacks, self._communicator, self._turn, self._cut, self._may_start = (
            stacks,
            communicator,
            turn,
            cut,
            is_sync_step,
        )
        n_layers = len(stacks.updates)
        self._expected = [0] * n_layers
        """Pairs that forward passes promised and backward has not given yet."""
        self._given = [0] * n_layers
        self._most: list[float] = [0] * n_layers
        """The most pairs that a window ever had here; 0 for a layer of which nothing is known."""
        self._arrived: dict[int, None] = {}
        """The layers of the open window, in the order of their last pairs."""
        self._places: list[float] = [-layer for layer in range(n_layers)]
        """Where in backward each layer comes; the same on all processes, as are those that are not known yet:"""
        self._unplaced = set(range(n_layers))
        self._found: tuple[list[int], HostCopy] | None = None
        """Layers whose places are on their way to the host."""
        self._plans: dict[DueLayers, list[Bucket]] = {}
        self._buckets: list[Bucket] | None = None
        """Those of the open window, once they are asked for."""
        self._started: list[tuple[Tensor, Work]] = []

    def expect(self, layer: int) -> None:
        """A forward pass of a layer, whose pair is to come."""
        self._expected[layer] += 1

    def is_late(self, layer: int) -> bool:
        """True if a layer's bucket is on its way: a further pair of it cannot be taken any more.

        From then on that layer's bucket does not start from backward.
        """
        late = any(layer in bucket.layers for bucket in (self._buckets or [])[: len(self._started)])
        if late:
            self._most[layer] = math.inf
        return late

    def mark_ready(self, layer: int) -> None:
        """A layer's pair was added to its window; start what is whole now."""
        self._expected[layer] -= 1
        self._given[layer] += 1
        self._arrived.pop(layer, None)
        self._arrived[layer] = None
        if self._may_start is None or self._communicator.world_size == 1 or not self._may_start():
            return
        buckets = self._opened()
        while len(self._started) < len(buckets) and self._is_whole(buckets[len(self._started)]):
            self._start_next()

    def sum(self) -> None:
        """Have the windows of the step's layers summed over all processes: start what has not, and wait."""
        if self._communicator.world_size > 1:
            buckets = self._opened()
            unplaced = self._note_places()
            self._start_all()
            for bucket, (flat, work) in zip(buckets, self._started, strict=True):
                work.wait()
                self._stacks.set_window_(bucket.selection, flat)
            if unplaced:
                self._found = unplaced, HostCopy(self._stacks.counts[unplaced, 3])
        self._most = [max(most, given) for most, given in zip(self._most, self._given, strict=True)]
        self.forget()

    def drop(self) -> None:
        """The step is skipped, on all processes: let what was started anywhere come to its end, for nothing."""
        # Others may have started buckets that were not whole here: all take part in all of them, or in none.
        if self._communicator.world_size > 1 and self._may_start is not None:
            self._start_all()
            for _, work in self._started:
                work.wait()
        self.forget()

    def forget(self) -> None:
        """Go back to an empty window, without a word to the other processes."""
        self._expected = [0] * len(self._expected)
        self._given = [0] * len(self._given)
        self._arrived = {}
        self._buckets = None
        self._started = []

    def _note_places(self) -> list[int]:
        """Let the sums tell where in backward the layers come that had no window before, and which those are.

        Added up over processes, a place is the same on all of them, whatever each has seen; it counts from the next
        window on. A layer that was silent here comes last. Once for each layer this waits for the device.
        """
        # Nothing of them has started: buckets with a layer of which nothing is known start in `sum`.
        unplaced = [] if self._may_start is None else sorted(self._unplaced.intersection(self._turn()[0]))
        if unplaced:
            self._unplaced.difference_update(unplaced)
            places = {layer: place for place, layer in enumerate(self._arrived)}
            own = [places.get(layer, len(self._most)) for layer in unplaced]
            self._stacks.counts[unplaced, 3] = self._stacks.counts.new_tensor(own)
        return unplaced

    def _is_whole(self, bucket: Bucket) -> bool:
        # The last of a bucket's layers first: it is the last that backward comes to.
        return all(
            self._expected[layer] <= 0 and 0 < self._most[layer] <= self._given[layer]
            for layer in reversed(bucket.layers)
        )

    def _start_all(self) -> None:
        for _ in self._opened()[len(self._started) :]:
            self._start_next()

    def _start_next(self) -> None:
        selection = self._opened()[len(self._started)].selection
        flat = self._stacks.window_of(selection)
        self._started.append((flat, self._communicator.all_reduce(flat)))

    def _opened(self) -> list[Bucket]:
        if self._buckets is None:
            turn = self._turn()
            if self._found is not None:
                for layer, place in zip(self._found[0], self._found[1].read(), strict=True):
                    self._places[layer] = place
                self._found = None
                self._plans.clear()
            if turn not in self._plans:
                self._plans[turn] = self._plan(*turn)
            self._buckets = self._plans[turn]
        return self._buckets

    def _plan(self, due: tuple[int, ...], probed: tuple[int, ...]) -> list[Bucket]:
        layers = sorted(due + probed, key=lambda layer: (self._places[layer], -layer))
        n_bytes = [0 if layer in probed else self._stacks.packed_bytes(layer) for layer in layers]
        buckets = self._cut(layers, n_bytes) if layers else []
        return [
            Bucket(
                bucket,
                self._stacks.select(tuple(sorted(set(bucket) & set(due))), tuple(sorted(set(bucket) & set(probed)))),
            )
            for bucket in buckets
        ]
