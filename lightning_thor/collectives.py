"""The one file that knows ranks: sums over the processes of a data-parallel run."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """True if several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def new_factor_group() -> dist.ProcessGroup | None:
    """A process group of all ranks for factors alone, so that their all-reduce never queues behind a gradient's.

    Every rank must call it, at the same place; None where there is only one process.
    """
    return dist.new_group() if is_distributed() else None


def sum_across_ranks_(flat: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Add up ``flat`` over all ranks, in place, by one all-reduce; nothing happens on a single process."""
    if is_distributed():
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group)
