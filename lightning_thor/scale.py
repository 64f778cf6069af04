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
    """Runs ``[n, *shape]`` of updates of which the same norm is wanted, the norms that they have, ``[n]``, and that."""
    # Shards one by one: what lies one after the other on one process need not do so on the others.
    members = [[index] for index in range(len(of))] if is_sharded(of[0]) else runs_of(updates, wanted)
    runs = [as_one([updates[index] for index in run]) for run in members]
    # A norm in half precision would overflow or lose its digits.
    dtype = reduce(torch.promote_types, {run.dtype.to_real() for run in runs}, torch.float32)
    norms = [_norms(run, dtype) for run in runs]
    if is_sharded(of[0]):
        # In float64, or squares would leave the range.
        (squares,) = sum_over_shards([torch.cat(norms).double().square()], of)
        norms = list(squares.sqrt().to(dtype).split(1))
    return runs, norms, [wanted[run[0]] for run in members]


def _norms(run: Tensor, dtype: torch.dtype) -> Tensor:
    """L2 norm of each tensor of a run."""
    real = torch.view_as_real(run) if run.is_complex() else run
    rows = real.reshape(len(run), -1)
    if rows.device.type == "cpu" and rows.dtype == dtype:
        # Several times as fast there, and exact to more digits: of 10⁷ numbers torch's norm is off by 4e-4.
        return torch.stack([torch.dot(row, row) for row in rows.unbind()]).sqrt_()
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms


def _multiply(runs: list[Tensor], norms: list[Tensor], wanted: list[float]) -> None:
    """By ``wanted / norms``; the norms are lost."""
    torch._foreach_reciprocal_(norms)
    torch._foreach_mul_(norms, wanted)
    for run, factors in zip(runs, norms, strict=True):
        run.mul_(factors.view(-1, *[1] * (run.dim() - 1)))
