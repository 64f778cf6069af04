"""Agreeing on one step after a signal, which every process gets at a moment of its own."""

from __future__ import annotations

import itertools
import time

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lightning_thor.distributed.process_group import is_distributed

SECONDS_ALONE = 10.0
"""How long a process that was told waits for the others to be told, from its next step on, and three more steps."""
NONE = -1
"""The number of a step where there is none any more."""
_numbers = itertools.count()
"""Every process makes the same `JointStep` in the same order."""


class JointStep:
    """A step that all processes agree on, once each of them was told that one is wanted.

    No collective can do it, since all would have to call it at the same place, and none knows which of them a signal
    has interrupted. So each process that was told counts itself in torch's store, and when all have, the first one
    writes there a step that none has begun. Until a process is told, it sends and reads nothing.

    Attributes:
        is_due: whether this step is the one that was agreed on, or a later one.
        is_told: whether this process was told.
        is_alone: whether this process was told, and the others were not within `SECONDS_ALONE`.
    """

    def __init__(self) -> None:
        self._name = f"lightning_thor/joint_step/{next(_numbers)}"
        self._step = self._n_late = 0
        self._counted_at: float | None = None
        self.is_told = self.is_due = self.is_alone = False

    def tell(self) -> None:
        """Ask for a step; a handler of a signal may call it at any moment."""
        self.is_told = True

    def begins(self, n_ahead: int = 1, device: torch.device | None = None) -> None:
        """Say that a step begins, and find out whether it is due; each process calls it at the start of each step.

        Args:
            n_ahead: how many steps another process may begin before this one has ended its own: 1 where each step waits
                for all processes, the number of micro-batches where only the last one of them does.
            device: of the model; it is waited for, since a host may send it many steps before it waits for the others.
        """
        self._step += 1
        if not self.is_told:
            return
        if not is_distributed():
            self.is_due = True
            return
        if device is not None and device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
        store = _get_default_store()
        if self._counted_at is None:
            store.add(f"{self._name}/told", 1)
            self._counted_at = time.monotonic()
        step = store.add(f"{self._name}/step", 0)
        if not step and dist.get_rank() == 0 and store.add(f"{self._name}/told", 0) == dist.get_world_size():
            store.compare_set(f"{self._name}/step", "0", str(self._step + n_ahead))
            step = store.add(f"{self._name}/step", 0)
        self.is_due = 0 < step <= self._step
        if not step and time.monotonic() - self._counted_at > SECONDS_ALONE:
            self._n_late += 1
        # In a step that takes longer another process may not have come to where it says that it was told, and two
        # steps later rank 0 not to where it sees that all have.
        self.is_alone = not step and self._n_late > 3 * n_ahead

    def ends(self) -> None:
        """Say that there are no more steps, where it should be one of these: either all processes agreed on one before
        the first of them has no more, or none is due."""
        if self.is_told and is_distributed():
            store = _get_default_store()
            store.add(f"{self._name}/step", 0)
            store.compare_set(f"{self._name}/step", "0", str(NONE))
            self.is_due = store.add(f"{self._name}/step", 0) != NONE
