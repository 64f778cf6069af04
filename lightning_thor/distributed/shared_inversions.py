"""Shared inversions: each process inverts its part of the blocks, and one collective gathers all inverses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_thor.distributed.assignment import assign_greedily
from lightning_thor.distributed.communicator import Communicator, UnevenLayout, all_gather_uneven, uneven_layout
from lightning_thor.linalg.decompositions import INVERSE, Decomposition, Problems, Solutions
from lightning_thor.linalg.packing import Form, pack, packed_numel, unpack

MOST_ASSIGNMENTS = 256
"""Assignments that are remembered, the latest."""


class InversionAssignment(NamedTuple):
    """Which blocks this process inverts, and where all inverses are in the gathered message."""

    own: dict[int, Tensor]
    """Indices of the blocks that this process inverts, by size, ``[n_own]``."""
    starts: dict[int, Tensor]
    """Index of each block's first number in the message, by size, ``[n]``; the same on all processes."""
    layout: UnevenLayout
    """Where each process's inverses are in the message."""


def assign_inversions(
    n_blocks: Mapping[int, int],
    world_size: int,
    rank: int,
    form: Form = "symmetric",
    device: torch.device | None = None,
) -> InversionAssignment:
    """Assign blocks to processes by their cost, size³, greedily; ``n_blocks`` counts them by size, ``form`` is that of
    their inverses, and ``device`` that of the indices, None for the CPU.

    >>> assign_inversions({16: 8, 32: 1}, world_size=2, rank=1).own
    {32: tensor([], dtype=torch.int64), 16: tensor([0, 1, 2, 3, 4, 5, 6, 7])}
    """
    blocks = [(size, index) for size in sorted(n_blocks, reverse=True) for index in range(n_blocks[size])]
    owners = assign_greedily([float(size**3) for size, _ in blocks], world_size)
    lengths, offsets = [0] * world_size, []
    for (size, _), owner in zip(blocks, owners, strict=True):
        offsets.append(lengths[owner])
        lengths[owner] += packed_numel(size, form) + 1
    layout = uneven_layout(lengths)
    own: dict[int, list[int]] = {size: [] for size, _ in blocks}
    starts: dict[int, list[int]] = {size: [] for size, _ in blocks}
    for (size, index), owner, offset in zip(blocks, owners, offsets, strict=True):
        starts[size].append(layout.starts[owner] + offset)
        if owner == rank:
            own[size].append(index)

    def tensors(by_size: dict[int, list[int]]) -> dict[int, Tensor]:
        return {size: torch.tensor(some, dtype=torch.int64, device=device) for size, some in by_size.items()}

    return InversionAssignment(tensors(own), tensors(starts), layout)


class SharedInversions:
    """Inverts blocks of several sizes, as ``decomposition`` does, together with the other processes; no device sync."""

    def __init__(self, communicator: Communicator, decomposition: Decomposition = INVERSE) -> None:
        self._communicator, self._decomposition, self._form = communicator, decomposition, decomposition.form
        self._assignments: dict[tuple[tuple[int, int], ...], InversionAssignment] = {}

    def __call__(self, problems: Problems) -> Solutions:
        """Invert ``problems``, which are the same on all processes; so are the inverses, bitwise."""
        world_size, make = self._communicator.world_size, self._decomposition.make
        # Diagonal factors are divisions: each process does all of them.
        shared = {size: problem for size, problem in problems.items() if size > 1 and world_size > 1}
        solutions = {size: make(*problem) for size, problem in problems.items() if size not in shared}
        if not shared:
            return solutions
        some = next(iter(shared.values()))[0]
        key = tuple((size, len(blocks)) for size, (blocks, _) in shared.items())
        if key not in self._assignments:
            # Remembered with its indices on the device, since the same layers are refreshed together again; but under a
            # trace rule ever new ones are.
            rank = self._communicator.rank
            if len(self._assignments) >= MOST_ASSIGNMENTS:
                del self._assignments[next(iter(self._assignments))]
            self._assignments[key] = assign_inversions(dict(key), world_size, rank, self._form, some.device)
        own, starts, layout = self._assignments[key]
        # A record is a packed inverse, and 1 if the inversion succeeded, else 0.
        records = [some.new_empty(0)]
        for size, indices in own.items():
            if len(indices):
                blocks, damping = shared[size]
                inverses, succeeded = make(blocks[indices], damping[indices])
                records.append(torch.cat([pack(inverses, self._form), succeeded[:, None].to(some.dtype)], 1).flatten())
        message = all_gather_uneven(torch.cat(records), layout, self._communicator)
        for size, indices in starts.items():
            # A view of every window of a record's length; the index copies the windows that begin at a record.
            found = message.unfold(0, packed_numel(size, self._form) + 1, 1)[indices]
            solutions[size] = unpack(found[:, :-1].contiguous(), size, self._form), found[:, -1] > 0
        return solutions
