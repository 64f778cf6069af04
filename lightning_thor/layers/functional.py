"""Weights of linear layers and embeddings that are used by torch's functions, where the module is not called, or its
own code does something before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_thor.layers.attention import Note

CHILDREN: Mapping[str, tuple[str, ...]] = {
    "timm.models.beit.Attention": ("qkv",),
    "timm.models.eva.EvaAttention": ("qkv",),
    "timm.models.swin_transformer_v2.WindowAttention": ("qkv",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
}
"""By type of module, the linear layers within it whose weights it hands to `F.linear`."""


def children_used_by(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose weights this module, their parent, multiplies by; by name."""
    names = [
        name for base in type(module).__mro__ for name in CHILDREN.get(f"{base.__module__}.{base.__qualname__}", ())
    ]
    return {name: child for name, child in module.named_children() if name in names}


class RecordFunctions(TorchFunctionMode):
    """A context that records what `F.linear` and `F.embedding` make of some weights, also within calls of modules.

    Args:
        note: called in forward with the weight's role, before the output is used.
        modules: that have these weights, by role.
    """

    def __init__(self, note: Note, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.note, self.modules = note, modules

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.linear or func is F.embedding:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            for role, module in self.modules.items():
                if weight is module.weight:
                    return self.note(role, args[0] if args else kwargs["input"], output, None)
        return output
