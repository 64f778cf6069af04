"""Scales of updates: to a root mean square, to at most a norm, to at most a change of the predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.linalg.dtypes import wide
from lightning_thor.linalg.memory import adjacent_runs, as_stacked_view
from lightning_thor.optim import norms
from lightning_thor.optim.norms import as_real

Updates = Mapping[nn.Parameter, Tensor]
"""This rank's part of each update, by parameter; changed in place."""


Numbers = Sequence[float | Tensor]
"""One per tensor, all of one type: floats, or 0-dimensional float64 tensors on the device."""


LEAST_NORM = 1e-100
"""Norms of zeros are raised to it: far below any other norm, and its reciprocal is finite."""


def scale_to_rms_(updates: Sequence[Tensor], params: Sequence[Tensor], rms: Numbers) -> None:
    """Scales each tensor to a root mean square, whatever finite numbers it has; zeros stay. No device sync.

    A tensor times a power of two is scaled to bitwise the same result.

    Args:
        updates: this rank's part of each tensor; changed in place.
        params: their parameters, whole or sharded.
        rms: root mean square of each whole tensor; tensors only where reading them would wait for a device or for
            other ranks.

    >>> both = [torch.full((4,), 1e-30), torch.zeros(2)]
    >>> scale_to_rms_(both, both, [0.2, 0.2])
    >>> both
    [tensor([0.2000, 0.2000, 0.2000, 0.2000]), tensor([0., 0.])]
    """
    _scale_to_norms_(updates, params, multiply(rms, [math.sqrt(p.numel()) for p in params]), at_most=False)


def multiply(numbers: Numbers, factors: Sequence[float]) -> Numbers:
    """Multiplies each of ``numbers`` by its factor.

    Args:
        numbers: unchanged.
        factors: one for each of them.

    Returns:
        New numbers of the same type.
    """
    if numbers and isinstance(numbers[0], Tensor):
        return list(torch._foreach_mul(list(numbers), list(factors)))  # type: ignore[arg-type]
    return [number * factor for number, factor in zip(numbers, factors, strict=True)]


def clip_norm_(updates: Sequence[Tensor], params: Sequence[Tensor], limits: Sequence[float]) -> None:
    """Shrinks each tensor to at most its limit of the L2 norm; no device sync.

    Args:
        updates: as of `scale_to_rms_`.
        params: as of `scale_to_rms_`.
        limits: largest L2 norm of each whole tensor.

    >>> both = [torch.full((4,), 2.0), torch.ones(1)]
    >>> clip_norm_(both, both, [1.0, 1.0])
    >>> both
    [tensor([0.5000, 0.5000, 0.5000, 0.5000]), tensor([1.])]
    """
    _scale_to_norms_(updates, params, limits, at_most=True)


def clip_kl_(
    clipped: Sequence[tuple[nn.Parameter, dict[str, Any]]], grads: Mapping[nn.Parameter, Tensor], updates: Updates
) -> None:
    """Multiplies updates by one factor, `kl_clip_factor`; no device sync.

    Args:
        clipped: the parameters of these updates, each with its group, which has ``lr`` and ``kl_clip``.
        grads: this rank's part of each gradient, by parameter; may have others.
        updates: by parameter; may have others, which stay.
    """
    params = [p for p, _ in clipped]
    own = as_real(updates[p] for p in params)
    rates = [group["lr"] / math.sqrt(group["kl_clip"]) for _, group in clipped]
    factor = kl_clip_factor(own, as_real(grads[p].resolve_conj() for p in params), params, rates)
    if norms.can_read_on_host(own, params):
        _multiply_on_host_(own, [float(factor)] * len(own))
    else:
        _multiply_on_device_(own, factor.expand(len(own)))


