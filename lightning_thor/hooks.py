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
IsDue = Callable[[str], bool]
Announce = Callable[[str], None]
Thin = Callable[[str, Tensor], Tensor]


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
        thin: gives what of an input is needed, where autograd does not keep that input itself: under autocast, which
            lets it save a copy in lower precision.
        is_due: asked before all else, as it is in each forward pass of a training: false only where ``is_open`` would
            be false too. A plain function that calls no other.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        is_open: IsOpen,
        listener: Listener,
        attentions: Mapping[nn.MultiheadAttention, Mapping[str, str]] | None = None,
        announce: Announce = lambda name: None,
        thin: Thin = lambda name, a: a,
        is_due: IsDue = lambda name: True,
    ) -> None:
        from torch._dynamo import decorators  # takes a second, like all of dynamo

        # Under torch.compile hooks read Python counters, which would recompile at every step. What dynamo skips is as
        # it was, while what is disabled (all that it calls with it) costs a wrapper, which is most of an idle hook. The
        # former is no public function: where it is missing the latter does, at that cost.
        skip = getattr(decorators, "skip", torch.compiler.disable)
        is_due = skip(is_due)
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(
                skip(_forward_hook(name, module, is_open, listener, announce, thin, is_due)), with_kwargs=True
            )
            for name, module in modules.items()
        ]
        for attention, names in (attentions or {}).items():
            before, after = _attention_hooks(names, attention, is_open, listener, announce, is_due)
            self._handles.append(attention.register_forward_pre_hook(skip(before)))
            # Whatever happens in between: a forward pass that fails must not leave its notes open.
            self._handles.append(attention.register_forward_hook(skip(after), always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def are_removed(self) -> bool:
        return not self._handles

    def remove_from_copy(self, model: nn.Module) -> None:
        """Remove what a copy of the model has of these hooks, which are silent there."""
        ids = {handle.id for handle in self._handles}
        for module in model.modules():
            for hooks in (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
                module._forward_pre_hooks,
                module._forward_pre_hooks_with_kwargs,
            ):
                for dead in ids & hooks.keys():
                    del hooks[dead]


def _forward_hook(
    name: str,
    owner: nn.Module,
    is_open: IsOpen,
    listener: Listener,
    announce: Announce,
    thin: Thin,
    is_due: IsDue,
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    # A closure, since copy.deepcopy of the model (SWA, EMA) copies hooks: it shares functions but would copy an object.
    def pair(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if is_open(name):
            a = args[0] if args else next(iter(kwargs.values()), None)
            _pair(name, a, output, listener, announce, thin=thin)

    pair_unseen = torch.compiler.disable(pair)

    def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if is_due(name) and torch.is_grad_enabled() and module is owner:
            pair_unseen(args, kwargs, output)

    return on_forward


def _attention_hooks(
    names: Mapping[str, str],
    owner: nn.Module,
    is_open: IsOpen,
    listener: Listener,
    announce: Announce,
    is_due: IsDue,
) -> tuple[Callable[[nn.Module, Any], None], Callable[[nn.Module, Any, Any], None]]:
    entered: list[ExitStack] = []

    def note(role: str, a: Tensor, output: Tensor, arranged: Callable[[Tensor], Tensor]) -> None:
        if role in names and is_open(names[role]):
            _pair(names[role], a, output, listener, announce, arranged)

    def enter() -> None:
        if any(is_open(name) for name in names.values()):
            entered.append(ExitStack())
            entered[-1].enter_context(Noting(note))

    def leave() -> None:
        entered.pop().close()

    enter_unseen, leave_unseen = torch.compiler.disable(enter), torch.compiler.disable(leave)

    def before(module: nn.Module, args: Any) -> None:
        for name in names.values():
            if is_due(name) and torch.is_grad_enabled() and module is owner:
                enter_unseen()
                return

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if entered and module is owner:
            leave_unseen()

    return before, after


def _pair(
    name: str,
    a: Any,
    output: Any,
    listener: Listener,
    announce: Announce,
    arranged: Callable[[Tensor], Tensor] = lambda x: x,
    thin: Thin = lambda name, a: a,
) -> None:
    """Hand ``(name, a, g)`` over when the gradient of ``output`` arrives, both ``arranged``."""
    if not isinstance(output, Tensor) or not output.requires_grad:
        return
    if not isinstance(a, Tensor) or a.layout is not torch.strided:
        return
    device = a.device.type
    if torch.is_autocast_enabled(device) and a.dtype != torch.get_autocast_dtype(device):
        a = thin(name, a)
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
        if not torch.is_autocast_enabled(g.device.type):
            listener(name, arranged(a), arranged(g))
            return
        with torch.autocast(g.device.type, enabled=False):
            listener(name, arranged(a), arranged(g))

    announce(name)
    # A tensor hook, since a full backward hook fails if the next operation is in place (ReLU(inplace=True)).
    output.register_hook(on_grad)
