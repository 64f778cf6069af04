"""Why a layer that was due had no pair: one cause, with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from lightning_thor.layers.base import Layer
from lightning_thor.layers.discovery import name_some
from lightning_thor.layers.matrices import MatricesKind
from lightning_thor.layers.recurrent import RECURRENT


class Call(Enum):
    """What became of the last call of a layer that was due."""

    OBSERVED = "its input waited for a gradient"
    UNREADABLE = "its first argument was no tensor of rows, or its steps in time could not be seen"
    CHANGED = "its input was changed in place before its gradient came"
    PAUSED = "within `Curvature.paused`"
    NOT_TRAINING = "in eval mode, or outside of the Trainer's training"


def why_silent(layer: Layer, call: Call | None) -> str:
    """Say why a layer had no pair, and what to do.

    Args:
        layer: one that was due.
        call: its last one since the step before; None if its module was not called.
    """
    has_gradient = any(p.grad is not None for p in layer.parameters)
    if not any(use.trains for use in layer.uses):
        return "frozen since"
    if call is Call.PAUSED:
        return "called within curvature.paused() alone"
    if call is Call.NOT_TRAINING:
        return "called in eval mode alone (call model.train() before)"
    if call is Call.CHANGED:
        return "its input was changed in place after it (write x = x + layer(x) instead of x += layer(x))"
    if call is Call.UNREADABLE and layer.kind is RECURRENT:
        return "what autograd saves of it goes elsewhere (checkpointed or offloaded activations): keep it out of that"
    if call is Call.UNREADABLE:
        return "its first argument is not its input as a plain tensor (of torch.Tensor, dense), which has the rows"
    if has_gradient and isinstance(layer.kind, MatricesKind):
        return (
            "no product with it was seen (its module must be called, not compiled, and multiply by the parameter, or a "
            "view of it, in the order of dimensions that register_layer was told)"
        )
    if call is Call.OBSERVED and has_gradient and layer.is_within_its_module and layer.kind is not RECURRENT:
        return (
            "no product with it was seen (its forward must call torch's function, outside of torch.func and vmap, with "
            "the weight itself and not another; a convolution or a masked linear layer may also call it with what it "
            "computes from the weight, in its shape)"
        )
    if call is Call.OBSERVED:
        return (
            "its gradient did not come through its output by loss.backward() (a loss of its output's derivatives "
            "alone, such as forces, gives none; else call the module outside of torch.func and vmap, and no "
            "torch.autograd.grad in place of loss.backward())"
            if has_gradient
            else "called, but the loss does not depend on its output"
        )
    if not has_gradient:
        return "its module was not called, or under torch.no_grad alone"
    return (
        "its weight has a gradient, but its module was not called (call the module, not its forward, nor F.linear or "
        "functional_call with its weight)"
    )


def silent_layers(numbers: Iterable[int], names: list[str], cause_of: Callable[[int], str]) -> str:
    """Name the layers of these ``numbers`` among all ``names`` by cause, see `why_silent`.

    >>> silent_layers([0, 2, 3], ["a", "b", "c", "d"], ["unused", "", "unused", "frozen since"].__getitem__)
    'a, c: unused. d: frozen since.'
    """
    by_cause: dict[str, list[str]] = {}
    for number in numbers:
        by_cause.setdefault(cause_of(number), []).append(names[number])
    return " ".join(f"{name_some(some)}: {cause}." for cause, some in by_cause.items())