def kl_clip_factor(
    updates: Sequence[Tensor], grads: Sequence[Tensor], params: Sequence[Tensor], rates: Sequence[float]
) -> Tensor:
    """Computes ``min(1, 1 / sqrt(sum rate² |update · grad|))``, by which a step's change of predictions is bounded.

    Args:
        updates: this rank's part of each update, real.
        grads: this rank's part of each gradient, real.
        params: their parameters, whole or sharded.
        rates: ``lr / sqrt(kl_clip)`` of each.

    Returns:
        0-dimensional, in float64.
    """
    # Square roots of the products, which have the range of their factors.
    roots = norms.roots_of_products(updates, grads, params)
    torch._foreach_mul_(list(roots.unbind()), list(rates))
    limits = torch.finfo(roots.dtype)
    largest = roots.clamp_(max=limits.max).amax().clamp_min(limits.tiny)
    length: Tensor = roots.div_(largest).norm() * largest
    return length.reciprocal().clamp_max(1.0)


def _scale_to_norms_(updates: Sequence[Tensor], params: Sequence[Tensor], targets: Numbers, *, at_most: bool) -> None:
    """Scales each tensor to an L2 norm; with ``at_most`` only tensors whose norm is above it."""
    real = as_real(updates)
    if not norms.can_read_on_host(real, params):
        _scale_on_device_(real, params, targets, at_most=at_most)
        return
    sums = norms.sums_of_squares(real)
    factors = [float(target) / math.sqrt(total) if total else 1.0 for target, total in zip(targets, sums, strict=True)]
    for index in norms.inexact(sums, real):
        _scale_by_way_of_one_(real[index], float(targets[index]), at_most=at_most)
        factors[index] = 1.0
    _multiply_on_host_(real, [min(1.0, factor) for factor in factors] if at_most else factors)


def _scale_by_way_of_one_(x: Tensor, target: float, *, at_most: bool) -> None:
    """Scales a tensor whose squares leave the range of its dtype, by way of one whose largest number is about 1."""
    if target == 0.0:
        x.zero_()
        return
    y, exponent = norms.scaled_down(x)
    norm = math.sqrt(norms.sums_of_squares([y])[0])
    # The norm of x is norm * 2**exponent, which may be no float.
    if norm and not (at_most and math.log2(norm) + exponent <= math.log2(target)):
        x.copy_(y.mul_(target / norm))


def _multiply_on_host_(real: Sequence[Tensor], factors: Sequence[float]) -> None:
    chosen: list[tuple[Tensor, float]] = []
    for x, factor in zip(real, factors, strict=True):
        if factor == 1.0:
            continue
        limits = torch.finfo(x.dtype)
        if x.dtype == wide(x.dtype) and (limits.tiny <= factor <= limits.max or not math.isfinite(factor)):
            chosen.append((x, factor))
        else:
            # A factor is rounded to the dtype of its tensor, in which it may have few digits or none.
            y, exponent = norms.scaled_down(x)
            x.copy_(y.mul_(math.ldexp(factor, exponent)))
    if chosen:
        torch._foreach_mul_([x for x, _ in chosen], [factor for _, factor in chosen])


def _scale_on_device_(real: Sequence[Tensor], params: Sequence[Tensor], targets: Numbers, *, at_most: bool) -> None:
    found, scales = norms.norms(real, params)
    factors = found.clamp_min_(LEAST_NORM).reciprocal_()
    torch._foreach_mul_(list(factors.unbind()), list(targets))  # type: ignore[arg-type]
    if at_most:
        whole = factors
        for scale in scales:
            whole = whole * scale
        fits = whole >= 1.0
        factors, scales = factors.masked_fill(fits, 1.0), tuple(scale.masked_fill(fits, 1.0) for scale in scales)
    _multiply_on_device_(real, *scales, factors)


def _multiply_on_device_(real: Sequence[Tensor], *factors: Tensor) -> None:
    """Multiplies by each of ``factors [n]`` in float64: float32 cannot represent all of them."""
    runs = adjacent_runs(real)
    together = [as_stacked_view([real[index] for index in run]) for run in runs]
    for each in factors:
        ordered = torch.stack([each[index] for run in runs for index in run]).split([len(run) for run in runs])
        # With dimensions: a 0-dimensional factor would be rounded to the dtype of its tensor.
        shaped = [own.view(-1, *[1] * (one.dim() - 1)) for own, one in zip(ordered, together, strict=True)]
        torch._foreach_mul_(together, shaped)
