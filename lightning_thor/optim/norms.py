"""How large tensors are, right for every finite number: squares leave the range of a dtype long before numbers do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_thor.distributed.dtensor import is_split, max_over_shards, sum_over_shards
from lightning_thor.linalg import memory

PIECE = 2**16
"""How many squares are added up in the dtype of a tensor; sums of more are sums of such sums, in float64. Of 10⁷
numbers in float32, one sum of all their squares is off by up to 3e-4."""


LEAST_MEAN_SQUARE = 1e-24
"""Below it, squares of float32 numbers may lose digits: entries a thousand times as small as others, whose squares
still count, have squares that are no normal numbers."""


def can_read_on_host(tensors: Sequence[Tensor], of: Sequence[Tensor]) -> bool:
    """True if what is done with ``tensors`` may depend on their numbers: they are whole, and no device is waited for.

    Args:
        tensors: what of each lies in this process.
        of: the parameters, whole or sharded.
    """
    return not is_split(of[0]) and all(one.device.type in memory.HOST for one in tensors)


def as_real(x: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, in their own memory."""
    return torch.view_as_real(x) if x.is_complex() else x


def in_memory_order(x: Tensor) -> Tensor:
    """All numbers of ``x`` as ``[numel]``, in the order in which they lie in memory: a copy only if there are gaps.

    >>> in_memory_order(torch.arange(6).view(2, 3).T)
    tensor([0, 1, 2, 3, 4, 5])
    """
    if x.is_contiguous():
        return x if x.dim() == 1 else x.view(-1)
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)


# ── numbers that the program can read ──


def sums_of_squares(tensors: Sequence[Tensor]) -> list[float]:
    """Of each real tensor; nothing is done against squares that leave the range of its dtype, or float32's for halves.

    >>> sums_of_squares([torch.tensor([3.0, 4.0]), torch.tensor([1e-30])])
    [25.0, 0.0]
    """
    return [_sum_of_squares(one) for one in tensors]


def _sum_of_squares(x: Tensor) -> float:
    flat = x if x.dim() == 1 else x.view(-1) if x.is_contiguous() else in_memory_order(x)
    if flat.numel() > PIECE:
        return math.fsum(_sum_of_squares(piece) for piece in flat.split(PIECE))
    flat = _wide(flat)
    # Read one by one: to bring some numbers together takes longer on a CPU.
    return float(torch.dot(flat, flat).item())


def is_exact(sum_of_squares: float, numel: int) -> bool:
    """Whether `sums_of_squares` can be trusted with ``numel`` squares of that sum."""
    return LEAST_MEAN_SQUARE * numel <= sum_of_squares < math.inf


def scaled_down(x: Tensor) -> tuple[Tensor, int]:
    """A real tensor in at least float32, times a power of two, whose largest number is in [0.5, 1); new.

    Returns:
        ``(y, exponent)`` with ``x = y * 2**exponent``; 0 where ``x`` has no largest number, or it is 0.

    >>> scaled_down(torch.tensor([1e-45, 0.0]))
    (tensor([0.5000, 0.0000]), -148)
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    largest = float(y.abs().amax()) if y.numel() else 0.0
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    # In two steps: the reciprocal of a denormal number is not in its dtype's range.
    y.mul_(math.ldexp(1.0, -(exponent // 2))).mul_(math.ldexp(1.0, exponent // 2 - exponent))
    return y, exponent


def root_mean_squares(tensors: Sequence[Tensor]) -> list[float]:
    """Of each, for every finite number; of a complex number the square is that of its absolute value.

    >>> root_mean_squares([torch.tensor([1e-30, -1e-30]), torch.zeros(2), torch.zeros(0)])
    [1e-30, 0.0, 0.0]
    """
    found: list[float] = []
    real = [as_real(one) for one in tensors]
    for one, x, squares in zip(tensors, real, sums_of_squares(real), strict=True):
        exponent, n = 0, max(1, one.numel())
        if not is_exact(squares, n):
            x, exponent = scaled_down(x)
            (squares,) = sums_of_squares([x])
        found.append(math.ldexp(math.sqrt(squares / n), exponent))
    return found


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# ── numbers on a device, or on several processes ──


def norms(tensors: Sequence[Tensor], of: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """L2 norms of whole tensors, right for every finite number; no device sync, and one launch for all of anything.

    Args:
        tensors: what of each real tensor lies in this process.
        of: the parameters, all sharded over the same processes, or none.

    Returns:
        ``(norms, ())``, ``[n]`` in float64, in whose range squares of float32 are. If a tensor is of float64,
        ``(norms, scales)``: what the norms were, had each tensor been multiplied by its two ``scales``, each ``[n]``.
    """
    scales: tuple[Tensor, ...] = ()
    if any(one.dtype == torch.float64 for one in tensors):
        scales = _scales(tensors, of)
        for by in scales:
            tensors = torch._foreach_mul(list(tensors), list(by.unbind()))
    partial = torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float64))
    return sum_over_shards(partial.square_(), of).sqrt_(), scales


def _scales(tensors: Sequence[Tensor], of: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two powers of two for each tensor; times both, its largest number is in [0.5, 1), if it is not 0."""
    some = [one if one.numel() else one.new_zeros(1) for one in tensors]
    largest = torch.stack(torch._foreach_norm(some, math.inf, dtype=torch.float64))
    exponent = torch.frexp(max_over_shards(largest, of)).exponent.double()
    half = (exponent / 2).floor_()
    return torch.exp2(-half), torch.exp2(half - exponent)


def roots_of_products(left: Sequence[Tensor], right: Sequence[Tensor], of: Sequence[Tensor]) -> Tensor:
    """``sqrt|sum x y|`` of whole tensors, ``[n]`` in float64, for any finite numbers; no device sync.

    Args:
        left: what of each real tensor lies in this process.
        right: of the same shapes.
        of: the parameters, all sharded over the same processes, or none.
    """
    sides, all_scales = [left, right], list[Tensor]()
    for index, side in enumerate(sides):
        if any(one.dtype == torch.float64 for one in side):
            for by in _scales(side, of):
                sides[index] = torch._foreach_mul(list(sides[index]), list(by.unbind()))
                all_scales.append(by)
    found = torch.stack([_product(x, y) for x, y in zip(*sides, strict=True)])
    roots = sum_over_shards(found, of).abs_().sqrt_()
    for by in all_scales:
        roots /= by.sqrt()
    return roots


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Sum of ``x * y``, 0-dimensional, in float64; on a CPU piece by piece, in its cache."""
    at_once = PIECE if x.device.type in memory.HOST else max(1, x.numel())
    pieces = zip(x.reshape(-1).split(at_once), y.reshape(-1).split(at_once), strict=True)
    return torch.stack([torch.dot(a.double(), b.double()) for a, b in pieces]).sum()
