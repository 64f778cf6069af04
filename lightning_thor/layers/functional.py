"""Weights that torch's functions use where their module is not called, or does something before and after in a forward
of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_thor.layers.attention import Note

CHILDREN: Mapping[str, tuple[str, ...]] = {
    "timm.models.beit.Attention": ("qkv",),
    "timm.models.eva.EvaAttention": ("qkv",),
    "timm.models.swin_transformer_v2.WindowAttention": ("qkv",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": ("qkv", "proj"),
}
"""By type of module, the linear layers within it whose weights it hands to `F.linear`."""

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)

CONVOLUTION_NAMES = {"conv1d", "conv2d", "conv3d", "_conv_forward"}
"""Names, in a forward, of what calls one of `CONVOLUTIONS`."""

GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
"""Of a convolution, in the order of the function's arguments after the bias, with their defaults."""


def type_names(module: nn.Module) -> list[str]:
    """The names of a module's type and of its base types."""
    return [f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__]


def children_used_by(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose weights this module, their parent, multiplies by; by name."""
    names = [name for base in type_names(module) for name in CHILDREN.get(base, ())]
    return {name: child for name, child in module.named_children() if name in names}


def calls_function_within(module: nn.Module) -> bool:
    """Whether an embedding's or a convolution's ``forward`` is its own, and calls that of its base by ``super()``, or
    torch's function: it may change the input before (an offset of positions, padding), and the output afterwards (a
    scale, an activation). A linear layer does if it `has_mask`."""
    if has_mask(module):
        return True
    base = next((one for one in (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, one)), None)
    forward = type(module).forward
    if base is None or forward is base.forward or "forward" in vars(module):
        return False
    if isinstance(module, nn.Embedding):
        return calls_base(module) or "embedding" in _names_in(forward)
    is_plain = module.padding_mode == "zeros" and type(module)._conv_forward is base._conv_forward  # type: ignore[attr-defined, union-attr]
    return is_plain and (calls_base(module) or not CONVOLUTION_NAMES.isdisjoint(_names_in(forward)))


def has_mask(module: nn.Module) -> bool:
    """Whether a linear layer has a buffer of its weight's shape, and a ``forward`` of its own that calls `F.linear`: it
    masks its weight, as those of autoregressive networks and flows do."""
    forward = type(module).forward
    if not isinstance(module, nn.Linear) or forward is nn.Linear.forward or "forward" in vars(module):
        return False
    shape = torch.Size((module.out_features, module.in_features))
    return "linear" in _names_in(forward) and any(one.shape == shape for one in module.buffers(recurse=False))


def may_compute_weight(module: nn.Module) -> bool:
    """Whether a layer that `calls_function_within` may multiply by what it makes of its weight at each call: a masked,
    standardised, rounded or scaled one."""
    return has_mask(module) or (isinstance(module, nn.modules.conv._ConvNd) and not calls_base(module))


def calls_base(module: nn.Module) -> bool:
    """Whether the ``forward`` of a module's type calls another by ``super()``."""
    return "forward" not in vars(module) and {"super", "forward"} <= _names_in(type(module).forward)


def _names_in(function: Callable[..., Any]) -> set[str]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else {*code.co_names}


class RecordFunctions(TorchFunctionMode):
    """A context that records what `F.linear`, `F.embedding` and convolutions make of some weights, also within calls of
    modules.

    Args:
        note: called in forward with the weight's role, before the output is used.
        modules: that have these weights, by role.
    """

    def __init__(self, note: Note, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.note, self.modules = note, modules
        self._may_compute = {role: may_compute_weight(module) for role, module in modules.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        is_convolution = func in CONVOLUTIONS
        weight: Any = None
        if func is F.linear or func is F.embedding or is_convolution:
            a, weight = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"]
        elif func is torch.embedding and len(args) > 1:
            weight, a = args[:2]
        if weight is not None:
            for role, module in self.modules.items():
                # Not a fixed weight beside its own.
                is_made_of_own = (
                    self._may_compute[role] and weight.requires_grad and weight.shape == module.weight.shape
                )
                is_own = weight is module.weight or is_made_of_own
                if is_own and not (is_convolution and not _is_as_configured(module, args, kwargs)):
                    return self.note(role, a, output, None)
        return output


def _is_as_configured(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a convolution has the module's own stride, padding, dilation and groups."""
    given = {**GEOMETRY, **dict(zip(GEOMETRY, args[3:], strict=False)), **kwargs}
    n = len(module.kernel_size)
    for name in ("stride", "padding", "dilation"):
        one, own = given[name], getattr(module, name)
        if (one if isinstance(one, str) else (one,) * n if isinstance(one, int) else tuple(one)) != own:
            return False
    return bool(given["groups"] == module.groups)
