"""Directions fade where gradients are tiny beside the largest gradients of the training: they are rounding errors.

Where every direction is scaled to a root mean square, a gradient of nothing but rounding errors would take a step of
full size, such as a bias's which a softmax or a norm cancels, or all weights' once the loss is 0 for every sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_thor.linalg.dtypes import wide
from lightning_thor.linalg.memory import constants, sent
from lightning_thor.optim import norms

SLICE_NUMEL = 2**12
"""Entries that are read first, on a CPU, of a tensor with more than four times as many."""

ROUNDINGS = 8
"""Up to this multiple of eps times the largest gradients, a gradient may be made of rounding errors alone.

A softmax has errors of about eps / 10 of the gradients at the start of a training: 1e-8 of 0.1. Steps along them add
up, and with a factor that is only proportional weights go far in thousands of steps: 512 digits, learnt to a loss of 0,
lost 7 and 10 points of held-out accuracy in 6,000 steps (two seeds), and none with the squared factor.
"""

GROWTH = 2.0
"""Limit of the largest gradients' growth in one step: a batch whose gradients explode fades no later batch by more."""

ONE = torch.ones((), dtype=torch.float64)

Largest = float | Tensor
"""Root mean square of the largest gradients so far, 0 before the first; a 0-dimensional float64 tensor where reading it
would wait for a device."""


def fade_factors(
    sources: Sequence[Tensor], params: Sequence[Tensor], shares: Sequence[float], largest: Largest
) -> tuple[list[float] | Tensor, Largest]:
    """Compute the factor ``min(1, r / (8 eps R))²`` of each direction, and R with this step.

    r is the root mean square of a direction's source, R the largest r of the training so far, eps the machine epsilon
    of the weights' dtype, but at most float32's. R follows the unit of the loss. R does not fall with the gradients:
    their rounding errors come from the minuends (probabilities and targets), which do not fall either. A step whose
    gradients are not all finite leaves R as it is.

    So a training whose first gradients explode, by a million times those that follow, fades until R is set to 0 again.
    Sizes of gradients cannot tell it from one that has learnt its samples: they fell from 6e10 to 4e5 in 200 steps of
    fourteen linear layers without norms with six times their initial weights, and from 7e-2 to 5e-7 in 200 steps that
    learnt digits to a loss of 3e-7, which would go on along its rounding errors if R forgot as fast.

    Args:
        sources: this rank's part of the gradient, or of the momentum, that each direction is made of.
        params: their parameters, whole or sharded.
        shares: multiplied with each r: 1 for a gradient, ``1 - momentum`` for a momentum, whose mean it makes.
        largest: R before this step.

    Returns:
        ``(factors, R)``; tensors, factors ``[n]``, where reading them would wait for a device.

    >>> fade_factors([torch.tensor([1e-9]), torch.tensor([1.0])], [torch.zeros(1)] * 2, [1.0, 1.0], 0.0)
    ([1.1e-06, 1.0], 1.0)
    """
    sources = [x.resolve_conj() if x.is_conj() else x for x in sources]
    roundings = [ROUNDINGS * _eps(p.dtype) for p in params]
    if norms.can_read_on_host(sources, params):
        return _on_host(sources, roundings, shares, float(largest))
    r, scales = norms.norms(norms.as_real(sources), params)
    # Shares follow a schedule of the momentum.
    r *= sent([share / math.sqrt(max(1, p.numel())) for share, p in zip(shares, params, strict=True)], r)
    for scale in scales:
        r /= scale
    # From a checkpoint it comes as a number, or on another device.
    before = torch.as_tensor(largest, dtype=r.dtype, device=r.device)
    limit = (before * GROWTH).masked_fill_(before == 0.0, math.inf)
    largest = r.amax().nan_to_num_(nan=0.0, posinf=0.0).clamp(before, limit)
    factors = (r / (largest * constants(roundings, r))).square_()
    # 1 also where r is NaN, and where r and R are 0, before the first gradient.
    return torch.fmin(factors, ONE), largest


@cache
def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(wide(dtype)).eps


def _on_host(
    sources: Sequence[Tensor], roundings: Sequence[float], shares: Sequence[float], before: float
) -> tuple[list[float], float]:
    read = [_slice(x) if x.numel() > 4 * SLICE_NUMEL else x for x in sources]
    r = [share * rms for share, rms in zip(shares, norms.root_mean_squares(read), strict=True)]
    # Of a tensor that was read in part, r is at least this.
    bounds = {
        index: r[index] * math.sqrt(SLICE_NUMEL / x.numel()) for index, x in enumerate(sources) if read[index] is not x
    }
    largest = _with_step(before, r)
    # Not `<`: a slice may be not finite.
    while small := [index for index, bound in bounds.items() if not bound >= roundings[index] * largest]:
        for index, rms in zip(small, norms.root_mean_squares([sources[index] for index in small]), strict=True):
            r[index] = rms * shares[index]
            del bounds[index]
        largest = _with_step(before, r)
    limits = [rounding * largest for rounding in roundings]
    return [(own / limit) ** 2 if own < limit else 1.0 for own, limit in zip(r, limits, strict=True)], largest


def _with_step(before: float, r: Sequence[float]) -> float:
    if not all(map(math.isfinite, r)):
        return before
    return max(before, min(max(r), before * GROWTH)) if before else max(r)


def _slice(x: Tensor) -> Tensor:
    """Return `SLICE_NUMEL` entries from the middle of the memory of ``x``; ``x`` itself if there are gaps."""
    flat = norms.in_memory_order(x)
    return flat[(x.numel() - SLICE_NUMEL) // 2 :][:SLICE_NUMEL] if flat.data_ptr() == x.data_ptr() else x
