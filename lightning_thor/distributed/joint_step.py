"""Agreeing on one step after a signal, which every process gets at a moment of its own."""

from __future__ import annotations

import itertools
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lightning_thor.distributed.process_group import is_distributed

SECONDS_ALONE = 10.0
"""How long a process that was told waits for the others to be told."""
_numbers = itertools.count()
"""Every process makes the same `JointStep` in the same order."""


class JointStep:
    """A step that all processes agree on, once each of them was told that one is wanted.

    No collective can do it, since all would have to call it at the same place, and none knows which of them a signal
    has interrupted. So each process that was told counts itself in torch's store, and when all have, the first one
    writes there a step that none has begun. Until a process is told, it sends and reads nothing.

    Attributes:
        is_due: whether this step is the one that was agreed on, or a later one.
        is_alone: whether this process was told, and the others were not within `SECONDS_ALONE`.
    """

    def __init__(self) -> None:
        self._name = f"lightning_thor/joint_step/{next(_numbers)}"
        self._step = 0
        self._told_at: float | None = None
        self._is_counted = False
        self.is_due = self.is_alone = False

    @property
    def is_told(self) -> bool:
        """Whether this process was told."""
        return self._told_at is not None

    def tell(self) -> None:
        """Ask for a step; a handler of a signal may call it at any moment."""
        if self._told_at is None:
            self._told_at = time.monotonic()

    def begins(self, n_ahead: int = 1) -> None:
        """Say that a step begins, and find out whether it is due; each process calls it at the start of each step.

        Args:
            n_ahead: how many steps another process may begin before this one has ended its own: 1 where each step waits
                for all processes, the number of micro-batches where only the last one of them does.
        """
        self._step += 1
        if self._told_at is None:
            return
        if not is_distributed():
            self.is_due = True
            return
        store = _get_default_store()
        if not self._is_counted:
            store.add(f"{self._name}/told", 1)
            self._is_counted = True
        step = store.add(f"{self._name}/step", 0)
        if not step and dist.get_rank() == 0 and store.add(f"{self._name}/told", 0) == dist.get_world_size():
            step = store.add(f"{self._name}/step", self._step + n_ahead)
        self.is_due = 0 < step <= self._step
        self.is_alone = not step and time.monotonic() - self._told_at > SECONDS_ALONE
