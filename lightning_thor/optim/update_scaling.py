"""Scales of updates: to a norm, to at most a norm, to at most a change of the predictions.

No function waits for a device. ``updates`` are this rank's parts, changed in place, and ``params`` their parameters,
whole or sharded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.linalg.dtypes import wide
from lightning_thor.linalg.memory import adjacent_runs, as_stacked_view, select, sent
from lightning_thor.optim import norms
from lightning_thor.optim.norms import Numbers, as_real

LEAST_NORM = 1e-100
"""Norms of zeros are raised to this: far below any other norm, and its reciprocal is finite."""


def scale_to_norms_(
    updates: Sequence[Tensor], params: Sequence[Tensor], targets: Numbers, *, at_most: bool = False
) -> None:
    """Scale each tensor to its target of the L2 norm, or shrink it to ``at_most`` that, whatever finite numbers it has;
    zeros stay.

    A tensor times a power of two is scaled to bitwise the same result.

    >>> both = [torch.full((4,), 1e-30), torch.zeros(2)]
    >>> scale_to_norms_(both, both, [0.4, 0.2])
    >>> both
    [tensor([0.2000, 0.2000, 0.2000, 0.2000]), tensor([0., 0.])]
    >>> scale_to_norms_(both, both, [0.2, 0.2], at_most=True)
    >>> both
    [tensor([0.1000, 0.1000, 0.1000, 0.1000]), tensor([0., 0.])]
    """
    real = as_real(updates)
    if not norms.can_read_on_host(real, params):
        _scale_on_device_(real, params, targets, at_most=at_most)
        return
    sums, exponents = norms.scaled_sums_of_squares(real)
    factors = [target / math.sqrt(total) if total else 1.0 for target, total in zip(targets, sums, strict=True)]
    _multiply_on_host_(real, factors, [-exponent for exponent in exponents], at_most=at_most)


def clip_kl_(
    clipped: Sequence[tuple[nn.Parameter, dict[str, Any]]],
    grads: Mapping[nn.Parameter, Tensor],
    updates: Mapping[nn.Parameter, Tensor],
) -> None:
    """Multiply updates by one factor ``min(1, sqrt(kl_clip / sum lr² |update · grad|))``.

    Args:
        clipped: the parameters of these updates, each with its group, which has ``lr`` and ``kl_clip``.
        grads: this rank's part of each gradient, by parameter.
        updates: by parameter; other parameters' stay.
    """
    params = [p for p, _ in clipped]
    own = as_real(updates[p] for p in params)
    # Square roots, lr times the root of |update · grad|: they have the range of the factors.
    roots = norms.roots_of_products(own, as_real(grads[p].resolve_conj() for p in params), params)
    torch._foreach_mul_(list(roots.unbind()), [group["lr"] / math.sqrt(group["kl_clip"]) for _, group in clipped])
    limits = torch.finfo(roots.dtype)
    largest = roots.clamp_(max=limits.max).amax().clamp_min(limits.tiny)
    kl_clip_factor = (roots.div_(largest).norm() * largest).reciprocal().clamp_max(1.0)
    if norms.can_read_on_host(own, params):
        _multiply_on_host_(own, [float(kl_clip_factor)] * len(own), [0] * len(own))
    else:
        _multiply_on_device_(own, kl_clip_factor.expand(len(own)))


def _multiply_on_host_(
    real: Sequence[Tensor], factors: Sequence[float], exponents: Sequence[int], *, at_most: bool = False
) -> None:
    """Multiply by ``factor * 2**exponent``, which may be no float; with ``at_most`` only where it is below 1."""
    chosen, chosen_factors = list[Tensor](), list[float]()
    for x, factor, exponent in zip(real, factors, exponents, strict=True):
        magnitude = math.frexp(factor)[1] + exponent
        # A factor of infinity, whose magnitude is 0, is that of a limit beyond all norms.
        if (at_most and (magnitude > 0 or factor == math.inf)) or (factor == 1.0 and not exponent):
            continue
        least, largest = _range_of_factors(x.dtype)
        product = math.ldexp(factor, exponent) if abs(magnitude) < 1000 else 0.0
        if least <= product <= largest or (largest and not math.isfinite(factor)):
            chosen.append(x)
            chosen_factors.append(product)
        else:
            # A factor is rounded to the dtype of its tensor, in which it may have few digits or none.
            y, own = norms.scaled_down(x)
            x.copy_(y.mul_(math.ldexp(factor, exponent + own)))
    if chosen:
        torch._foreach_mul_(chosen, chosen_factors)


@cache
def _range_of_factors(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest factor that is rounded to no fewer digits than float32 has; none for less precision."""
    limits = torch.finfo(dtype)
    return (limits.tiny, limits.max) if dtype == wide(dtype) else (math.inf, 0.0)


def _scale_on_device_(real: Sequence[Tensor], params: Sequence[Tensor], targets: Numbers, *, at_most: bool) -> None:
    found, scales = norms.norms(real, params)
    factors = (targets if isinstance(targets, Tensor) else sent(targets, found)) / found.clamp_min_(LEAST_NORM)
    if at_most:
        whole = factors
        for scale in scales:
            whole = whole * scale
        fits = whole >= 1.0
        factors, scales = factors.masked_fill(fits, 1.0), tuple(scale.masked_fill(fits, 1.0) for scale in scales)
    _multiply_on_device_(real, *scales, factors)


def _multiply_on_device_(real: Sequence[Tensor], *factors: Tensor) -> None:
    """Multiply by each of ``factors [n]`` in float64: float32 cannot represent all of them."""
    runs = adjacent_runs(real)
    together = [as_stacked_view([real[index] for index in run]) for run in runs]
    for each in factors:
        ordered = select(each, [index for run in runs for index in run]).split([len(run) for run in runs])
        # With dimensions: a 0-dimensional factor would be rounded to the dtype of its tensor.
        shaped = [own.view(-1, *[1] * (one.dim() - 1)) for own, one in zip(ordered, together, strict=True)]
        torch._foreach_mul_(together, shaped)
