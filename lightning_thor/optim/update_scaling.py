"""Scales of updates: to a norm or a running one, to at most a norm, to at most a change of the predictions.

No function waits for a device. ``updates`` are this rank's parts, changed in place, and ``params`` their parameters,
whole or sharded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.linalg.dtypes import wide
from lightning_thor.linalg.memory import adjacent_runs, as_stacked_view, constants, select, sent
from lightning_thor.optim import norms
from lightning_thor.optim.norms import as_real

Numbers = Sequence[float] | Tensor
"""One per tensor: floats, or ``[n]`` in float64 where reading them would wait for a device or for other ranks."""

LEAST_NORM, LARGEST_NORM = 1e-100, 1e150
"""Norms of zeros are raised to the first: far below any other norm, and its reciprocal is finite. In a running norm
others are lowered to the second, so that their squares are finite, and those that are not finite count as the first."""

NORM_SQ = "exp_avg_norm_sq"
"""Key of a parameter's state: the running mean of the squared L2 norms of its directions, begun at 0. A number, or a
0-dimensional tensor in float64 where reading it would wait for a device."""


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


def scale_to_running_norms_(
    updates: Sequence[Tensor],
    params: Sequence[Tensor],
    targets: Any,
    limits: Any,
    states: Sequence[MutableMapping[str, Any]],
    averaging: Sequence[float],
) -> None:
    """Multiply each tensor u by ``min(target / √m, limit / |u|)``, with m the running mean of |u|², this step's in it.

    m begins at 0, so that at first the limits decide, and the steps have one size. Zeros stay.

    Args:
        updates: this rank's parts.
        params: their parameters.
        targets: of the running norms √m, `Numbers`.
        limits: of the L2 norms of the results, `Numbers`.
        states: of each parameter; m is their `NORM_SQ`.
        averaging: weight of the past in m.

    >>> state = {}
    >>> for size in 3.0, 3.0, 1.0:
    ...     update = torch.tensor([size, 0.0])
    ...     scale_to_running_norms_([update], [update], [0.1], [0.1], [state], [0.75])
    ...     print(update)
    tensor([0.1000, 0.0000])
    tensor([0.1000, 0.0000])
    tensor([0.0559, 0.0000])
    """
    real = as_real(updates)
    if not norms.can_read_on_host(real, params):
        own, scales = norms.norms(real, params)
        # These divide the results, which are not finite where a direction is not, as on the host.
        own.clamp_min_(LEAST_NORM)
        whole = own.nan_to_num(LEAST_NORM, LEAST_NORM)
        for scale in scales:
            whole = (whole / scale).clamp_(LEAST_NORM, LARGEST_NORM)
        means = _running_means(states, whole)
        means.lerp_(whole.square(), constants([1.0 - past for past in averaging], whole))
        goals = torch.minimum(means.rsqrt().mul_(whole).mul_(targets), limits)
        _multiply_on_device_(real, *scales, goals.div_(own))
        return
    sums, exponents = norms.scaled_sums_of_squares(real)
    factors = []
    for total, exponent, target, limit, state, past in zip(
        sums, exponents, targets, limits, states, averaging, strict=True
    ):
        root = math.sqrt(total)
        norm = math.ldexp(root, max(-900, min(exponent, 900))) if root < math.inf else 0.0
        norm = min(max(norm, LEAST_NORM), LARGEST_NORM)
        mean = past * float(state.get(NORM_SQ, 0.0)) + (1.0 - past) * norm * norm
        state[NORM_SQ] = mean
        factors.append(min(target * norm / math.sqrt(mean), limit) / root if root else 1.0)
    _multiply_on_host_(real, factors, [-exponent for exponent in exponents])


def _running_means(states: Sequence[MutableMapping[str, Any]], like: Tensor) -> Tensor:
    """The running means of these states as one vector ``[n]``, of which theirs are views: to be changed in place."""
    held: list[Any] = [state.get(NORM_SQ, 0.0) for state in states]
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
        state[NORM_SQ] = own
    return vector


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
    factors = found.clamp_min_(LEAST_NORM).reciprocal_()
    factors *= targets if isinstance(targets, Tensor) else sent(targets, factors)
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
