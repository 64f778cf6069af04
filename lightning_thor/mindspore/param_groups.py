"""MindSpore's parameter groups: dictionaries with keys that torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lightning_thor.layers.discovery import unwrapped_name
from lightning_thor.mindspore.arguments import StepFunction, check_bool, check_number

Params = Sequence[nn.Parameter] | Sequence[Mapping[str, Any]]

KEYS = ("params", "lr", "weight_decay", "grad_centralization", "order_params")


@dataclass(frozen=True)
class Named:
    """The argument of ``decay_filter``: like a MindSpore parameter it has a ``.name``."""

    name: str


class Group(NamedTuple):
    """Parameters with the same settings."""

    parameters: list[nn.Parameter]
    learning_rate: StepFunction
    weight_decay: float
    grad_centralization: bool


def groups_of(
    net: nn.Module,
    params: Params | None,
    learning_rate: StepFunction,
    weight_decay: float,
    decay_filter: Callable[[Named], bool],
) -> list[Group]:
    """Make groups, each of which decays as a whole or not at all, from arguments of `lightning_thor.mindspore.thor`.

    Raises:
        TypeError: something in ``params`` is of the wrong type.
        ValueError: an unknown key, a parameter twice or of another network, ``grad_centralization`` of something that
            is not a convolution's, or ``order_params`` that are not all parameters.
    """
    names = {p: unwrapped_name(name) for name, p in net.named_parameters()}
    entries, order = _entries_of(names, params)
    place = {p: i for i, p in enumerate(order)}
    groups: list[Group] = []
    for label, entry in entries.items():
        own = sorted(entry["params"], key=place.__getitem__)
        rate = StepFunction(f"lr of {label}", entry["lr"]) if "lr" in entry else learning_rate
        centralize = entry.get("grad_centralization", False)
        check_bool(f"grad_centralization of {label}", centralize)
        if centralize:
            _check_convolutions(net, names, own, label)
        if "weight_decay" in entry:
            check_number(f"weight_decay of {label}", entry["weight_decay"], float, int)
            groups.append(Group(own, rate, float(entry["weight_decay"]), centralize))
            continue
        decays = {p: bool(decay_filter(Named(names[p]))) for p in own}
        for decay in (True, False):
            some = [p for p in own if decays[p] == decay]
            if some:
                groups.append(Group(some, rate, float(weight_decay) * decay, centralize))
    return groups


def _entries_of(
    names: Mapping[nn.Parameter, str], params: Params | None
) -> tuple[dict[str, dict[str, Any]], list[nn.Parameter]]:
    """The checked dictionaries, by their label in messages, and all parameters in the order of ``order_params``."""
    if params is None:
        params = [p for p in names if p.requires_grad]
    listed = _list_of("params", params)
    if all(isinstance(entry, nn.Parameter) for entry in listed):
        listed = [{"params": listed}]
    entries: dict[str, dict[str, Any]] = {}
    ordered: list[nn.Parameter] | None = None
    label_of: dict[nn.Parameter, str] = {}
    for number, entry in enumerate(listed):
        label = f"params[{number}]"
        if not isinstance(entry, Mapping):
            raise TypeError(
                f"params must be a list of Parameters or a list of dictionaries, got {type(entry).__name__} as {label}."
            )
        unknown = [key for key in entry if key not in KEYS]
        if unknown:
            raise ValueError(f"{label} has the unknown key {unknown[0]!r}; the keys are {', '.join(KEYS)}.")
        if "order_params" in entry:
            if len(entry) > 1 or ordered is not None:
                raise ValueError(f"order_params must be the only key of one dictionary, got {label} of {list(entry)}.")
            ordered = _parameters_of("order_params", entry["order_params"], names)
            continue
        if "params" not in entry:
            raise ValueError(f"{label} must have the key 'params', got {list(entry)}.")
        own = _parameters_of(f"{label}['params']", entry["params"], names)
        for p in own:
            if p in label_of:
                raise ValueError(f"The parameter {names[p]!r} is in {label_of[p]} and in {label}; it may be in one.")
            label_of[p] = label
        entries[label] = {**entry, "params": own}
    if not entries:
        raise ValueError("params has order_params alone: it needs dictionaries with the key 'params'.")
    if ordered is None:
        return entries, list(label_of)
    found, grouped = [names[p] for p in ordered], [names[p] for p in label_of]
    if sorted(found) != sorted(grouped):
        raise ValueError(
            "order_params must hold every parameter of the groups once and no other. "
            f"Missing: {sorted({*grouped} - {*found})}. In no group: {sorted({*found} - {*grouped})}. "
            f"Twice: {sorted({name for name in found if found.count(name) > 1})}."
        )
    return entries, ordered


def _parameters_of(label: str, values: Any, names: Mapping[nn.Parameter, str]) -> list[nn.Parameter]:
    parameters = _list_of(label, values)
    for p in parameters:
        if not isinstance(p, nn.Parameter):
            raise TypeError(f"{label} must hold Parameters, got {type(p).__name__}.")
        if p not in names:
            raise ValueError(f"{label} has a parameter of shape {tuple(p.shape)} that does not belong to net.")
    return parameters


def _list_of(label: str, values: Any) -> list[Any]:
    if not isinstance(values, Iterable) or isinstance(values, str | Mapping | nn.Parameter):
        raise TypeError(f"{label} must be a list, got {type(values).__name__}.")
    listed = list(values)
    if not listed:
        raise ValueError(f"{label} must not be empty: nothing to train.")
    return listed


def _check_convolutions(
    net: nn.Module, names: Mapping[nn.Parameter, str], parameters: list[nn.Parameter], label: str
) -> None:
    of_convolutions = {
        p for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters(recurse=False)
    }
    for p in parameters:
        if p not in of_convolutions:
            raise ValueError(
                f"grad_centralization of {label} is for convolutions only, and {names[p]!r} is not a convolution's "
                "parameter: put it into a group without."
            )
