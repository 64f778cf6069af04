"""Ways in which factors travel to other ranks, and the messages that each takes: these follow from a model's shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_thor import Curvature
from lightning_thor.distributed.communicator import Done, Work
from lightning_thor.distributed.factor_reducer import DEFAULT_BUCKET_MB, BucketFn, FactorReducer, by_size, one_bucket
from lightning_thor.distributed.shared_inversions import SharedInversions


@dataclass
class Way:
    """One way in which factors travel."""

    bucket_fn: BucketFn
    from_backward: bool = False


def each_alone(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
    """A bucket for each layer: no fusion."""
    return [[layer] for layer in layers]


WAYS = {
    "layer by layer": Way(each_alone),
    "at once": Way(one_bucket),
    "buckets": Way(by_size(DEFAULT_BUCKET_MB * 2**20), from_backward=True),
}


class Counting:
    """An exchange with nobody: notes each message as ``(collective, bytes that a rank gives to it)``."""

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.messages: list[tuple[str, int]] = []

    def all_reduce(self, flat: Tensor) -> Work:
        self.messages.append(("all_reduce", flat.numel() * flat.element_size()))
        return Done()

    def all_gather(self, own: Tensor) -> Tensor:
        self.messages.append(("all_gather", own.numel() * own.element_size()))
        return own.repeat(self.world_size)

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        self.messages.append(("all_to_all", sent.numel() * sent.element_size()))
        return sent.new_zeros(sum(received_lengths))


def moved(messages: Sequence[Sequence[Any]], n_ranks: int) -> float:
    """Bytes that each rank sends, by the algorithms that move fewest (rings).

    >>> moved([("all_reduce", 100), ("all_gather", 100), ("all_to_all", 100)], n_ranks=4)
    525.0
    """
    times = {"all_reduce": 2 * (n_ranks - 1) / n_ranks, "all_gather": n_ranks - 1, "all_to_all": 1 - 1 / n_ranks}
    return float(sum(times[kind] * n_bytes for kind, n_bytes in messages))


def counts(model: nn.Module, way: Way, n_ranks: int) -> dict[str, Any]:
    """What a refresh of all layers says: messages for factors, those for inverses, and what whole blocks would take."""
    curvature = Curvature(model)
    stacks, n_layers = curvature.factors, len(curvature.layers)
    factors, inverses = Counting(n_ranks), Counting(n_ranks)
    FactorReducer(stacks, factors, lambda: tuple(range(n_layers)), way.bucket_fn).sum()
    problems = {
        size: (stack.average, stack.average.new_ones(len(stack.average))) for size, stack in stacks.batches.items()
    }
    SharedInversions(inverses, lambda blocks, damping: (blocks, damping > 0))(problems)
    return {
        "factors": factors.messages,
        "inverses": inverses.messages,
        "whole_bytes": stacks.flat_sums.numel() * stacks.flat_sums.element_size(),
        "travelling_bytes": sum(map(stacks.packed_bytes, range(n_layers))),
    }
