"""Tensors that are adjacent in memory as one view, and copies to the host without waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

UNMERGED_DEVICES = {"cpu"}
"""Devices on which each tensor is a run of its own: an operation costs little there, and on one tensor at a time it
finds more in the processor's cache."""


def adjacent_runs(tensors: Sequence[Tensor], *, everywhere: bool = False) -> list[list[int]]:
    """Groups tensors that are adjacent in memory into runs, as long as possible.

    Args:
        tensors: in any order; those of a run are contiguous, of one shape and dtype and in one storage.
        everywhere: on `UNMERGED_DEVICES` too.

    Returns:
        For each run the indices of its tensors, in the order of memory; runs in the order of their first index, so that
        they are the same wherever their memory is.

    >>> adjacent_runs(torch.zeros(2, 3).unbind())  # on a GPU: [[0, 1]]
    [[0], [1]]
    """
    if tensors and not everywhere and tensors[0].device.type in UNMERGED_DEVICES:
        return [[index] for index in range(len(tensors))]
    addresses = [tensor.data_ptr() for tensor in tensors]
    runs: list[list[int]] = []
    end, last = -1, None
    for index in sorted(range(len(tensors)), key=addresses.__getitem__):
        tensor = tensors[index]
        form = tensor.shape, tensor.dtype
        goes_on = addresses[index] == end and form == last and tensor.is_contiguous()
        # Memory of two storages can be adjacent by chance.
        if goes_on and tensor.untyped_storage().data_ptr() == tensors[runs[-1][0]].untyped_storage().data_ptr():
            runs[-1].append(index)
        else:
            runs.append([index])
        end = addresses[index] + tensor.numel() * tensor.element_size() if tensor.is_contiguous() else -1
        last = form
    return sorted(runs)


def as_stacked_view(run: Sequence[Tensor]) -> Tensor:
    """View of a run's ``n`` tensors as one, ``[n, *shape]``.

    >>> both = torch.arange(6.0).view(2, 3)
    >>> as_stacked_view(both.unbind()).equal(both)
    True
    """
    first = run[0]
    if len(run) == 1:
        return first.unsqueeze(0)
    return torch.as_strided(first, (len(run), *first.shape), (first.numel(), *first.stride()), first.storage_offset())


def constants(numbers: Iterable[float], like: Tensor) -> Tensor:
    """Numbers as a vector with the dtype and the device of a tensor, not to be changed: copied there once, since a copy
    to a GPU waits for it.

    >>> constants([1, 2], torch.zeros(0))
    tensor([1., 2.])
    """
    return _constants(tuple(numbers), like.dtype, like.device)


def sent(numbers: Sequence[Any], like: Tensor) -> Tensor:
    """Numbers that change from step to step as a new tensor with the dtype and the device of a tensor, without waiting.

    >>> sent([1, 2], torch.zeros(0))
    tensor([1., 2.])
    """
    # Only from pinned memory does a copy to a GPU not wait for what the GPU still has to do.
    on_host = torch.tensor(numbers, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
    return on_host.to(like.device, non_blocking=True)


def select(vector: Any, places: Sequence[int]) -> Any:
    """The entries of a vector or a list at these places, in their order; itself if these are all in its own order.

    >>> select(torch.tensor([1.0, 2.0, 3.0]), [2, 0]), select([1.0, 2.0, 3.0], [2, 0])
    (tensor([3., 1.]), [3.0, 1.0])
    """
    if places == list(range(len(vector))):
        return vector
    if not isinstance(vector, Tensor):
        return [vector[place] for place in places]
    return vector.index_select(0, _constants(tuple(places), torch.int64, vector.device))


@lru_cache(maxsize=64)
def _constants(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


HOST = {"cpu"}
"""Devices whose numbers the program can read without waiting."""


class HostCopy:
    """A tensor on its way to the host, so that reading it a step later waits for nothing; ``source`` is the tensor on
    its device."""

    def __init__(self, tensor: Tensor) -> None:
        self.source = tensor
        self._event: torch.cuda.Event | None = None
        self._copy = tensor
        if tensor.device.type == "cuda":
            self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> list[Any]:
        """The tensor as a list; waits for the copy if it has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[Any] = self._copy.tolist()
        return numbers


_SCRATCH = threading.local()
SCRATCH_NUMEL = 2**22
"""The longest `scratch` that is kept; longer ones are made anew."""


def scratch(numel: int, like: Tensor) -> Tensor:
    """Memory for ``numel`` numbers of an intermediate result, in the dtype and on the device of ``like``, not
    initialised; the same in each call of a thread: what it holds is lost at the next one."""
    if numel > SCRATCH_NUMEL:
        return like.new_empty(numel)
    held: dict[Any, Tensor] = _SCRATCH.__dict__
    key = like.dtype, like.device
    if key not in held or held[key].numel() < numel:
        with torch.inference_mode(False):  # or it could not be written outside of that mode
            held[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
    return held[key][:numel]
