"""How long the parts of a step take: by the host's clock, or on a GPU by events that are read once they have passed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

REST = "rest"
"""What of a step is in no other part: forward and backward passes, and what the optimizer does itself."""
OWN_PARTS = ("directions", "statistics", "inversion", "communication")
"""THOR's: directions are gradients multiplied by inverses; communication is what a step waits for it."""
PARTS = (REST, *OWN_PARTS)
MOST_ENDED = 256
"""Steps whose times are kept one by one, before they are added up."""


class PartTimer:
    """Measures each part without those that are nested in it, so that the parts add up to the steps; no device sync.

    Args:
        device: where a step computes. On a GPU an event is recorded at each border of a part; elsewhere the host's
            clock is read, which costs about a microsecond.

    >>> timer = PartTimer(torch.device("cpu"))
    >>> timer.begin_step()
    >>> with timer.part("inversion"), timer.part("communication"):
    ...     time.sleep(0.01)
    >>> timer.end_step()
    >>> seconds = timer.seconds()
    >>> seconds["communication"] >= 0.01, seconds["statistics"]
    (True, 0.0)
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._parts: list[str] = []
        """The parts that are open, the innermost one last; empty outside of a step."""
        self._marks: list[tuple[str, Any]] = []
        """Of the present step: the times at which the innermost part changed, and to what."""
        self._ended: deque[list[tuple[str, Any]]] = deque()
        """Of steps that are not in the sum yet."""
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def begin_step(self) -> None:
        """Begin a step; one that did not end (its training step raised an error) is forgotten."""
        self._parts, self._marks = [REST], []
        self._mark()

    def end_step(self) -> None:
        """End the step."""
        if self._parts:
            self._mark()
            self._ended.append(self._marks)
            self._parts, self._marks = [], []
            if len(self._ended) > MOST_ENDED:
                self.seconds()  # which nobody may ask for, where no step is logged

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context that is a part of the step, one of `PARTS`; of no meaning outside of a step."""
        if not self._parts:
            yield
            return
        self._parts.append(name)
        self._mark()
        try:
            yield
        finally:
            if self._parts:
                self._parts.pop()
                self._mark()

    def seconds(self) -> dict[str, float]:
        """Seconds so far by part, all of `PARTS`; on a GPU those of steps whose events have passed."""
        while self._ended and (not self._is_gpu or self._ended[0][-1][1].query()):
            for (part, start), (_, stop) in pairwise(self._ended.popleft()):
                self._seconds[part] += start.elapsed_time(stop) / 1e3 if self._is_gpu else stop - start
        return dict(self._seconds)

    def _mark(self) -> None:
        now: Any
        if self._is_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self._parts[-1], now))
