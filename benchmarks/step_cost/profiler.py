"""Calls of this package's functions, counted and timed from outside by Python's profiler."""

import gc
import sys
import time
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import lightning_thor
from benchmarks.common.environment import synchronise

PACKAGE = f"{Path(lightning_thor.__file__).parent}/"


class PackageProfile:
    """A context that counts calls of functions defined in lightning_thor, and times the outermost ones.

    Every event "call" of `sys.setprofile` counts: also each resumption of a generator, lambdas, and comprehensions that
    Python runs as functions: before 3.12 those of lists, dicts and sets, in all versions generator expressions.
    Functions of torch and builtins do not count. Only calls in this thread do; in backward on a GPU turn off
    `torch.autograd.set_multithreading_enabled`.

    Args:
        device: time work queued on this device too.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.calls: Counter[CodeType] = Counter()
        self.seconds = 0.0
        """Time spent in calls from outside the package, everything that they call included."""
        self._depth, self._start = 0, 0.0

    def __enter__(self) -> "PackageProfile":
        gc.collect()
        gc.disable()  # a collection in between would call what objects of before do when they go
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if event == "call":
            self.calls[frame.f_code] += 1
            self._depth += 1
            if self._depth == 1:
                synchronise(self.device)
                self._start = time.perf_counter()
            return
        self._depth -= 1
        if self._depth == 0:
            synchronise(self.device)
            self.seconds += time.perf_counter() - self._start

    @property
    def n_calls(self) -> int:
        """Number of calls."""
        return sum(self.calls.values())

    @property
    def n_functions(self) -> int:
        """Number of different functions called."""
        return len({(code.co_filename, getattr(code, "co_qualname", code.co_name)) for code in self.calls})

    @property
    def files(self) -> list[str]:
        """The files of the called functions, relative to the package's folder, sorted."""
        return sorted({code.co_filename.removeprefix(PACKAGE) for code in self.calls})
