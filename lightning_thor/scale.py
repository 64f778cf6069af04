"""What brings updates to scale: to a root mean square, to at most a norm, to at most a change of what is predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

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


def rms_factors(updates: list[Tensor], of: Sequence[Tensor], rms: Sequence[float]) -> list[Tensor]:
    """What brings each tensor to its root mean square ``rms``: one 0-dimensional tensor each, in at least float32.

    Args:
        updates: what of each tensor lies in this process.
        of: the parameters, whole or sharded.
        rms: of each.

    >>> both = [torch.full((4,), 2.0), torch.zeros(2)]
    >>> rms_factors(both, both, [0.2, 0.2])[0]
    tensor(0.1000)
    """
    factors = _norms(updates, of)
    # Small enough to change no update, large enough that no tensor's factor overflows: 0 * inf would be NaN.
    torch._foreach_clamp_min_(factors, 1e-30)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, [own * math.sqrt(whole.numel()) for own, whole in zip(rms, of, strict=True)])
    return factors


def clip_factors(updates: list[Tensor], of: Sequence[Tensor], norms: Sequence[float]) -> list[Tensor]:
    """What brings each tensor to at most its L2 norm ``norms``: one 0-dimensional tensor each, see `rms_factors`.

    >>> both = [torch.full((4,), 2.0), torch.ones(1)]
    >>> clip_factors(both, both, [1.0, 1.0])
    [tensor(0.2500), tensor(1.)]
    """
    factors = _norms(updates, of)
    torch._foreach_clamp_min_(factors, list(norms))
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, list(norms))
    return factors


def _norms(updates: list[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    # A norm in half precision would overflow or lose its digits.
    dtype = reduce(torch.promote_types, (update.dtype.to_real() for update in updates), torch.float32)
    real = [torch.view_as_real(update) if update.is_complex() else update for update in updates]
    if all(one.device.type == "cpu" and one.dtype == dtype and one.is_contiguous() for one in real):
        # Several times as fast there, and exact to more digits: of 10⁷ numbers torch's norm is off by 4e-4.
        norms = [torch.dot(one.view(-1), one.view(-1)) for one in real]
        torch._foreach_sqrt_(norms)
    else:
        norms = list(torch._foreach_norm(real, dtype=dtype))
    if not is_sharded(of[0]):
        return norms
    # In float64, or squares would leave the range.
    squares = sum_over_shards([norm.double().square() for norm in norms], of)
    return [square.sqrt().to(dtype) for square in squares]
