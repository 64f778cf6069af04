"""The state of a curvature as plain types and tensors, taking it over, and refusing a damaged one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_thor.curvature.refresh_schedule import RefreshSchedule
from lightning_thor.factors.layout import Factors
from lightning_thor.factors.state import FactorState
from lightning_thor.layers.discovery import name_some
from lightning_thor.preconditioning.modes import MODES

COUNTS = ("step", "refreshes", "turns", "failed_inversions", "rejected_windows")
"""What a state counts, each at least 0."""


LAYER_COUNTS = ("updates", "positions", "next_turn", "_added")
"""How the names of those tensors of a layer end that are at least 0 too."""


def check_state(state: Any) -> None:
    """Refuse a state that lacks a part, or in which a part is of another kind; see `check_layer_tensors`.

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


def check_layer_tensors(layers: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Tensor]]) -> None:
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


def curvature_state(
    factors: Factors, stacks: FactorState, schedule: RefreshSchedule, *, step: int, mode: str
) -> dict[str, Any]:
    """Steps, factors and the inverses that are kept, by layer name; the tensors are those of ``stacks``, not copies.

    Args:
        factors: of each layer.
        stacks: where they lie.
        schedule: which layers are due when; verdicts that are under way are waited for.
        step: applied steps so far.
        mode: of the curvature.
    """
    schedule.settle()
    done, turns = schedule.refreshes, schedule.turns(step)
    kept = stacks.decomposition.name
    layers: dict[str, dict[str, Tensor]] = {}
    for index, (name, sides) in enumerate(factors.items()):
        layers[name] = {
            "updates": stacks.updates[index],
            "positions": stacks.positions[index],
            "next_turn": torch.tensor(schedule.next_steps[index]),
            "turn_is_probe": torch.tensor(schedule.is_probe[index]),
            "has_stopped": torch.tensor(schedule.has_stopped[index]),
        }
        for side, factor in sides.items():
            layers[name][side] = stacks.blocks_of(factor, "average")
            layers[name][f"{side}_added"] = stacks.last_damping[factor]
            if index in stacks.has_inverse:
                layers[name][f"{side}_{kept}"] = stacks.blocks_of(factor, "inverse")
                layers[name][f"{side}_inverted"] = stacks.inverted_of(factor)
        if index in stacks.tied_averages:
            layers[name]["table_A"], layers[name]["table_G"] = stacks.tied_averages[index]
    return {
        "step": step,
        "refreshes": done,
        "turns": turns,
        "mode": mode,
        "failed_inversions": stacks.failed_inversions,
        "rejected_windows": stacks.rejected_windows,
        "gradient_unit": None if stacks.gradient_unit is None else float(stacks.gradient_unit),
        "layers": layers,
    }


def load_curvature_state(
    state: Mapping[str, Any],
    factors: Factors,
    stacks: FactorState,
    schedule: RefreshSchedule,
    *,
    step: int,
    mode: str,
) -> int:
    """Bring ``stacks`` and ``schedule`` to what `curvature_state` gave; inverses that it lacks are computed again.

    Args:
        state: the snapshot.
        factors, stacks, schedule, step, mode: of the curvature as it is, see `curvature_state`.

    Returns:
        The snapshot's step.

    Raises:
        ValueError: the snapshot is of another mode, other layers, or of other block sizes, or it is damaged; nothing
            was changed.
    """
    check_state(state)
    its_mode = state.get("mode", "natural")  # there was no other before there were modes
    if its_mode != mode:
        raise ValueError(
            f"The checkpoint's curvature is of mode={its_mode!r}, this one of mode={mode!r}: they keep different "
            f"tensors, and so does the momentum. Resume with Thor(mode={its_mode!r}), or start a new fit from the "
            "checkpoint's weights alone."
        )
    layers = state["layers"]
    own = curvature_state(factors, stacks, schedule, step=step, mode=mode)["layers"]
    _check_that_layers_are_the_same(layers, own)
    check_layer_tensors(layers, own)
    for name, tensors in own.items():
        for key in tensors.keys() & layers[name].keys():
            tensors[key].copy_(layers[name][key])
    elsewhere = [index for index, name in enumerate(own) if own[name].keys() - layers[name].keys()]
    failed = int(stacks.recompute_inverses(elsewhere)) if elsewhere else 0
    if failed:
        warnings.warn(
            f"The checkpoint holds no inverses of some layers, which other processes kept, and {failed} blocks of them "
            "cannot be inverted from their averages, as they could not when it was saved: they take the identity over "
            "their mean eigenvalue until their next refresh. If this goes on, raise damping.",
            stacklevel=4,
        )
    stacks.failed_inversions.fill_(int(state["failed_inversions"]))
    stacks.rejected_windows.fill_(int(state["rejected_windows"]))
    stacks.gradient_unit = state.get("gradient_unit", 1.0)  # which it was before it was saved
    saved = [layers[name] for name in own]
    schedule.restore(
        next_steps=[int(layer["next_turn"]) for layer in saved],
        is_probe=[bool(layer["turn_is_probe"]) for layer in saved],
        has_stopped=[bool(layer["has_stopped"]) for layer in saved],
        refreshes=int(state["refreshes"]),
        turns=int(state["turns"]),
    )
    return int(state["step"])


def _check_that_layers_are_the_same(
    layers: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Tensor]]
) -> None:
    # Endings of the names of tensors that only the owners of a layer's inverses have.
    owned = (*(f"_{mode.decomposition.name}" for mode in MODES.values()), "_inverted")
    missing, unknown = sorted(own.keys() - layers.keys()), sorted(layers.keys() - own.keys())
    differing = [
        f"{name}.{key}: {_shape(layers[name].get(key)) or 'nothing'} in the checkpoint, {_shape(tensor)} here"
        for name in own
        if name in layers
        for key, tensor in own[name].items()
        if key in layers[name] or not key.endswith(owned)
        if _shape(layers[name].get(key)) != _shape(tensor)
    ]
    if missing or unknown or differing:
        raise ValueError(
            "The checkpoint's curvature is of another architecture or of other block sizes. "
            f"Not in the checkpoint: {name_some(missing)}. Only in the checkpoint: {name_some(unknown)}. "
            f"Other shapes: {name_some(differing)}. Use the model, block_size and precondition_bias of the run that "
            "was saved, with the same layers frozen; or start without its curvature by deleting "
            "checkpoint['callbacks']['ThorCallback']."
        )


def _shape(value: Any) -> str | None:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    return None if value is None else type(value).__name__
