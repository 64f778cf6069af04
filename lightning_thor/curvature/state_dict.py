"""The state of a curvature as plain types and tensors, taking it over, and refusing a damaged one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_thor.curvature.refresh_schedule import NEVER, REJECTED, RefreshSchedule
from lightning_thor.factors.layout import SIDES
from lightning_thor.factors.state import FactorState
from lightning_thor.factors.trace_rule import DECISIONS
from lightning_thor.layers.discovery import name_some
from lightning_thor.preconditioning.modes import MODES

COUNTS = ("step", "refreshes", "turns", "failed_inversions", "rejected_windows")
"""What a state counts, each at least 0."""

LAYER_COUNTS = ("updates", "positions", "next_turn", "_added", "rarest")
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
        raise _damaged(f"it has no {', '.join(missing)} (version 0.1.0 saved no refreshes and turns)")
    for key in COUNTS:
        number = state[key]
        if isinstance(number, Tensor):
            number = number.item() if number.numel() == 1 and not number.is_meta else None
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**63:
            raise _damaged(f"its {key} is no whole number of at least 0, but {state[key]!r}")
    unit, loss_layer = state.get("gradient_unit"), state.get("loss_layer")
    if unit is not None and not (isinstance(unit, float) and math.isfinite(unit) and unit > 0):
        raise _damaged(f"its gradient_unit is no number above 0, but {unit!r}")
    if not isinstance(loss_layer, str | None):
        raise _damaged(f"its loss_layer is no name of a layer, but {loss_layer!r}")
    if not isinstance(state["layers"], Mapping):
        raise _damaged(f"its layers are a {type(state['layers']).__name__}, not a dict")
    pending, n_layers = _pending(state), len(state["layers"])
    if not isinstance(pending, list) or not all(_is_decided(one, n_layers) for one in pending):
        raise _damaged(f"its pending decisions are none, but {state['pending']!r}")
    if not _are_costs(state.get("refresh_costs", []), n_layers):
        raise _damaged(f"its refresh_costs are no number of at least 0 for each layer, but {state['refresh_costs']!r}")
    for name, tensors in state["layers"].items():
        if not isinstance(name, str):
            raise _damaged(f"the name of a layer is {name!r}, not a string")
        if not isinstance(tensors, Mapping):
            raise _damaged(f"layer {name!r} is a {type(tensors).__name__}, not a dict")


def _pending(state: Mapping[str, Any]) -> Any:
    """Decisions that are still to be followed, as `RefreshSchedule.pending` returns them; each was a dict at first."""
    pending = state.get("pending", [])
    if not isinstance(pending, list):
        return pending
    names = ("step", "layers", "decisions")
    return [[one.get(name) for name in names] if isinstance(one, Mapping) else one for one in pending]


def _is_decided(one: Any, n_layers: int) -> bool:
    """True for each of what `RefreshSchedule.pending` returns: one decision for each of some of the layers."""
    match one:
        case [int(step), list(layers), list(decisions)] if isinstance(one, list) and len(layers) == len(decisions):
            return (
                step >= 0
                and all(isinstance(layer, int) and 0 <= layer < n_layers for layer in layers)
                and all(isinstance(decision, int) and decision in (*DECISIONS, REJECTED) for decision in decisions)
            )
    return False


def _are_costs(costs: Any, n_layers: int) -> bool:
    """True for a number for each layer, or an empty list: they are measured only for staggered refreshes."""
    return (
        isinstance(costs, list)
        and len(costs) in (0, n_layers)
        and all(isinstance(cost, float) and math.isfinite(cost) and cost >= 0 for cost in costs)
    )


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
    if saved.is_meta or saved.layout != torch.strided:
        yield "has no numbers of its own" if saved.is_meta else f"is of the layout {saved.layout}"
    elif _kind(saved.dtype) != _kind(own.dtype):
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
    names: Sequence[str], factors: FactorState, schedule: RefreshSchedule, *, mode: str
) -> dict[str, Any]:
    """Steps, factors and the inverses that are stored here, by name of the layer, as plain types and tensors.

    The tensors are those of ``factors``, whose layers have these ``names``, in this order; they are not copied.
    Decisions under way are waited for.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    turns = schedule.turns()
    for number, name in enumerate(names):
        layers[name] = {
            "updates": factors.updates[number],
            "positions": factors.positions[number],
            "next_turn": torch.tensor(schedule.next_steps[number], device="cpu"),
            "has_stopped": torch.tensor(schedule.has_stopped[number], device="cpu"),
        }
        for side, _ in factors.layout.factors(number):
            layers[name][side] = factors.blocks(number, side, "average")
            layers[name][f"{side}_added"] = factors.last_damping[number, SIDES.index(side)]
            if number in factors.has_inverse:
                layers[name][f"{side}_{factors.decomposition.name}"] = factors.blocks(number, side, "inverse")
                layers[name][f"{side}_inverted"] = factors.inverted(number, side)
        if number in factors.tables:
            layers[name]["rarest"] = factors.rarest[number]
        if number in factors.tied_averages:
            layers[name]["table_A"], layers[name]["table_G"] = factors.tied_averages[number]
    return {
        "step": schedule.step,
        "refreshes": schedule.refreshes,
        "turns": turns,
        "pending": schedule.pending(),
        "refresh_costs": list(schedule.costs),
        "mode": mode,
        "failed_inversions": factors.failed_inversions,
        "rejected_windows": factors.rejected_windows,
        "gradient_unit": None if factors.gradient_unit is None else float(factors.gradient_unit),
        "layers": layers,
    }


