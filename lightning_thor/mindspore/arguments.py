"""Checks of the arguments of ``nn.thor``, and numbers per step as a function of the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

PerStep = int | float | Sequence[float] | Tensor
"""A number, or one for each step: a sequence, a tensor or a NumPy array of at most one dimension."""


class StepFunction:
    """A `PerStep` as a function of the step, from 0; past the end the last value holds, with one warning.

    Args:
        name: of the argument, for messages.
        values: a number, or one per step.
        may_be_zero: True for learning rates, False for damping.

    Raises:
        TypeError: ``values`` is not a number, a sequence of numbers, a tensor or an array.
        ValueError: there are no values, they have several dimensions, or one is not finite or out of its range.

    >>> rate = StepFunction("learning_rate", [0.1, 0.05])
    >>> rate(0), rate(1), StepFunction("learning_rate", 0.1)(1000)
    (0.1, 0.05, 0.1)
    """

    def __init__(self, name: str, values: PerStep, may_be_zero: bool = True) -> None:
        self.name, self.has_warned = name, False
        listed = _plain(values)
        self.constant = _is_number(listed)
        if not self.constant and (isinstance(listed, str | bytes) or not isinstance(listed, Sequence)):
            raise TypeError(
                f"{name} must be a number, a sequence or a Tensor of one per step, got {values!r} "
                f"({type(values).__name__})."
            )
        each = [listed] if self.constant else [_plain(value) for value in listed]
        if not each:
            raise ValueError(f"{name} must have at least one value, got {values!r}.")
        for step, value in enumerate(each):
            if isinstance(value, list | tuple):
                raise ValueError(f"{name} must have one dimension, one value per step, got {value!r} for step {step}.")
            if not _is_number(value):
                raise TypeError(f"{name} must hold numbers, got {value!r} for step {step}.")
            if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                bound = "0 or greater" if may_be_zero else "greater than 0"
                raise ValueError(f"{name} must be {bound} at every step, got {value!r} for step {step}.")
        self.values = [float(value) for value in each]

    def __call__(self, step: int) -> float:
        if step >= len(self.values) and not self.constant and not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"{self.name} has {len(self.values)} values, and this is step {step}: the last one holds from here on "
                "(MindSpore would fail). Give as many values as there are steps.",
                stacklevel=2,
            )
        return self.values[min(step, len(self.values) - 1)]


def check_number(name: str, value: Any, *types: type, or_zero: bool = True, at_least: int = 0) -> None:
    """Check the type and the range of a number.

    Args:
        name: of the argument.
        value: of the argument.
        *types: ``int``, ``float`` or both.
        or_zero: whether it may be 0.
        at_least: lower bound.

    Raises:
        TypeError: ``value`` is of none of these types.
        ValueError: ``value`` is not finite, or out of its range.
    """
    if not isinstance(value, types) or isinstance(value, bool):
        hint = f"; write {float(value)!r}" if types == (float,) and type(value) is int else ""
        words = " or ".join("an int" if t is int else "a float" for t in types)
        raise TypeError(f"{name} must be {words}, got {value!r} ({type(value).__name__}), as in nn.thor{hint}.")
    assert isinstance(value, float | int)
    if not math.isfinite(value) or value < at_least or (value == 0 and not or_zero):
        bound = f"at least {at_least}" if at_least else "0 or greater" if or_zero else "greater than 0"
        raise ValueError(f"{name} must be {bound}, as in nn.thor, got {value!r}.")


def check_bool(name: str, value: Any) -> None:
    """Raise a TypeError that names the argument ``name``, unless its ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} ({type(value).__name__}).")


def _plain(value: Any) -> Any:
    """A tensor, a NumPy array or a NumPy number as plain Python; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
