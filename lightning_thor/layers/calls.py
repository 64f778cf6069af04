"""Calls under way of a module that multiplies by weights itself, each with the contexts that it is observed in."""

from __future__ import annotations

from contextlib import ExitStack
from threading import get_ident
from types import FrameType
from typing import NamedTuple


class Call(NamedTuple):
    """One call."""

    contexts: ExitStack
    opened: list[str]
    """Names of the weights that are observed."""
    thread: int
    frame: FrameType
    """The code that calls the module's hooks."""


class Calls:
    """Calls of one module, in all threads.

    Attributes:
        under_way: the latest last.
    """

    def __init__(self) -> None:
        self.under_way: list[Call] = []

    def begin(self, frame: FrameType, opened: list[str]) -> ExitStack:
        """Begin a call; returns the contexts that end with it."""
        call = Call(ExitStack(), opened, get_ident(), frame)
        self.under_way.append(call)
        return call.contexts

    def is_within_another(self) -> bool:
        """Whether the module is called within its own forward, after calls that were interrupted have been ended: torch
        calls no hook after a KeyboardInterrupt."""
        own = [call for call in self.under_way if call.thread == get_ident()]
        return not all([self._ended_if_interrupted(call) for call in reversed(own)])

    def end(self) -> list[str] | None:
        """End this thread's latest call; returns its ``opened``, None if there is none."""
        call = next((call for call in reversed(self.under_way) if call.thread == get_ident()), None)
        return None if call is None else self._end(call)

    def end_all(self) -> None:
        """End all calls, also those whose hooks were removed meanwhile."""
        for call in self.under_way[::-1]:
            self._end(call)

    def _end(self, call: Call) -> list[str]:
        self.under_way.remove(call)
        call.contexts.close()
        return call.opened

    def _ended_if_interrupted(self, call: Call) -> bool:
        try:
            call.frame.clear()  # frees what interrupted code has left
        except RuntimeError:  # it still runs
            return False
        self._end(call)
        return True
