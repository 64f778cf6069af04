"""The ranks of a process group: sums and gatherings over the processes of a data-parallel run."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_thor.distributed.communicator import Alone, Exchange, Wait, Workers


def is_distributed() -> bool:
    """True if several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def new_factor_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """A process group of all ranks for factors alone, so that their all-reduce never queues behind a gradient's.

    Every rank must call it, at the same place; None where there is only one process.

    Args:
        timeout: how long a collective of the group may take before it is an error; None for the backend's own.
    """
    return dist.new_group(timeout=timeout) if is_distributed() else None


def leave_without_others(exception: BaseException, group: dist.ProcessGroup | None) -> None:
    """See to it that this process can end, and that the others notice, though collectives are on their way.

    A gloo group that is destroyed waits for what it has begun, for half an hour by default, while the ranks that have
    not begun it wait for this one. A group that is never destroyed ends with its process, and its connections too.

    Args:
        exception: what ends the process; if it is a collective's, its message gets a sentence that says what to do.
        group: of factors; the same is done for the group of all ranks.
    """
    if not is_distributed():
        return
    for one in (group, dist.group.WORLD):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
    # The last is gloo's word for a collective whose connection another one's timeout has closed.
    of_a_collective = re.search("gloo|NCCL|ProcessGroup|pair closure", str(exception))
    if isinstance(exception, RuntimeError) and of_a_collective:
        exception.args = (
            f"{exception}\nRank {dist.get_rank()} waited for another one of the {dist.get_world_size()} in vain: that "
            "one raised, died or hung, and its own output says why. (How long is waited for one that hangs: "
            "timeout=timedelta(...) of the strategy.)",
        )


def new_workers(n_workers: int, timeout: timedelta | None = None) -> Workers:
    """All ranks as a grid, in which the inverses of a layer are kept by ``n_workers`` of them (KAISA: Pauloski et al.
    2021, arXiv:2107.01739); several process groups, so every rank must call it, at the same place.

    Receivers, who exchange messages at every step, are neighbours (on one node, if they fit there); a group of workers,
    who do at refreshes, has a rank of each set of receivers.

    Args:
        n_workers: a divisor of the number of ranks.
        timeout: see `new_factor_group`.
    """
    n_ranks, rank = (dist.get_world_size(), dist.get_rank()) if is_distributed() else (1, 0)
    n_groups = n_ranks // n_workers
    workers = [list(range(first, n_ranks, n_groups)) for first in range(n_groups)]
    receivers = [list(range(first, first + n_groups)) for first in range(0, n_ranks, n_groups)]

    def own_of(parts: list[list[int]]) -> Exchange:
        if len(parts[0]) == 1:
            return Alone()
        # Every rank makes every group, and is in one of them.
        groups = [dist.new_group(ranks, timeout=timeout) for ranks in parts]
        return next(Ranks(group) for ranks, group in zip(parts, groups, strict=True) if rank in ranks)

    return Workers(own_of(workers), own_of(receivers))


class Ranks:
    """The ranks of a process group as what curvature asks for (`lightning_thor.distributed.communicator.Exchange`).

    Args:
        group: None for the group of all ranks.
        bf16: send what is summed in bfloat16. The sums themselves are taken in the precision of what is summed, and
            rounded to bfloat16 once more on their way back.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, bf16: bool = False) -> None:
        self._group = group
        self._bf16 = bf16

    @property
    def n_shares(self) -> int:
        return dist.get_world_size(self._group) if is_distributed() else 1

    @property
    def own_share(self) -> int:
        return dist.get_rank(self._group) if is_distributed() else 0

    def start_sum(self, flat: Tensor, n_exact: int = 0) -> Wait:
        if self._bf16 and n_exact < len(flat):
            return self._start_rounded_sum(flat, n_exact)
        work = dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=self._group, async_op=True)
        return lambda: _wait(work)

    def gather(self, own: Tensor) -> Tensor:
        gathered = own.new_empty(self.n_shares * len(own))
        # The newer name of the same collective, and the warning of the older one, came with torch 2.13.
        newer = hasattr(dist, "all_gather_single")
        (dist.all_gather_single if newer else dist.all_gather_into_tensor)(gathered, own, group=self._group)
        return gathered

    def swap(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        received = sent.new_empty(sum(received_lengths))
        dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=list(received_lengths),
            input_split_sizes=list(sent_lengths),
            group=self._group,
        )
        return received

    def _start_rounded_sum(self, flat: Tensor, n_exact: int) -> Wait:
        """Every rank sums one part of all ranks' numbers; then all gather the parts: half of an all-reduce's bytes.

        Both messages travel as bytes: no backend adds up, so none needs to know bfloat16.
        """
        n_rounded, n_shares = len(flat) - n_exact, self.n_shares
        length = -(-n_rounded // n_shares)
        rounded = flat.new_zeros(n_shares * length, dtype=torch.bfloat16)
        rounded[:n_rounded] = flat[:n_rounded]
        exact = flat[n_rounded:].expand(n_shares, -1).contiguous()
        sent = torch.cat([_bytes(rounded.view(n_shares, length)), _bytes(exact)], dim=1)
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=self._group, async_op=True)

        def finish() -> None:
            _wait(work)
            parts = received[:, : 2 * length].contiguous().view(torch.bfloat16)
            flat[n_rounded:] = received[:, 2 * length :].contiguous().view(flat.dtype).sum(0)
            part = parts.to(flat.dtype).sum(0).to(torch.bfloat16)
            flat[:n_rounded] = self.gather(part.view(torch.uint8)).view(torch.bfloat16)[:n_rounded]

        return finish


def _bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8) if rows.shape[1] else rows.new_empty(len(rows), 0, dtype=torch.uint8)


def _wait(work: dist.Work) -> None:
    work.wait()
