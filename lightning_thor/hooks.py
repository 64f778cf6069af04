"""Hands pairs (name, a, g) of the layers that are asked for to a listener."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_thor.attention import Noting

Listener = Callable[[str, Tensor, Tensor], None]
IsOpen = Callable[[str], bool]
Announce = Callable[[str], None]


class Hooks:
    """Forward hooks that pair each layer's input with the gradient of its output.

    A pair is handed over when the gradient arrives, so activation checkpointing, unused outputs and passes without
    gradients give exactly the pairs that backward used. The hooks change nothing and do nothing unless ``is_open``.

    Args:
        modules: what to listen to, by name.
        is_open: whether the module of that name is to be observed in the present forward pass.
        listener: called in backward, without autograd, with the name, the input and the output's gradient.
        attentions: further names, by what they stand for in an attention (see `lightning_thor.attention.ROLES`);
            their pairs are batch first, ``[batch, positions, width]``.
        announce: called in forward with the name, for each pair that backward is to hand over.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        is_open: IsOpen,
        listener: Listener,
        attentions: Mapping[nn.MultiheadAttention, Mapping[str, str]] | None = None,
        announce: Announce = lambda name: None,
    ) -> None:
        self._handles: list[RemovableHandle] = [
            # Under torch.compile the hook reads a Python counter, which would recompile at every step.
            module.register_forward_hook(
                torch.compiler.disable(_forward_hook(name, module, is_open, listener, announce)), with_kwargs=True
            )
            for name, module in modules.items()
        ]
        for attention, names in (attentions or {}).items():
            before, after = _attention_hooks(names, attention, is_open, listener, announce)
            self._handles.append(attention.register_forward_pre_hook(torch.compiler.disable(before)))
            # Whatever happens in between: a forward pass that fails must not leave its notes open.
            self._handles.append(attention.register_forward_hook(torch.compiler.disable(after), always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _forward_hook(
    name: str, owner: nn.Module, is_open: IsOpen, listener: Listener, announce: Announce
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    # A closure, since copy.deepcopy of the model (SWA, EMA) copies hooks: it shares functions but would copy an object.
    def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is not owner or not torch.is_grad_enabled() or not is_open(name):
            return
        _pair(name, args[0] if args else next(iter(kwargs.values()), None), output, listener, announce)

    return on_forward


def _attention_hooks(
    names: Mapping[str, str], owner: nn.Module, is_open: IsOpen, listener: Listener, announce: Announce
) -> tuple[Callable[[nn.Module, Any], None], Callable[[nn.Module, Any, Any], None]]:
    entered: list[ExitStack] = []

    def note(role: str, a: Tensor, output: Tensor, arranged: Callable[[Tensor], Tensor]) -> None:
        if role in names and is_open(names[role]):
            _pair(names[role], a, output, listener, announce, arranged)

    def before(module: nn.Module, args: Any) -> None:
        if module is owner and torch.is_grad_enabled() and any(is_open(name) for name in names.values()):
            entered.append(ExitStack())
            entered[-1].enter_context(Noting(note))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if module is owner and entered:
            entered.pop().close()

    return before, after


def _pair(
    name: str,
    a: Any,
    output: Any,
    listener: Listener,
    announce: Announce,
    arranged: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Hand ``(name, a, g)`` over when the gradient of ``output`` arrives, both ``arranged``."""
    if not isinstance(output, Tensor) or not output.requires_grad:
        return
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
            listener(name, arranged(a), arranged(g))

    announce(name)
    # A tensor hook, since a full backward hook fails if the next operation is in place (ReLU(inplace=True)).
    output.register_hook(on_grad)
