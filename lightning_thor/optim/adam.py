"""Adam's arithmetic on lists of tensors, in whatever coordinates they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

EPS = 1e-8


FIRST, SECOND, STEP = "exp_avg", "exp_avg_sq", "step"
"""In the state of a parameter, named as `torch.optim.Adam` names them."""


def adam_directions(
    states: Sequence[MutableMapping[str, Any]],
    grads: Sequence[Tensor],
    beta1: float,
    beta2: float,
    *,
    nesterov: bool = False,
) -> list[Tensor]:
    """``m̂ / (√v̂ + 1e-8)`` of each tensor, with the moments in its state brought up to date (Kingma & Ba 2015,
    arXiv:1412.6980, algorithm 1).

    Args:
        states: of each tensor; moments of zeros are put into an empty one, in the dtype of its gradient. The count of
            steps is a number, so that nothing waits for a device.
        grads: in at least float32, in whose range squares are; nothing in them is changed. A complex number is two real
            ones, as in `torch.optim.Adam`.
        beta1, beta2: how much of the first and of the second moment stays.
        nesterov: take the first moment as it would be if the same gradient came once more (Dozat 2016, "Incorporating
            Nesterov momentum into Adam"); without bias, as the plain one.

    >>> state = {}
    >>> adam_directions([state], [torch.tensor([2.0, -0.5])], 0.9, 0.95)[0]
    tensor([ 1., -1.])
    """
    if not grads:
        return []
    for state, grad in zip(states, grads, strict=True):
        if SECOND not in state:
            state[STEP], state[FIRST], state[SECOND] = 0, torch.zeros_like(grad), torch.zeros_like(grad)
        state[STEP] += 1
    first, second = _as_real(state[FIRST] for state in states), _as_real(state[SECOND] for state in states)
    real = _as_real(grads)
    torch._foreach_lerp_(first, real, 1.0 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, real, real, 1.0 - beta2)
    roots = list(torch._foreach_sqrt(second))
    torch._foreach_mul_(roots, [1.0 / math.sqrt(1.0 - beta2 ** state[STEP]) for state in states])
    torch._foreach_add_(roots, EPS)
    ahead = list(torch._foreach_lerp(first, real, 1.0 - beta1)) if nesterov else first
    directions = list(torch._foreach_div(ahead, roots))
    steps = [state[STEP] + nesterov for state in states]
    torch._foreach_mul_(directions, [1.0 / (1.0 - beta1**step) for step in steps])
    return [
        torch.view_as_complex(direction) if grad.is_complex() else direction
        for direction, grad in zip(directions, grads, strict=True)
    ]


def carry_to_other_coordinates(
    states: Sequence[MutableMapping[str, Any]], first: Sequence[Tensor], beta1: float, beta2: float
) -> None:
    """Put first moments, as they are in other coordinates, into states whose second moments stay as they were.

    Those belong to the old coordinates, so they are raised to what such first moments can have: after t steps in the
    same coordinates ``m² ≤ c v`` with ``c = Σ ((1 - β₁) β₁ᵏ)² / ((1 - β₂) β₂ᵏ)``, k < t (Cauchy-Schwarz). A coordinate
    that had no gradient before would otherwise, if it has none in this step either, take a step of ``m / 1e-8``.

    Args:
        states: of each tensor, with moments.
        first: its first moment, real, in the dtype of those.
        beta1, beta2: as of `adam_directions`.

    >>> state = {"step": 1, "exp_avg": torch.tensor([0.1, 0.0]), "exp_avg_sq": torch.tensor([0.05, 0.0])}
    >>> carry_to_other_coordinates([state], [torch.tensor([0.0, 0.1])], 0.9, 0.95)
    >>> state["exp_avg_sq"]
    tensor([0.0500, 0.0500])
    """
    if not first:
        return
    least = list(torch._foreach_mul(list(first), list(first)))
    torch._foreach_mul_(least, [1.0 / _largest_ratio(beta1, beta2, state[STEP]) for state in states])
    torch._foreach_maximum_([state[SECOND] for state in states], least)
    for state, moment in zip(states, first, strict=True):
        state[FIRST] = moment


def _largest_ratio(beta1: float, beta2: float, steps: int) -> float:
    """The most that m² / v can be after so many steps in the same coordinates.

    >>> _largest_ratio(0.9, 0.99, 1000), _largest_ratio(0.0, 0.5, 3), _largest_ratio(0.5, 0.25, 3)
    (5.5, 2.0, 1.0)
    """
    if beta2 == 0.0:
        return math.inf
    factor = beta1**2 / beta2
    # The sum of factor ** k for k < steps; where it grows without bound, it may stay below what a float can hold.
    grown = math.expm1(min(steps * math.log(factor), 700.0)) if factor > 0 else -1.0
    total = steps if factor == 1.0 else grown / (factor - 1.0)
    return (1.0 - beta1) ** 2 / (1.0 - beta2) * total


def _as_real(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Complex numbers as pairs of real ones, in their own memory."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
