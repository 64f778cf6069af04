"""Hands pairs (name, a, g) of the layers that are asked for to a listener."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Listener = Callable[[str, Tensor, Tensor], None]


class Hooks:
    """Forward hooks that pair each layer's input with the gradient of its output.

    A pair is handed over when the gradient arrives, so activation checkpointing, unused outputs and passes without
    gradients give exactly the pairs that backward used. The hooks change nothing and do nothing unless ``is_open``.

    Args:
        modules: what to listen to, by name.
        is_open: whether the module of that name is to be observed in the present forward pass.
        listener: called in backward, without autograd, with the name, the input and the output's gradient.
    """

    def __init__(self, modules: Mapping[str, nn.Module], is_open: Callable[[str], bool], listener: Listener) -> None:
        self._handles: list[RemovableHandle] = [
            # Under torch.compile the hook reads a Python counter, which would recompile at every step.
            module.register_forward_hook(
                torch.compiler.disable(_forward_hook(name, module, is_open, listener)), with_kwargs=True
            )
            for name, module in modules.items()
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _forward_hook(
    name: str, owner: nn.Module, is_open: Callable[[str], bool], listener: Listener
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    # A closure, since copy.deepcopy of the model (SWA, EMA) copies hooks: it shares functions but would copy an object.
    def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is not owner or not torch.is_grad_enabled() or not is_open(name):
            return
        if not isinstance(output, Tensor) or not output.requires_grad or not module.weight.requires_grad:
            return
        a = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(a, Tensor) or a.layout is not torch.strided:
            return
        # Handed over once and let go of: autograd frees what it saved after backward, but never its hooks.
        waiting, version = [a], a._version
        del a

        def on_grad(g: Tensor) -> None:
            # Gradients are enabled here only in a create_graph pass (a gradient penalty), which is no training loss.
            if torch.is_grad_enabled() or not waiting:
                return
            a = waiting.pop()
            if a._version != version:
                # Autograd notices that itself, unless autocast let it save a copy in lower precision.
                warnings.warn(
                    f"The input of layer {name!r} was changed in place after the layer used it; its statistics are "
                    "left out. Write x = x + layer(x) instead of x += layer(x).",
                    stacklevel=2,
                )
                return
            with torch.autocast(g.device.type, enabled=False):
                listener(name, a, g)

        # A tensor hook, since a full backward hook fails if the next operation is in place (ReLU(inplace=True)).
        output.register_hook(on_grad)

    return on_forward
