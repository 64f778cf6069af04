"""Ways to send factors to other ranks, and the messages of each, counted from a model's shapes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor import Curvature
from lightning_thor.distributed.communicator import Done, Work
from lightning_thor.distributed.factor_reducer import DEFAULT_BUCKET_MB, BucketFn, by_size, one_bucket
from lightning_thor.distributed.shared_inversions import assign_inversions

Messages = list[tuple[str, int]]
"""Collectives in order: the name of each, and the bytes that one rank contributes."""


@dataclass
class Way:
    """One way to send factors."""

    bucket_fn: BucketFn
    from_backward: bool = False
    """Whether buckets may be sent while backward runs."""


def one_bucket_per_layer(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
    """The `BucketFn` without fusion."""
    return [[layer] for layer in layers]


WAYS = {
    "layer by layer": Way(one_bucket_per_layer),
    "at once": Way(one_bucket),
    "buckets": Way(by_size(DEFAULT_BUCKET_MB * 2**20), from_backward=True),
}


class Counting:
    """A `Communicator` that pretends ``world_size`` ranks, and notes each collective in ``messages``."""

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.messages: Messages = []

    def all_reduce(self, flat: Tensor) -> Work:
        self.messages.append(("all_reduce", flat.nbytes))
        return Done()

    def all_gather(self, own: Tensor) -> Tensor:
        self.messages.append(("all_gather", own.nbytes))
        return own.repeat(self.world_size)

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        self.messages.append(("all_to_all", sent.nbytes))
        return sent.new_zeros(sum(received_lengths))


def moved(messages: Sequence[Sequence[Any]], n_ranks: int) -> float:
    """Bytes that each of ``n_ranks`` sends for ``messages``, by the algorithms that move fewest (rings).

    >>> moved([("all_reduce", 100), ("all_gather", 100), ("all_to_all", 100)], n_ranks=4)
    525.0
    """
    times = {"all_reduce": 2 * (n_ranks - 1) / n_ranks, "all_gather": n_ranks - 1, "all_to_all": 1 - 1 / n_ranks}
    return float(sum(times[kind] * n_bytes for kind, n_bytes in messages))


def curvature_of(model: Callable[[], nn.Module], **options: Any) -> Curvature:
    """The curvature, with these options, of a model that has shapes alone."""
    with torch.device("meta"):
        return Curvature(model(), **options)


def block_counts(curvature: Curvature) -> dict[int, int]:
    """Number of diagonal blocks in all factors, by block size."""
    counts: Counter[int] = Counter()
    for layer in curvature.layers.values():
        for factor in (layer.A, layer.G):
            if factor is not None:
                counts[factor.size] += factor.groups * factor.n_blocks
    return dict(counts)


def count_messages(curvature: Curvature, way: Way, n_ranks: int) -> dict[str, Any]:
    """Count the messages of a refresh of all layers, in float32 and natural mode.

    Returns:
        ``"factors"`` and ``"inverses"``: see `Messages`; ``"whole_bytes"``: of all blocks as squares;
        ``"travelling_bytes"``: of the messages for factors.
    """
    # The last layer first: in the first window the order of backward is not known yet.
    layers = range(len(curvature.layers) - 1, -1, -1)
    packed = {layer: curvature.factors.packed_bytes(layer) for layer in layers}
    buckets = way.bucket_fn(layers, list(packed.values()))
    blocks = block_counts(curvature)
    # Diagonal factors are not shared.
    layout = assign_inversions({size: n for size, n in blocks.items() if size > 1}, n_ranks, rank=0).layout
    gathered = ("all_gather", 4 * layout.length // n_ranks) if layout.is_gathered else ("all_reduce", 4 * layout.length)
    return {
        "factors": [("all_reduce", sum(packed[layer] for layer in bucket)) for bucket in buckets],
        "inverses": [gathered],
        "whole_bytes": 4 * sum(n * size**2 for size, n in blocks.items()),
        "travelling_bytes": sum(packed.values()),
    }
