"""Which operators a step calls, and which of them would wait for a device."""

from __future__ import annotations

from collections import Counter
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_thor.linalg import memory
from lightning_thor.linalg.memory import HostCopy

# What copies a number to the host, or makes a tensor whose shape depends on data.
# cholesky_inverse looks at LAPACK's info, inside the operator.
WAITING = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "bincount", "cholesky_inverse",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Counts operators, and remembers those that would wait for a device.

    On a CPU there is nothing to wait for, so a step may read its numbers: here it takes the way of other devices. A
    copy that an earlier step sent to the host is there when it is read.
    """

    _lock, _patch, _n_entered = Lock(), pytest.MonkeyPatch(), 0
    """The way of other devices is one for all threads: the first that enters takes it, the last leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()
        self._lists = _Lists(self.called)

    def __enter__(self) -> Watch:
        with Watch._lock:
            Watch._n_entered += 1
            if Watch._n_entered == 1:
                self._patch.setattr(memory, "HOST", set())
                self._patch.setattr(HostCopy, "read", _read_of_the_host)
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._lists.__exit__(*exception)
        with Watch._lock:
            Watch._n_entered -= 1
            if Watch._n_entered == 0:
                self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waiting(self) -> set[str]:
        return WAITING & self.called.keys()


class _Lists(TorchFunctionMode):
    """Counts ``tolist``, which on a CPU calls no operator."""

    def __init__(self, called: Counter[str]) -> None:
        super().__init__()
        self._called = called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy):
            self._called["_local_scalar_dense"] += 1
        return func(*args, **(kwargs or {}))


_read = HostCopy.read


def _read_of_the_host(copy: HostCopy) -> list[Any]:
    with torch._C.DisableTorchFunction():
        return _read(copy)
