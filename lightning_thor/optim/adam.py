"""Adam's steps, in the coordinates of a parameter or in others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.distributed.dtensor import is_sharded, local_parts
from lightning_thor.linalg.dtypes import wide
from lightning_thor.optim.norms import as_real
from lightning_thor.preconditioning.grouping import Directions

EPS = 1e-8

FIRST, SECOND, STEP = "exp_avg", "exp_avg_sq", "step"
"""Keys of a parameter's state, named as in `torch.optim.Adam`."""


def make_moments(state: MutableMapping[str, Any], like: Tensor, dtype: torch.dtype) -> None:
    """Set the moments of an empty ``state`` to zeros, in the shape of ``like``, and sharded as it is."""
    if SECOND not in state:
        state[STEP], state[FIRST], state[SECOND] = 0, *(torch.zeros_like(like, dtype=dtype) for _ in range(2))


def adam_directions(
    states: Sequence[MutableMapping[str, Any]],
    grads: Sequence[Tensor],
    beta1: float,
    beta2: float,
    *,
    nesterov: bool = False,
) -> list[Tensor]:
    """Update the moments of each tensor and return ``m̂ / (√v̂ + 1e-8)`` (Kingma & Ba 2015, arXiv:1412.6980,
    algorithm 1).

    Args:
        states: of each tensor, see `make_moments`. An empty one gets moments of zeros in the dtype of its gradient;
            ``"step"`` is a number, so that nothing waits for a device.
        grads: one per state, in at least float32, whose range includes their squares; unchanged. Complex numbers are
            pairs of real ones, as in `torch.optim.Adam`.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        nesterov: use the first moment after the same gradient once more, without bias (Dozat 2016, "Incorporating
            Nesterov momentum into Adam").

    >>> state = {}
    >>> adam_directions([state], [torch.tensor([2.0, -0.5])], 0.9, 0.95)[0]
    tensor([ 1., -1.])
    """
    if not grads:
        return []
    for state, grad in zip(states, grads, strict=True):
        make_moments(state, grad, grad.dtype)
        if state[FIRST].dtype != grad.dtype:  # the model was cast
            state.update({key: state[key].to(grad.dtype) for key in (FIRST, SECOND)})
        state[STEP] += 1
    first, second = (as_real(local_parts([state[key] for state in states])) for key in (FIRST, SECOND))
    real = as_real(grads)
    torch._foreach_lerp_(first, real, 1.0 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, real, real, 1.0 - beta2)
    roots = list(torch._foreach_sqrt(second))
    torch._foreach_mul_(roots, [1.0 / math.sqrt(1.0 - beta2 ** state[STEP]) for state in states])
    torch._foreach_add_(roots, EPS)
    if nesterov:
        directions = list(torch._foreach_lerp(first, real, 1.0 - beta1))
        torch._foreach_div_(directions, roots)
    else:
        directions = list(torch._foreach_div(first, roots))
    steps = [state[STEP] + nesterov for state in states]
    torch._foreach_mul_(directions, [1.0 / (1.0 - beta1**step) for step in steps])
    return [
        torch.view_as_complex(direction) if grad.is_complex() else direction
        for direction, grad in zip(directions, grads, strict=True)
    ]


def carry_to_other_coordinates(
    states: Sequence[MutableMapping[str, Any]], first: Sequence[Tensor], beta1: float, beta2: float
) -> None:
    """Replace the first moments by what they are in other coordinates; raise second moments where they are too small.

    Second moments keep their values from the old coordinates, but are raised to the least value that goes with the new
    first moments: after t steps in the same coordinates ``m² ≤ c v`` with
    ``c = Σ ((1 - β₁) β₁ᵏ)² / ((1 - β₂) β₂ᵏ)``, k < t (Cauchy-Schwarz). Otherwise a coordinate without any gradient so
    far would take a step of ``m / 1e-8``.
    ``first`` has the new first moment of each state, real and in its dtype.

    >>> state = {"step": 1, "exp_avg": torch.tensor([0.1, 0.0]), "exp_avg_sq": torch.tensor([0.05, 0.0])}
    >>> carry_to_other_coordinates([state], [torch.tensor([0.0, 0.1])], 0.9, 0.95)
    >>> state["exp_avg_sq"]
    tensor([0.0500, 0.0500])
    """
    if not first:
        return
    least = list(torch._foreach_mul(list(first), list(first)))
    torch._foreach_mul_(least, [1.0 / _largest_ratio(beta1, beta2, state[STEP]) for state in states])
    torch._foreach_maximum_(local_parts([state[SECOND] for state in states]), least)
    torch._foreach_copy_(local_parts([state[FIRST] for state in states]), list(first))


def _largest_ratio(beta1: float, beta2: float, steps: int) -> float:
    """Return the largest m² / v after ``steps`` steps in the same coordinates.

    >>> _largest_ratio(0.9, 0.99, 1000), _largest_ratio(0.0, 0.5, 3), _largest_ratio(0.5, 0.25, 3)
    (5.5, 2.0, 1.0)
    """
    if beta2 == 0.0:
        return math.inf
    factor = beta1**2 / beta2
    # The sum of factor ** k for k < steps; a sum that grows without bound is cut off in the range of a float.
    grown = math.expm1(min(steps * math.log(factor), 700.0)) if factor > 0 else -1.0
    total = steps if factor == 1.0 else grown / (factor - 1.0)
    return (1.0 - beta1) ** 2 / (1.0 - beta2) * total


def steps_in_other_coordinates(
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Any, MutableMapping[str, Any]],
    preconditioner: Any,
    change_basis: Callable[..., Directions],
    grads: Mapping[nn.Parameter, Tensor],
) -> Directions:
    """Update the preconditioner, carry first moments to its new coordinates, and take Adam's step there.

    Args:
        groups: parameter groups, with ``momentum`` (β₁), ``beta2`` and ``nesterov``.
        states: the optimizer's, by parameter.
        preconditioner: has ``update()`` and ``due_parameters()``, whose coordinates the next update may change.
        change_basis: takes tensors by parameter to the coordinates of the preconditioner, and back with ``back=True``.
        grads: by parameter, unchanged.

    Returns:
        Directions by parameter, in its own coordinates and in at least float32.
    """
    # Also of parameters without a gradient in this step: their next gradient is in the new coordinates.
    due = [p for p in preconditioner.due_parameters() if states.get(p, {}).get(STEP)]
    moments = dict(zip(due, local_parts([states[p][FIRST] for p in due]), strict=True))
    moments = change_basis(moments, back=True)
    preconditioner.update()
    moments = change_basis(moments)
    for group in groups:
        params = [p for p in group["params"] if p in moments]
        own = [moments[p] for p in params]
        carry_to_other_coordinates([states[p] for p in params], own, group["momentum"], group["beta2"])
    # Squares and 1e-8 are in the unit of gradients that the curvature has.
    unit = getattr(preconditioner, "gradient_unit", 1.0)
    grads = {p: grad.to(wide(grad.dtype)) for p, grad in grads.items()}
    if isinstance(unit, Tensor) or unit != 1.0:
        grads = {p: grad / unit for p, grad in grads.items()}
    rotated, directions = change_basis(grads), Directions()
    for group in groups:
        params = [p for p in group["params"] if p in rotated]
        own, beta1, beta2 = [rotated[p] for p in params], group["momentum"], group["beta2"]
        for p in params:
            if is_sharded(p):
                make_moments(states[p], p, rotated[p].dtype)
        found = adam_directions([states[p] for p in params], own, beta1, beta2, nesterov=group["nesterov"])
        directions.update(zip(params, found, strict=True))
    return change_basis(directions, back=True)