def add_inverses(
    state: dict[str, Any],
    names: Sequence[str],
    factors: FactorState,
    sum_over_owners: Callable[[Tensor], Tensor],
    *,
    keeps: bool,
) -> None:
    """Add the inverses that other processes store to a state, on the host; all processes must call it.

    Args:
        state: what `curvature_state` returned; changed in place.
        names: of the layers, in the order of ``factors``.
        factors: stores some of the inverses.
        sum_over_owners: sums a tensor, in place, over processes that store the inverses of each layer once together.
        keeps: whether this process is to have them; otherwise it only sends its own.
    """
    for number, name in enumerate(names):
        for side, blocks in factors.layout.factors(number):
            records = sum_over_owners(factors.inverse_records(number, side))
            if keeps and number not in factors.has_inverse:
                records = records.cpu()
                state["layers"][name][f"{side}_{factors.decomposition.name}"] = records[:, :-1].reshape(blocks.shape)
                state["layers"][name][f"{side}_inverted"] = records[:, -1] > 0


def load_curvature_state(
    state: Mapping[str, Any], names: Sequence[str], factors: FactorState, schedule: RefreshSchedule, *, mode: str
) -> None:
    """Bring ``factors`` and ``schedule`` of the layers ``names`` to a state that `curvature_state` returned; inverses
    that it lacks are computed again.

    Raises:
        ValueError: the state is of another mode, other layers, or of other block sizes, or it is damaged; nothing
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
    own = curvature_state(names, factors, schedule, mode=mode)["layers"]
    # States of before lack it.
    unknown = {name: {"rarest": torch.zeros(())} for name in own if "rarest" in own[name]}
    layers = {name: {**unknown.get(name, {}), **tensors} for name, tensors in state["layers"].items()}
    _check_that_layers_are_the_same(layers, own)
    check_layer_tensors(layers, own)
    for name, tensors in own.items():
        for key in tensors.keys() & layers[name].keys():
            tensors[key].copy_(layers[name][key])
    elsewhere = [number for number, name in enumerate(own) if own[name].keys() - layers[name].keys()]
    failed = int(factors.recompute_inverses(elsewhere)) if elsewhere else 0
    if failed:
        warnings.warn(
            f"The checkpoint holds no inverses of some layers, which other processes kept, and {failed} blocks of them "
            "cannot be inverted from their averages, as they could not when it was saved: they take the identity over "
            "their mean eigenvalue until their next refresh. If this goes on, raise damping.",
            stacklevel=4,
        )
    factors.failed_inversions.fill_(int(state["failed_inversions"]))
    factors.rejected_windows.fill_(int(state["rejected_windows"]))
    factors.gradient_unit = state.get("gradient_unit", 1.0)  # which it was before it was saved
    saved = [layers[name] for name in own]
    schedule.restore(
        step=int(state["step"]),
        next_steps=[int(layer["next_turn"]) for layer in saved],
        has_stopped=[bool(layer["has_stopped"]) for layer in saved],
        refreshes=int(state["refreshes"]),
        turns=int(state["turns"]),
        pending=_pending(state),
        costs=state.get("refresh_costs", ()),
    )


def extended_state(
    state: Mapping[str, Any], fresh: Mapping[str, Any], *, spreads: bool
) -> tuple[dict[str, Any], list[str]]:
    """A state with further layers, which are due at its step.

    Args:
        state: of some of the layers.
        fresh: of all of them; taken for those that ``state`` lacks, or has in other shapes.
        spreads: have all layers due, to be spread over the interval anew.

    Returns:
        The state, and the names of the further layers.
    """
    old, due = state["layers"], {"next_turn": torch.tensor(state["step"], device="cpu")}
    same = {
        name
        for name, own in fresh["layers"].items()
        if name in old and _factor_shapes(own) == _factor_shapes(old[name])
    }
    new = [name for name in fresh["layers"] if name not in same]
    layers = {name: old[name] if name in same else {**own, **due} for name, own in fresh["layers"].items()}
    spreads = spreads and bool(new)
    if spreads:
        layers = {name: {**own, **due} if own["next_turn"] < NEVER else own for name, own in layers.items()}
    names, numbers = list(old), {name: number for number, name in enumerate(layers) if name in same}
    pending = []
    for step, decided_layers, decisions in _pending(state):
        decided = [(names[layer], decision) for layer, decision in zip(decided_layers, decisions, strict=True)]
        kept = [(numbers[name], decision) for name, decision in decided if name in numbers]
        pending.append([step, [layer for layer, _ in kept], [decision for _, decision in kept]])
    costs = [] if new else state.get("refresh_costs", [])
    return {**state, "layers": layers, "pending": pending, "refresh_costs": costs}, new


def _factor_shapes(tensors: Mapping[str, Tensor]) -> list[str | None]:
    return [_shape(tensors.get(key)) for key in ("A", "G", "table_A", "table_G")]


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
            f"Other shapes: {name_some(differing)}. Use the model, block_size, precondition_bias, statistics and "
            "fused of the run that was saved, with the same layers frozen or skipped; or start without its curvature "
            "by deleting checkpoint['callbacks']['ThorCallback']."
        )


def _shape(value: Any) -> str | None:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    return None if value is None else type(value).__name__
