"""What brings updates to scale: to a root mean square, to at most a norm, to at most a change of what is predicted."""

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
"""By parameter, what of it lies in this process; changed in place."""


Numbers = Sequence[float | Tensor]
"""One for each tensor, all of one type; as tensors they are 0-dimensional, of float64 and on the device."""


LEAST_NORM = 1e-100
"""Far below the least that is not 0; a factor of infinity would make NaN of zeros."""


def scale_to_rms_(updates: Sequence[Tensor], of: Sequence[Tensor], rms: Numbers) -> None:
    """Bring each tensor to its root mean square ``rms``, whatever finite numbers it has; one of zeros stays zero.

    A tensor times a power of two is brought to bitwise the same. Nothing waits for a device.

    Args:
        updates: what of each tensor lies in this process; changed in place.
        of: the parameters, whole or sharded.
        rms: of each; tensors only where there is a device that would be waited for, or shards.

    >>> both = [torch.full((4,), 1e-30), torch.zeros(2)]
    >>> scale_to_rms_(both, both, [0.2, 0.2])
    >>> both
    [tensor([0.2000, 0.2000, 0.2000, 0.2000]), tensor([0., 0.])]
    """
    _bring(updates, of, times(rms, [math.sqrt(p.numel()) for p in of]), at_most=False)


def times(numbers: Numbers, by: Sequence[float]) -> Numbers:
    """Each of ``numbers`` by one of ``by``; new."""
    if numbers and isinstance(numbers[0], Tensor):
        return list(torch._foreach_mul(list(numbers), list(by)))  # type: ignore[arg-type]
    return [own * one for own, one in zip(numbers, by, strict=True)]


def clip_norm_(updates: Sequence[Tensor], of: Sequence[Tensor], norms: Sequence[float]) -> None:
    """Bring each tensor to at most its L2 norm ``norms``; arguments as of `scale_to_rms_`.

    >>> both = [torch.full((4,), 2.0), torch.ones(1)]
    >>> clip_norm_(both, both, [1.0, 1.0])
    >>> both
    [tensor([0.5000, 0.5000, 0.5000, 0.5000]), tensor([1.])]
    """
    _bring(updates, of, norms, at_most=True)


def clip_kl_(
    clipped: Sequence[tuple[nn.Parameter, dict[str, Any]]], grads: Mapping[nn.Parameter, Tensor], updates: Updates
) -> None:
    """Multiply all updates by ``min(1, sqrt(kl_clip / sum lr² |direction · grad|))``; nothing waits for a device.

    Args:
        clipped: the parameters whose updates they are, with their groups.
        grads: of them, at least.
        updates: of them, at least.
    """
    of = [p for p, _ in clipped]
    own, lengths = (
        [as_real(updates[p]) for p in of],
        [group["lr"] / math.sqrt(group["kl_clip"]) for _, group in clipped],
    )
    # Square roots, whose range is that of the factors: lr times the root of |direction · grad|.
    roots = norms.roots_of_products(own, [as_real(grads[p].resolve_conj()) for p in of], of)
    torch._foreach_mul_(list(roots.unbind()), lengths)
    limits = torch.finfo(roots.dtype)
    largest = roots.clamp_(max=limits.max).amax().clamp_min(limits.tiny)
    shrink = (roots.div_(largest).norm() * largest).reciprocal().clamp_max(1.0)
    if norms.can_read_on_host(own, of):
        _multiply_on_host(own, [float(shrink)] * len(own))
    else:
        _multiply_on_device(own, shrink.expand(len(own)))


def _bring(updates: Sequence[Tensor], of: Sequence[Tensor], wanted: Numbers, *, at_most: bool) -> None:
    """To L2 norms."""
    real = [as_real(update) for update in updates]
    if not norms.can_read_on_host(real, of):
        _bring_on_device(real, of, wanted, at_most=at_most)
        return
    factors: list[float] = []
    for x, squares, norm in zip(real, norms.sums_of_squares(real), map(float, wanted), strict=True):
        if norms.is_exact(squares, x.numel()) and squares:
            factors.append(norm / math.sqrt(squares))
        else:
            _bring_by_way_of_one(x, norm, at_most=at_most)
            factors.append(1.0)
    _multiply_on_host(real, [min(1.0, factor) for factor in factors] if at_most else factors)


def _bring_by_way_of_one(x: Tensor, norm: float, *, at_most: bool) -> None:
    """One tensor, whose squares leave the range of its dtype, by way of one whose largest number is about 1."""
    if norm == 0.0:
        x.zero_()
        return
    y, exponent = norms.scaled_down(x)
    found = math.sqrt(norms.sums_of_squares([y])[0])
    # The norm is found * 2**exponent, which may be no float.
    if found and not (at_most and math.log2(found) + exponent <= math.log2(norm)):
        x.copy_(y.mul_(norm / found))


def _multiply_on_host(real: Sequence[Tensor], factors: Sequence[float]) -> None:
    if all(x.dtype == torch.float32 and 1e-37 < factor < 1e38 for x, factor in zip(real, factors, strict=True)):
        torch._foreach_mul_(list(real), list(factors))
        return
    chosen: list[tuple[Tensor, float]] = []
    for x, factor in zip(real, factors, strict=True):
        limits = torch.finfo(x.dtype)
        if factor == 1.0:
            continue
        if x.dtype == wide(x.dtype) and (limits.tiny <= factor <= limits.max or not math.isfinite(factor)):
            chosen.append((x, factor))
        else:
            # A factor is rounded to the dtype of what it multiplies, in which it may have few digits or none.
            y, exponent = norms.scaled_down(x)
            x.copy_(y.mul_(math.ldexp(factor, exponent)))
    if chosen:
        torch._foreach_mul_([x for x, _ in chosen], [factor for _, factor in chosen])


def _bring_on_device(real: Sequence[Tensor], of: Sequence[Tensor], wanted: Numbers, *, at_most: bool) -> None:
    found, scales = norms.norms(real, of)
    factors = found.clamp_min_(LEAST_NORM).reciprocal_()
    torch._foreach_mul_(list(factors.unbind()), list(wanted))  # type: ignore[arg-type]
    if at_most:
        whole = factors
        for scale in scales:
            whole = whole * scale
        fits = whole >= 1.0
        factors, scales = factors.masked_fill(fits, 1.0), tuple(scale.masked_fill(fits, 1.0) for scale in scales)
    _multiply_on_device(real, *scales, factors)


def _multiply_on_device(real: Sequence[Tensor], *factors: Tensor) -> None:
    """By each of ``factors``, ``[n]`` in float64, and in float64: it has numbers for which float32 has none."""
    runs = adjacent_runs(real)
    together = [as_stacked_view([real[index] for index in run]) for run in runs]
    for each in factors:
        ordered = torch.stack([each[index] for run in runs for index in run]).split([len(run) for run in runs])
        # With dimensions: a 0-dimensional factor would be rounded to the dtype of what it multiplies.
        shaped = [own.view(-1, *[1] * (one.dim() - 1)) for own, one in zip(ordered, together, strict=True)]
        torch._foreach_mul_(together, shaped)
