"""Inversions shared out: each process inverts its part of the blocks, and one collective brings all to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_thor.distributed.assignment import assign_greedily
from lightning_thor.distributed.communicator import Communicator, UnevenLayout, all_gather_uneven, uneven_layout
from lightning_thor.linalg.decompositions import damped_inverses
from lightning_thor.linalg.packing import Form, pack, packed_numel, unpack

Problems = Mapping[int, tuple[Tensor, Tensor]]
"""By block size: blocks ``[n, size, size]`` and what is added to their eigenvalues ``[n]``."""


Solutions = Mapping[int, tuple[Tensor, Tensor]]
"""By block size: inverses ``[n, size, size]`` and which are to be used ``[n]``."""


Invert = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class InversionAssignment(NamedTuple):
    """Who inverts which block, and where its inverse then lies; the same on all processes."""

    own: dict[int, list[int]]
    """By size: the blocks that are this process's."""
    starts: dict[int, list[int]]
    """By size: where each block's numbers begin in what is brought to all."""
    parts: UnevenLayout
    """How the shares of all processes lie there."""


def assign_inversions(
    n_blocks: Mapping[int, int], world_size: int, rank: int, form: Form = "symmetric"
) -> InversionAssignment:
    """Share blocks out by cost (size³), the largest first, each to the process that has least so far.

    Args:
        n_blocks: how many there are of each size.
        n_shares: processes.
        own_share: this one.
        form: of the inverses.

    >>> assign_inversions({16: 8, 32: 1}, world_size=2, rank=1).own
    {32: [], 16: [0, 1, 2, 3, 4, 5, 6, 7]}
    """
    sizes = sorted(n_blocks, reverse=True)
    owners = iter(assign_greedily([float(size**3) for size in sizes for _ in range(n_blocks[size])], world_size))
    own: dict[int, list[int]] = {size: [] for size in sizes}
    places: dict[int, list[tuple[int, int]]] = {size: [] for size in sizes}
    lengths = [0] * world_size
    for size in sizes:
        for block in range(n_blocks[size]):
            share = next(owners) - 1
            places[size].append((share, lengths[share]))
            lengths[share] += packed_numel(size, form) + 1
            if share == rank:
                own[size].append(block)
    parts = uneven_layout(lengths)
    return InversionAssignment(
        own, {size: [parts.starts[share] + start for share, start in places[size]] for size in sizes}, parts
    )


class SharedInversions:
    """Inverts a batch of blocks of several sizes together with the other processes; no device sync.

    Args:
        exchange: the processes.
        invert: ``(blocks, damping)`` to ``(inverses, succeeded)``.
        form: of the inverses that ``invert`` gives.
    """

    def __init__(self, communicator: Communicator, invert: Invert = damped_inverses, form: Form = "symmetric") -> None:
        self._communicator, self._invert, self._form = communicator, invert, form
        self._plans: dict[
            tuple[tuple[int, int], ...], tuple[InversionAssignment, dict[int, Tensor], dict[int, Tensor]]
        ] = {}

    def __call__(self, problems: Problems) -> Solutions:
        """Inverses of all ``problems``: each is bitwise the same on all processes."""
        # Diagonal factors are divisions: everyone does them.
        shared = {size: problem for size, problem in problems.items() if size > 1}
        solutions = {size: self._invert(*problem) for size, problem in problems.items() if size == 1}
        if not shared or self._communicator.world_size == 1:
            return {**solutions, **{size: self._invert(*problem) for size, problem in shared.items()}}
        plan, own, starts = self._plan_of(shared)
        flat = self._brought_together(plan, own, shared)
        for size, (blocks, _) in shared.items():
            # A view of every run of the numbers that one block takes; only those that begin at a block are copied.
            records = flat.unfold(0, packed_numel(size, self._form) + 1, 1)[starts[size]]
            inverses = unpack(records[:, :-1].contiguous(), blocks.shape[-1], self._form)
            solutions[size] = inverses, records[:, -1] > 0
        return solutions

    def _brought_together(self, plan: InversionAssignment, own: dict[int, Tensor], problems: Problems) -> Tensor:
        dtype, device = (some := next(iter(problems.values()))[0]).dtype, some.device
        records = [torch.empty(0, dtype=dtype, device=device)]
        for size, mine in own.items():
            if len(mine):
                blocks, damping = problems[size]
                inverses, succeeded = self._invert(blocks[mine], damping[mine])
                records.append(torch.cat([pack(inverses, self._form), succeeded[:, None].to(dtype)], dim=1).flatten())
        return all_gather_uneven(torch.cat(records), plan.parts, self._communicator)

    def _plan_of(self, problems: Problems) -> tuple[InversionAssignment, dict[int, Tensor], dict[int, Tensor]]:
        """Remembered with its numbers on the device, since the same selections of layers come again."""
        n_blocks = {size: len(blocks) for size, (blocks, _) in problems.items()}
        key = tuple(n_blocks.items())
        if key not in self._plans:
            device = next(iter(problems.values()))[0].device
            made = assign_inversions(n_blocks, self._communicator.world_size, self._communicator.rank, self._form)
            own, starts = (
                {size: torch.tensor(numbers, dtype=torch.int64, device=device) for size, numbers in by_size.items()}
                for by_size in (made.own, made.starts)
            )
            self._plans[key] = made, own, starts
        return self._plans[key]
