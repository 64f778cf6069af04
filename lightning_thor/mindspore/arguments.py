"""What the arguments of ``nn.thor`` may be, and one that is a number per step as a function of the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

PerStep = int | float | Sequence[float] | Tensor
"""A number, or one for each step: a sequence, a tensor or a NumPy array of at most one dimension."""


class StepFunction:
    """A `PerStep` as a function of the step; past the end the last value holds, with one warning.

    Args:
        name: what messages call it.
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
        self.name, self.told = name, False
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
        if step >= len(self.values) and not self.constant and not self.told:
            self.told = True
            warnings.warn(
                f"{self.name} has {len(self.values)} values, and this is step {step}: the last one holds from here on "
                "(MindSpore would fail). Give as many values as there are steps.",
                stacklevel=2,
            )
        return self.values[min(step, len(self.values) - 1)]


def check_arguments(
    *,
    net: nn.Module,
    momentum: float,
    weight_decay: float,
    loss_scale: float,
    batch_size: int,
    use_nesterov: bool,
    decay_filter: Callable[..., bool],
    split_indices: Sequence[int] | None,
    enable_clip_grad: bool,
    frequency: int,
    variant: str,
) -> None:
    """Refuse what ``nn.thor`` refuses, and what could not mean anything; `StepFunction` checks the other arguments.

    Raises:
        TypeError: ``momentum`` or ``loss_scale`` is not a float, ``weight_decay`` neither float nor int, ``batch_size``
            or ``frequency`` not an int, ``use_nesterov`` or ``enable_clip_grad`` not a bool; or ``net`` no module,
            ``decay_filter`` not callable, ``split_indices`` not a list of ints.
        ValueError: ``loss_scale`` is not above 0, ``weight_decay`` or ``momentum`` below 0, ``frequency`` below 2; or
            ``batch_size`` below 1, ``split_indices`` not increasing, ``variant`` unknown.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {net!r}; give parameter groups as params=[...].")
    check_number("momentum", momentum, float)
    check_number("weight_decay", weight_decay, float, int)
    check_number("loss_scale", loss_scale, float, or_zero=False)
    check_number("batch_size", batch_size, int, at_least=1)
    check_bool("use_nesterov", use_nesterov)
    if not callable(decay_filter):
        raise TypeError(f"decay_filter must be a function of a parameter's .name, got {decay_filter!r}.")
    if split_indices is not None:
        _check_split(split_indices)
    check_bool("enable_clip_grad", enable_clip_grad)
    check_number("frequency", frequency, int, at_least=2)
    if variant not in ("gpu", "ascend"):
        raise ValueError(f"variant must be 'gpu' or 'ascend', got {variant!r}.")


def check_number(name: str, value: Any, *types: type, or_zero: bool = True, at_least: int = 0) -> None:
    """A TypeError unless ``value`` is of one of ``types``, a ValueError unless it is finite and in its range."""
    if not isinstance(value, types) or isinstance(value, bool):
        hint = f"; write {float(value)!r}" if types == (float,) and type(value) is int else ""
        words = " or ".join("an int" if t is int else "a float" for t in types)
        raise TypeError(f"{name} must be {words}, got {value!r} ({type(value).__name__}), as in nn.thor{hint}.")
    assert isinstance(value, float | int)
    if not math.isfinite(value) or value < at_least or (value == 0 and not or_zero):
        bound = f"at least {at_least}" if at_least else "0 or greater" if or_zero else "greater than 0"
        raise ValueError(f"{name} must be {bound}, as in nn.thor, got {value!r}.")


def check_bool(name: str, value: Any) -> None:
    """A TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} ({type(value).__name__}).")


def _check_split(split_indices: Any) -> None:
    if not isinstance(split_indices, list | tuple) or not all(type(index) is int for index in split_indices):
        raise TypeError(f"split_indices must be a list of ints (the last layer of each group), got {split_indices!r}.")
    if list(split_indices) != sorted(set(split_indices)) or any(index < 0 for index in split_indices):
        raise ValueError(f"split_indices must increase from 0 on, got {split_indices!r}.")


def _plain(value: Any) -> Any:
    """A tensor, a NumPy array or a NumPy number as plain Python; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
