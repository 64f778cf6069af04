"""The table of a curvature's options, for the two places that take them: `Curvature` and `ThorCallback`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from lightning_thor.curvature.callables import StepFn
from lightning_thor.factors.damping import RULES
from lightning_thor.factors.trace_rule import trace_rule_of
from lightning_thor.layers.registry import STATISTICS, KfacApprox
from lightning_thor.preconditioning.modes import MODES

Schedule = float | StepFn


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_fused(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and _is_count(n) for key, n in value.items())


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _is_trace_rule(value: Any) -> bool:
    trace_rule_of(value)  # its error says more
    return True


def _one_of(names: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in names, f"must be one of {', '.join(names)}"


OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "mode": _one_of(MODES),
    "damping": (
        # Not math.isfinite, which fails for an int that no float can represent.
        lambda value: callable(value) or (_is_number(value) and 0 < value <= sys.float_info.max),
        "must be greater than 0 (or a function of the step)",
    ),
    "damping_rule": _one_of(RULES),
    "block_size": (
        lambda value: value is None or _is_count(value),
        'must be an int of at least 1, None for whole factors, or "auto" (ThorCallback)',
    ),
    "update_every_n_steps": (
        lambda value: value is None or callable(value) or _is_count(value),
        "must be an int of at least 1 (or a function of the step, or None: often at first)",
    ),
    "averaging": (
        lambda value: _is_number(value) and 0.0 <= value < 1.0,
        "must lie in [0, 1); 0 uses the last batch alone",
    ),
    **dict.fromkeys(("precondition_bias", "stagger"), (lambda value: isinstance(value, bool), "must be True or False")),
    "trace_rule": (_is_trace_rule, ""),
    "max_rows": (lambda value: value is None or _is_count(value), "must be an int of at least 1, or None for all rows"),
    "statistics": (
        lambda value: isinstance(value, KfacApprox) or (isinstance(value, str) and value in STATISTICS),
        f"must be one of {', '.join(STATISTICS)}",
    ),
    "loss_reduction": (lambda value: isinstance(value, str) and value in ("mean", "sum"), "must be 'mean' or 'sum'"),
    **dict.fromkeys(
        ("loss_multiplier", "loss_terms"),
        (lambda value: value is None or callable(value), "must be a function without arguments, or None"),
    ),
    "fused": (
        lambda value: value is None or _is_fused(value),
        "must map patterns of layer names to numbers of parts, such as {'*.qkv': 3}",
    ),
    "skip_layers": (_are_names, "must be a list of names of layers, or patterns of names, such as ['head']"),
    "output_layer": (lambda value: isinstance(value, str | None), "must be the name of a layer, or None"),
}
"""By name: whether a value can be the option, and what it must be. To add an option, add its line here, its argument
and description to `Curvature`, and its argument to `ThorCallback` (jsonargparse reads the signature for the YAML)."""


def check_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check values by name, and return those among them that are options.

    Raises:
        ValueError: what was given, and what is allowed.
    """
    options = {name: given[name] for name in OPTIONS if name in given}
    if options.get("block_size") == "auto":
        raise ValueError(
            'block_size="auto" needs a batch of data to measure with: under a Trainer give it to ThorCallback; '
            "outside, call lightning_thor.choose_block_size(model, loss_of_a_batch) and give "
            "its block_size here."
        )
    for name, value in options.items():
        is_allowed, rule = OPTIONS[name]
        if not is_allowed(value):
            raise ValueError(f"{name} {rule}, got {value!r}.")
    return options
