"""Steps become smaller where a gradient is small beside others of the training.

Where every direction is scaled to a root mean square, a gradient takes a step of full size whatever it has to say.
Beside the largest gradients of the training it may be made of rounding errors, such as a bias's which a softmax or a
norm cancels, or all weights' once the loss is 0 for every sample. Beside the last gradients of its own tensor it may be
that of a batch without what counts, such as a rare class.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_thor.linalg.dtypes import wide
from lightning_thor.linalg.memory import constants, sent
from lightning_thor.optim import norms
from lightning_thor.optim.norms import Numbers

ROUNDINGS = 8
"""Up to this multiple of eps times the largest gradients, a gradient may be made of rounding errors alone.

A softmax has errors of about eps / 10 of the gradients at the start of a training: 1e-8 of 0.1. Steps along them add
up: with a factor that is only proportional, not squared, a network that has learnt its samples loses held-out accuracy
in thousands of steps.
"""

GROWTH = 2.0
"""Limit of the largest gradients' growth in one step: a batch whose gradients explode fades no later batch by more."""

ONE = torch.ones((), dtype=torch.float64, device="cpu")

Largest = float | Tensor
"""Root mean square of the largest gradients so far, 0 before the first; a 0-dimensional float64 tensor where reading it
would wait for a device."""

MEAN_SQUARE = "exp_avg_mean_square"
"""Key of a parameter's state: the running mean of its gradients' mean squares, begun at 0. A number, or a 0-dimensional
tensor in float64 where reading it would wait for a device."""


def gradient_rms(sources: Sequence[Tensor], params: Sequence[Tensor], shares: Sequence[float]) -> Numbers:
    """Root mean square r of the gradient, or of the momentum, that each direction is made of.

    Args:
        sources: this rank's part of each.
        params: their parameters, whole or sharded.
        shares: multiplied with each: 1 for a gradient, ``1 - momentum`` for a momentum, whose mean it makes.
    """
    sources = [x.resolve_conj() if x.is_conj() else x for x in sources]
    if norms.can_read_on_host(sources, params):
        return [share * rms for share, rms in zip(shares, norms.root_mean_squares(sources), strict=True)]
    r, scales = norms.norms(norms.as_real(sources), params)
    # Shares follow a schedule of the momentum.
    r *= sent([share / math.sqrt(max(1, p.numel())) for share, p in zip(shares, params, strict=True)], r)
    for scale in scales:
        r /= scale
    return r


def fade_factors(r: Numbers, params: Sequence[Tensor], largest: Largest) -> tuple[Numbers, Largest]:
    """Compute the factor ``min(1, r / (8 eps R))²`` of each direction, and R with this step.

    R is the largest r of the training so far, eps the machine epsilon of the weights' dtype, but at most float32's. R
    follows the unit of the loss. R does not fall with the gradients: their rounding errors come from the minuends
    (probabilities and targets), which do not fall either. A step whose gradients are not all finite leaves R as it is.

    So a training whose first gradients explode, by a million times those that follow, fades until R is set to 0 again.
    Sizes of gradients cannot tell it from one that has learnt its samples, whose gradients fall as far, and which would
    go on along its rounding errors if R forgot.

    Args:
        r: of each direction, see `gradient_rms`.
        params: their parameters.
        largest: R before this step.

    Returns:
        ``(factors, R)``; tensors, factors ``[n]``, where reading them would wait for a device.

    >>> fade_factors([1e-9, 1.0], [torch.zeros(1)] * 2, 0.0)
    ([1.1e-06, 1.0], 1.0)
    """
    roundings = [ROUNDINGS * _eps(p.dtype) for p in params]
    if not isinstance(r, Tensor):
        reached = _with_step(float(largest), r)
        limits = [rounding * reached for rounding in roundings]
        return [(own / limit) ** 2 if own < limit else 1.0 for own, limit in zip(r, limits, strict=True)], reached
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


def _with_step(before: float, r: Sequence[float]) -> float:
    if not all(map(math.isfinite, r)):
        return before
    return max(before, min(max(r), before * GROWTH)) if before else max(r)


def running_ratios(r: Numbers, states: Sequence[MutableMapping[str, Any]], averaging: Sequence[float]) -> Numbers:
    """Compute ``r / √m`` of each gradient, with m the running mean of r², this step's in it.

    m begins at 0, so that the first ratio is above 1, and takes a gradient whose square is not finite for 0. It is a
    mean of gradients, not of directions, whose size changes with each refresh of the curvature: directions that fell by
    a factor of a hundred would long count as small.

    Args:
        r: of each direction, see `gradient_rms`.
        states: of each parameter; m is their `MEAN_SQUARE`.
        averaging: weight of the past in m.

    Returns:
        One for each gradient; NaN or infinity where m or the gradient has no size.

    >>> state = {}
    >>> [round(running_ratios([r], [state], [0.75])[0], 3) for r in (3.0, 3.0, 1.0)]
    [2.0, 1.512, 0.559]
    """
    if isinstance(r, Tensor):
        means = _running_means(states, r)
        means.lerp_(r.square().nan_to_num_(0.0, 0.0), constants([1.0 - past for past in averaging], r))
        return r * means.rsqrt()
    ratios = []
    for own, state, past in zip(r, states, averaging, strict=True):
        square = own * own
        mean = past * float(state.get(MEAN_SQUARE, 0.0)) + (1.0 - past) * (square if square < math.inf else 0.0)
        state[MEAN_SQUARE] = mean
        ratios.append(own / math.sqrt(mean) if mean else math.inf)
    return ratios


def _running_means(states: Sequence[MutableMapping[str, Any]], like: Tensor) -> Tensor:
    """The running means of these states as one vector ``[n]``, of which theirs are views: to be changed in place."""
    held: list[Any] = [state.get(MEAN_SQUARE, 0.0) for state in states]
    vector: Tensor | None = getattr(held[0], "_base", None)
    if vector is not None and vector.shape == like.shape:
        # Not the offset: what was set through `Tensor.data` is a view no more, and may begin another storage.
        start, size = vector.data_ptr(), vector.element_size()
        others = [
            x for i, x in enumerate(held) if getattr(x, "_base", None) is not vector or x.data_ptr() != start + i * size
        ]
        if not others:
            return vector
    # In the first step, after a resume, and where other parameters have gradients than in the last step.
    vector = torch.stack([torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in held])
    for state, own in zip(states, vector.unbind(), strict=True):
        state[MEAN_SQUARE] = own
    return vector
