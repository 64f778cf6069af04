"""Process groups of `torch.distributed`: the communicator over one, and how they are made and aborted."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from lightning_thor.distributed.communicator import Communicator, SingleProcess, Work, WorkerGrid

_GROUPS: WeakKeyDictionary[Any, dict[Any, dist.ProcessGroup]] = WeakKeyDictionary()
"""Those that were made beside the group of all ranks, and go with it: fits of one process have the same."""


def is_distributed() -> bool:
    """True if several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _group(ranks: Sequence[int] | None, timeout: timedelta | None) -> dist.ProcessGroup:
    """The group of these ranks (None: of all), made at the first call: it has threads and connections of its own, which
    would stay until the process ends. Every rank must call it, at the same place."""
    made = _GROUPS.setdefault(dist.group.WORLD, {})
    key = (None if ranks is None else tuple(ranks), timeout)
    if key not in made:
        made[key] = dist.new_group(ranks, timeout=timeout)
    return made[key]


def new_factor_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """Make a process group of all ranks for factors alone, whose all-reduce never queues behind a gradient's; None
    where there is only one process. The next fit of this process has the same one, unless this one fails. Every rank
    must call it, at the same place.

    Args:
        timeout: longest duration of a collective of the group; None for the backend's own.
    """
    return _group(None, timeout) if is_distributed() else None


def new_worker_grid(
    n_inverse_workers: int, timeout: timedelta | None = None, *, tensor_parallel_size: int | None = None
) -> WorkerGrid:
    """Make the process groups of a grid of all ranks, each row of which stores the inverses of some layers.

    The next fit has the same ones, as with `new_factor_group`. Every rank must call it, at the same place. A column
    exchanges a message at every step, so its ranks are neighbours (on one node, if they fit there); a row exchanges
    messages at refreshes.

    Args:
        n_inverse_workers: ranks in a row, a divisor of the number of ranks.
        timeout: longest duration of a collective; None for the backend's own.
        tensor_parallel_size: of sharded weights: ranks that share a layer's products, neighbours, which go into one row
            and into different columns. None where weights are whole.
    """
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if is_distributed() else (1, 0)
    n_rows, width = world_size // n_inverse_workers, tensor_parallel_size or 1
    columns = [
        list(range(first + place, first + n_rows * width, width))
        for first in range(0, world_size, n_rows * width)
        for place in range(width)
    ]
    rows = [list(row) for row in zip(*columns, strict=True)]

    def own_of(groups: list[list[int]]) -> Communicator:
        if len(groups[0]) == 1:
            return SingleProcess()
        # Every rank makes every group, and is in one of them.
        made = [_group(ranks, timeout) for ranks in groups]
        return next(ProcessGroupCommunicator(group) for ranks, group in zip(groups, made, strict=True) if rank in ranks)

    return WorkerGrid(own_of(rows), own_of(columns), None if tensor_parallel_size is None else columns)


def abort_process_groups(exception: BaseException, group: dist.ProcessGroup | None) -> None:
    """Let this process end, and the others notice, while collectives are under way.

    A gloo group that is destroyed waits for the collectives that it has begun, for half an hour by default, while the
    ranks that have not begun them wait for this one. A group that is never destroyed ends with its process, and its
    connections too.

    Args:
        exception: ends this process. If a collective raised it, its message gets a sentence that says what to do.
        group: of factors. Neither it nor the group of all ranks is destroyed.
    """
    if not is_distributed():
        return
    _GROUPS.pop(dist.group.WORLD, None)  # a fit that comes after all has new ones
    for alive in (group, dist.group.WORLD):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(alive))
    # The last is gloo's word for a collective whose connection another one's timeout has closed.
    is_of_a_collective = re.search("gloo|NCCL|ProcessGroup|pair closure", str(exception))
    if isinstance(exception, RuntimeError) and is_of_a_collective:
        exception.args = (
            f"{exception}\nRank {dist.get_rank()} waited for another one of the {dist.get_world_size()} in vain: that "
            "one raised, died or hung, and its own output says why; or it ended, having fewer batches. "
            "(timeout=timedelta(...) of the strategy sets how long ranks wait for one that hangs.)",
        )


class ProcessGroupCommunicator:
    """The ranks of a process group as a `Communicator`.

    Args:
        group: None for the group of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self._group) if is_distributed() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self._group) if is_distributed() else 0

    def all_reduce(self, flat: Tensor) -> Work:
        work: Work = dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=self._group, async_op=True)
        return work

    def all_gather(self, own: Tensor) -> Tensor:
        gathered = own.new_empty(self.world_size * len(own))
        # torch 2.13 renamed this collective, and warns of the former name.
        has_new_name = hasattr(dist, "all_gather_single")
        (dist.all_gather_single if has_new_name else dist.all_gather_into_tensor)(gathered, own, group=self._group)
        return gathered

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        received = sent.new_empty(sum(received_lengths))
        dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=list(received_lengths),
            input_split_sizes=list(sent_lengths),
            group=self._group,
        )
        return received
