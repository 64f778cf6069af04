"""Norms of tensors, right for all finite numbers: squares leave the range of a dtype long before numbers do.

In all functions ``tensors`` are this rank's parts, and ``params`` their parameters, sharded or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_thor.distributed.dtensor import are_whole, reduce_over_shards
from lightning_thor.linalg import memory

Numbers = Sequence[float] | Tensor
"""One per tensor: floats, or ``[n]`` in float64 where reading them would wait for a device or for other ranks."""

ROW_NUMEL = 2**10
"""How many squares of a long tensor are added in its own dtype; these sums are added in float64. One float32 sum of 10⁷
squares is off by up to 3e-4, one of 35,000 by 2e-6 where the largest come first."""

LONG_NUMEL = 2**14
"""From here on a tensor's squares are added by rows: for shorter ones the second sum takes longer than the first."""

PRODUCT_NUMEL = 2**16
"""Numbers of a product that are converted to float64 at once: what a CPU's cache takes."""

LEAST_MEAN_SQUARE = 1e-24
"""Below it squares of float32 may lose digits: the square of an entry a thousand times smaller than the others, which
still counts, is no normal number."""


def can_read_on_host(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether Python may read numbers of ``tensors``: they are whole, and no device has to be waited for."""
    return are_whole(params) and "cpu" in memory.HOST and not [x for x in tensors if not x.is_cpu]


def as_real(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Complex tensors as views of pairs of real numbers, real tensors as they are."""
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]


# ── on the host ──


def scaled_sums_of_squares(tensors: Sequence[Tensor]) -> tuple[list[float], list[int]]:
    """Sum the squares of each real tensor: ``(sums, exponents)``, of the tensor times ``2**-exponent``.

    >>> scaled_sums_of_squares([torch.tensor([3.0, 4.0]), torch.tensor([2.0**-100])])
    ([25.0, 0.25], [0, -99])
    """
    sums, exponents = _sums_of_squares(tensors), [0] * len(tensors)
    for index, x in enumerate(tensors):
        if not LEAST_MEAN_SQUARE * x.numel() <= sums[index] < math.inf:
            y, exponents[index] = scaled_down(x)
            (sums[index],) = _sums_of_squares([y])
    return sums, exponents


def _sums_of_squares(tensors: Sequence[Tensor]) -> list[float]:
    sums: list[float] = []
    for x in tensors:
        flat = x
        if x.dim() != 1 and x.is_contiguous():
            flat = x.view(-1)
        elif x.dim() != 1:  # in the order of its memory: only one with gaps is copied
            flat = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)
        numel, total = flat.numel(), 0.0
        if numel > LONG_NUMEL:
            numel %= ROW_NUMEL
            rows = flat[: flat.numel() - numel].view(-1, ROW_NUMEL)
            # Halves in float32; squared in float64, so that a norm near float32's limits has a square.
            of_rows = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(x.dtype, torch.float32)).double()
            total, flat = torch.dot(of_rows, of_rows).item(), flat[flat.numel() - numel :]
        if numel:
            wide = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
            total += torch.dot(wide, wide).item()
        sums.append(total)
    return sums


def scaled_down(x: Tensor) -> tuple[Tensor, int]:
    """Copy a real tensor times a power of two, in at least float32, so that its largest absolute value is in [0.5, 1).

    Returns:
        ``(y, exponent)`` with ``x = y * 2**exponent``; exponent 0 if all numbers are zero or some are not finite.

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
    """Root mean square of the absolute values of each real or complex tensor.

    >>> root_mean_squares([torch.tensor([1e-30, -1e-30]), torch.zeros(2), torch.zeros(0)])
    [1e-30, 0.0, 0.0]
    """
    sums, exponents = scaled_sums_of_squares(as_real(tensors))
    means = [total / max(1, x.numel()) for total, x in zip(sums, tensors, strict=True)]
    return [math.ldexp(math.sqrt(mean), exponent) for mean, exponent in zip(means, exponents, strict=True)]


# ── on a device, or over several ranks ──


def norms(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """L2 norms of whole real tensors in few kernel launches, without a device sync.

    Returns:
        ``(norms [n], ())`` in float64, in whose range squares of float32 are. If a tensor is of float64,
        ``(norms [n], scales)`` with two ``scales [n]``: the norms of the tensors times both scales.
    """
    scales: tuple[Tensor, ...] = ()
    if any(x.dtype == torch.float64 for x in tensors):
        scales = _scales(tensors, params)
        for scale in scales:
            tensors = torch._foreach_mul(list(tensors), list(scale.unbind()))
    partial = torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float64))
    if are_whole(params):
        return partial, scales
    return reduce_over_shards(partial.square_(), params, "SUM").sqrt_(), scales


def _scales(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two powers of two per tensor; times both, its largest number is in [0.5, 1) or 0."""
    filled = [x if x.numel() else x.new_zeros(1) for x in tensors]
    largest = torch.stack(torch._foreach_norm(filled, math.inf, dtype=torch.float64))
    exponent = torch.frexp(reduce_over_shards(largest, params, "MAX")).exponent.double()
    half = (exponent / 2).floor_()
    return torch.exp2(-half), torch.exp2(half - exponent)


def roots_of_products(left: Sequence[Tensor], right: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """``sqrt|sum x y|`` of whole real tensors x of ``left`` and y of ``right``, ``[n]`` in float64; no device sync."""
    sides, all_scales = [left, right], list[Tensor]()
    for index, side in enumerate(sides):
        if any(x.dtype == torch.float64 for x in side):
            for scale in _scales(side, params):
                sides[index] = torch._foreach_mul(list(sides[index]), list(scale.unbind()))
                all_scales.append(scale)
    products = torch.stack([_product(x, y) for x, y in zip(*sides, strict=True)])
    roots = reduce_over_shards(products, params, "SUM").abs_().sqrt_()
    for scale in all_scales:
        roots /= scale.sqrt()
    return roots


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Sum ``x * y`` in float64, 0-dimensional; on a CPU in chunks that fit its cache."""
    length = PRODUCT_NUMEL if x.device.type in memory.HOST else max(1, x.numel())
    chunks = zip(x.reshape(-1).split(length), y.reshape(-1).split(length), strict=True)
    return torch.stack([torch.dot(a.double(), b.double()) for a, b in chunks]).sum()
