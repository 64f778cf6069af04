"""Tensors that say that they are on another device, "meta", and hold their numbers on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Elsewhere(Tensor):
    """Use it within `AnotherDevice`.

    Args:
        held: the numbers, on the CPU.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="meta"
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with AnotherDevice():
            return func(*args, **(kwargs or {}))


class AnotherDevice(TorchDispatchMode):
    """A context for `Elsewhere`: operations take tensors of the CPU beside them only if they have no dimensions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        is_here = any(isinstance(x, Elsewhere) for x in tensors)
        if device is not None:
            is_here = torch.device(device).type != "cpu"
        if not is_here and device is None:
            return func(*args, **kwargs)
        on_cpu = [list(x.shape) for x in tensors if x.dim() and not isinstance(x, Elsewhere)]
        if on_cpu and is_here and func is not torch.ops.aten._to_copy.default:
            raise RuntimeError(f"{func} mixes tensors of another device with the CPU's {on_cpu}.")
        if is_here:
            kwargs.pop("device", None)
        args, kwargs = tree_map_only(Elsewhere, lambda x: x.held, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, Elsewhere, result) if is_here else result
