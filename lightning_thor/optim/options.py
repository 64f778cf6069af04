"""The options of a parameter group of `Thor`: their ranges, and which go together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from typing import Any

from torch import Tensor

from lightning_thor.preconditioning.modes import MODES

POSITIVE_OR_NONE = ("match_rms", "max_relative_step", "kl_clip", "clip_norm")
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("be 0 or greater", lambda x: x >= 0),
    "momentum": ("lie in [0, 1)", lambda x: 0 <= x < 1),
    "beta2": ("lie in [0, 1)", lambda x: 0 <= x < 1),
    "rms_averaging": ("lie in [0, 1)", lambda x: 0 <= x < 1),
    "weight_decay": ("be 0 or greater", lambda x: x >= 0),
    **dict.fromkeys(POSITIVE_OR_NONE, ("be greater than 0, or None to turn it off", lambda x: x > 0)),
}
"""Options that are finite numbers, with their range in words and as a condition."""

SWITCHES = ("nesterov", "decoupled_weight_decay")
"""Options that are True or False."""

OPTIONS = ("mode", *SWITCHES, *RANGES)

FORMER: Mapping[str, Any] = {"max_relative_step": None, "rms_averaging": 0.0}
"""Options that checkpoints of earlier versions lack, with the value that continues their training unchanged."""

FOREIGN_OPTIONS = (
    'AdamW\'s betas are momentum and, with mode="adam", beta2. damping, block_size, update_every_n_steps and what else '
    "concerns the curvature are options of ThorCallback, or outside Lightning of Curvature. A strategy is an option of "
    "the Trainer: Trainer(strategy=...)."
)
"""For those who give `Thor` options of others."""


def unknown_options(names: Iterable[str], known: Iterable[str]) -> str:
    """``names`` of options that an optimizer or a callback does not have, each with the one that was probably meant.

    >>> unknown_options({"weight_deacy", "foo"}, ["lr", "weight_decay"])
    'foo, weight_deacy (weight_decay?)'
    """
    known = list(known)
    near = {name: get_close_matches(name, known, n=1, cutoff=0.85) for name in sorted(names)}
    return ", ".join(f"{name} ({found[0]}?)" if found else name for name, found in near.items())


def check_group(group: Mapping[str, Any], unknown: Collection[str]) -> None:
    """Check the options of a parameter group.

    Args:
        group: with all options.
        unknown: keys of it that are no options.

    Raises:
        ValueError: an option is unknown, out of its range, or does not go with another one.
    """
    if unknown:
        names = unknown_options(unknown, OPTIONS)
        raise ValueError(f"Thor does not know the option {names} of a parameter group. {FOREIGN_OPTIONS}")
    if group["mode"] not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {group['mode']!r}.")
    if isinstance(group["lr"], Tensor):
        raise ValueError("lr must be a number, got a Tensor: Thor's step would have to wait for it.")
    for option, (words, is_in_range) in RANGES.items():
        value = group[option]
        if value is None and option in POSITIVE_OR_NONE:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{option} must be a number, got {value!r}.")
        # Not math.isfinite, which fails for an int that no float can represent.
        if not (abs(value) <= sys.float_info.max and is_in_range(float(value))):  # type: ignore[operator]
            raise ValueError(f"{option} must {words}, got {value!r}.")
    for option in SWITCHES:
        if not isinstance(group[option], bool):
            raise ValueError(f"{option} must be True or False, got {group[option]!r}.")
    mode = MODES[group["mode"]]
    if group["kl_clip"] is not None and (mode.momentum_first or mode.change_basis is not None):
        raise ValueError(
            f"kl_clip is for directions of gradients, got {group['kl_clip']!r} with mode={mode.name!r}: set it to None."
        )
    if group["match_rms"] is not None and group["kl_clip"] is not None:
        raise ValueError(
            "match_rms and kl_clip both set the scale of the update: set one of them to None "
            f"(got match_rms={group['match_rms']!r}, kl_clip={group['kl_clip']!r})."
        )


def plain_numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """The options of a parameter group that are numbers of another library, such as NumPy's, as floats."""
    return {name: float(group[name]) for name in RANGES if not isinstance(group[name], int | float | None)}
