"""What brings updates to scale: to a root mean square, to at most a norm, to at most a change of what is predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.adjacent import as_one, runs_of
from lightning_thor.collectives import is_sharded, sum_over_shards

Updates = Mapping[nn.Parameter, Tensor]
"""By parameter, what of it lies in this process; changed in place."""


def kl_shrink(
    clipped: Sequence[tuple[nn.Parameter, dict[str, Any]]], grads: Mapping[nn.Parameter, Tensor], updates: Updates
) -> Tensor:
    """``min(1, sqrt(kl_clip / sum lr² |direction · grad|))`` as a 0-dimensional tensor: no device sync."""
    products = [(updates[p] * grads[p].conj()).real.sum(dtype=torch.float32) for p, _ in clipped]
    products = sum_over_shards(products, [p for p, _ in clipped])
    shares = [
        group["lr"] ** 2 / group["kl_clip"] * product.abs()
        for (_, group), product in zip(clipped, products, strict=True)
    ]
    return torch.stack(shares).sum().rsqrt().clamp_max(1.0)


def to_rms_(updates: list[Tensor], of: Sequence[Tensor], rms: Sequence[float]) -> None:
    """Bring each tensor to its root mean square ``rms``; no device sync. One of zeros stays zero.

    Args:
        updates: what of each tensor lies in this process; changed in place.
        of: the parameters, whole or sharded.
        rms: of each.

    >>> both = [torch.full((4,), 2.0), torch.zeros(2)]
    >>> to_rms_(both, both, [0.2, 0.2])
    >>> both
    [tensor([0.2000, 0.2000, 0.2000, 0.2000]), tensor([0., 0.])]
    """
    runs, norms, wanted = _in_runs(updates, of, [own * math.sqrt(p.numel()) for own, p in zip(rms, of, strict=True)])
    # Small enough to change no update, large enough that no tensor's factor overflows: 0 * inf would be NaN.
    torch._foreach_clamp_min_(norms, 1e-30)
    _multiply(runs, norms, wanted)


def to_at_most_(updates: list[Tensor], of: Sequence[Tensor], norms: Sequence[float]) -> None:
    """Bring each tensor to at most its L2 norm ``norms``; arguments as of `to_rms_`.

    >>> both = [torch.full((4,), 2.0), torch.ones(1)]
    >>> to_at_most_(both, both, [1.0, 1.0])
    >>> both
    [tensor([0.5000, 0.5000, 0.5000, 0.5000]), tensor([1.])]
    """
    runs, found, wanted = _in_runs(updates, of, norms)
    torch._foreach_clamp_min_(found, wanted)
    _multiply(runs, found, wanted)


def _in_runs(
    updates: list[Tensor], of: Sequence[Tensor], wanted: Sequence[float]
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Updates of which the same norm is wanted together, as far as they lie so; the norms that they have; and that.

    Returns:
        ``([n, *shape], [n, 1, ...], wanted)`` of each run, or of a single update ``(shape, [], wanted)``.
    """
    # A norm in half precision would overflow or lose its digits.
    dtype = reduce(torch.promote_types, {update.dtype.to_real() for update in updates}, torch.float32)
    if is_sharded(of[0]):
        # One by one: what lies one after the other on one process need not do so on the others. In float64, or squares
        # would leave the range.
        squares = [norm.double().square() for norm in _norms(updates, dtype)]
        return updates, [square.sqrt().to(dtype) for square in sum_over_shards(squares, of)], list(wanted)
    members = runs_of(updates, wanted)
    if len(members) == len(updates):
        return updates, _norms(updates, dtype), list(wanted)
    runs = [as_one([updates[index] for index in run]) for run in members]
    norms = [
        torch.linalg.vector_norm(_real(run).reshape(len(run), -1), dim=1, dtype=dtype).view(-1, *[1] * (run.dim() - 1))
        for run in runs
    ]
    return runs, norms, [wanted[run[0]] for run in members]


def _norms(updates: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """L2 norm of each, 0-dimensional."""
    real = [_real(update) for update in updates]
    if all(one.device.type == "cpu" and one.dtype == dtype and one.is_contiguous() for one in real):
        # Several times as fast there, and exact to more digits: of 10⁷ numbers torch's norm is off by 4e-4.
        norms = [torch.dot(one.view(-1), one.view(-1)) for one in real]
        torch._foreach_sqrt_(norms)
        return norms
    return list(torch._foreach_norm(real, dtype=dtype))


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _multiply(runs: list[Tensor], norms: list[Tensor], wanted: list[float]) -> None:
    """By ``wanted / norms``; the norms are lost."""
    torch._foreach_reciprocal_(norms)
    torch._foreach_mul_(norms, wanted)
    torch._foreach_mul_(runs, norms)
