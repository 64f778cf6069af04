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


def _as_real(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Complex numbers as pairs of real ones, in their own memory."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
