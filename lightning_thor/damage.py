"""What is wrong with a saved state of a curvature, beside being another model's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

COUNTS = ("step", "refreshes", "turns", "failed_inversions", "rejected_windows")
"""What a state counts, each at least 0."""
LAYER_COUNTS = ("updates", "positions", "next_turn", "_added")
"""How the names of those tensors of a layer end that are at least 0 too."""


def refuse_damaged(state: Any) -> None:
    """Refuse a state that lacks a part, or in which a part is of another kind; see `refuse_damaged_layers`.

    Raises:
        ValueError: what is missing or wrong, and what to do.
    """
    if not isinstance(state, Mapping):
        raise _damaged(f"it is a {type(state).__name__}, not a dict")
    missing = [key for key in (*COUNTS, "layers") if key not in state]
    if missing:
        raise _damaged(f"it has no {', '.join(missing)}")
    for key in COUNTS:
        number = state[key]
        if isinstance(number, Tensor):
            number = number.item() if number.numel() == 1 else None
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise _damaged(f"its {key} is no whole number of at least 0, but {state[key]!r}")
    unit, loss_layer = state.get("gradient_unit"), state.get("loss_layer")
    if unit is not None and not (isinstance(unit, float) and math.isfinite(unit) and unit > 0):
        raise _damaged(f"its gradient_unit is no number above 0, but {unit!r}")
    if not isinstance(loss_layer, str | None):
        raise _damaged(f"its loss_layer is no name of a layer, but {loss_layer!r}")
    if not isinstance(state["layers"], Mapping):
        raise _damaged(f"its layers are a {type(state['layers']).__name__}, not a dict")
    for name, tensors in state["layers"].items():
        if not isinstance(name, str):
            raise _damaged(f"the name of a layer is {name!r}, not a string")
        if not isinstance(tensors, Mapping):
            raise _damaged(f"layer {name!r} is a {type(tensors).__name__}, not a dict")


def refuse_damaged_layers(layers: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse tensors that are of another kind than this curvature's own, not finite, or negative where they count.

    Args:
        layers: of the state.
        own: what this curvature would save; of the same layers and shapes.

    Raises:
        ValueError: which tensors of which layers, and what to do.
    """
    faults = [
        f"{key} of layer {name!r} {fault}"
        for name in own
        for key, tensor in own[name].items()
        if key in layers[name]
        for fault in _faults_of(layers[name][key], tensor, counts=key.endswith(LAYER_COUNTS))
    ]
    if faults:
        more = f" (and {len(faults) - 3} more such faults)" if len(faults) > 3 else ""
        raise _damaged("; ".join(faults[:3]) + more)


def _faults_of(saved: Tensor, own: Tensor, *, counts: bool) -> Iterator[str]:
    if _kind(saved.dtype) != _kind(own.dtype):
        yield f"is of {saved.dtype}, not of {own.dtype}"
    elif not torch.isfinite(saved).all():
        yield "is not finite"
    elif counts and (saved < 0).any():
        yield "is negative"


def _kind(dtype: torch.dtype) -> str:
    # A curvature of float32 goes on in one of float64.
    if dtype.is_floating_point:
        return "float"
    return "bool" if dtype == torch.bool else "complex" if dtype.is_complex else "int"


def _damaged(fault: str) -> ValueError:
    return ValueError(
        f"The checkpoint's curvature is damaged or incomplete: {fault}. Nothing was changed. Go on from another "
        "checkpoint; or start without its curvature by deleting checkpoint['callbacks']['ThorCallback']."
    )
