"""The polar factor (matrix sign) of a batch of matrices, by matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor

SAFETY = 1.01
"""Margin by which each polynomial's output is shrunk: rounding must not carry a singular value beyond the interval of
the next polynomial."""

POLYNOMIALS = (
    (8.1521075, -23.2112081, 17.0183430),
    (3.9094318, -2.8997808, 0.5538707),
    (3.1898183, -2.3919490, 0.4991274),
    (2.2000282, -1.5770596, 0.4089374),
    (1.8829545, -1.2588102, 0.3758821),
    (1.875, -1.25, 0.375),
)
"""Coefficients (a, b, c) of odd polynomials a x + b x³ + c x⁵. Each is the best approximation of 1 on the image of the
polynomial before it, the first one on [0.005, 1]: "Polar Express" (Amsel, Persson, Musco & Gower 2025,
arXiv:2505.16932, algorithm 2, cushion 0.024)."""

STEPS = 4
"""How many polynomials `msign` applies by default."""

LARGEST_PART = 64
"""Rows of a wide matrix, or columns of a tall one, that have a sign of their own in `part_length`."""

GRAM_FROM = 1.5
"""Ratio of width to height above which iterating the Gram matrix takes fewer multiplications."""


def msign(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """Compute ``U Vᵀ`` of each ``U S Vᵀ``, the nearest matrix with orthonormal rows or columns; zero for zeros.

    Matrices are first divided by their Schatten norm ``(sum s⁸)^⅛``, which is closer to the largest singular value than
    the Frobenius norm and costs no product of its own. Polynomials of ``X Xᵀ`` then bring all singular values
    towards 1. Four polynomials bring values above 0.005 of the Schatten norm to 1 ± 0.11, smaller ones less far; six
    bring all above 0.005 to 1 within rounding. No device sync. A GPU computes float32 in bfloat16, as Muon does.

    Args:
        matrices: finite, ``[n, p, q]``, of any scale.
        steps: how many polynomials to apply; from the seventh on, the last one of `POLYNOMIALS` repeats.

    Returns:
        ``[n, p, q]`` in the dtype of ``matrices``.

    >>> msign(torch.tensor([[[3.0, 0.0], [0.0, -0.5]], [[0.0, 0.0], [0.0, 0.0]]]), steps=6)
    tensor([[[ 1.,  0.], [ 0., -1.]], [[ 0.,  0.], [ 0.,  0.]]])
    """
    if matrices.shape[-2] > matrices.shape[-1]:  # so that the Gram matrix is the smaller one
        return msign(matrices.mT, steps).mT
    tiny = torch.finfo(matrices.dtype).tiny
    # By the largest entry first: squares of very small or large entries leave the range of the dtype.
    x = matrices / matrices.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(tiny)
    if x.is_cuda and x.dtype == torch.float32:
        x = x.to(torch.bfloat16)
    gram = torch.bmm(x, x.mT)
    square = torch.bmm(gram, gram)
    largest = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).sqrt()
    largest = torch.where(largest > 0, largest, 1.0)  # a matrix of zeros
    gram, square, x = gram / largest, square / largest.square(), x * largest.rsqrt()
    # All polynomials of one Gram matrix commute, so a wide matrix is multiplied once, by their product, at the end.
    # But where singular values are zero, rounding grows with each step, without bound: hence the limits.
    multiplies_once = is_wide(*x.shape[-2:]) and x.dtype in (torch.float32, torch.float64) and steps <= len(POLYNOMIALS)
    product = None
    for step in range(steps):
        a, b, c = POLYNOMIALS[min(step, len(POLYNOMIALS) - 1)]
        if step < steps - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        if step:
            square = torch.bmm(gram, gram)
        factor = torch.add(b * gram, square, alpha=c)
        if multiplies_once:
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else torch.bmm(factor, product)
            if step < steps - 1:
                gram = torch.bmm(torch.bmm(factor, gram), factor)
        else:
            x = torch.baddbmm(x, factor, x, beta=a)
            if step < steps - 1:
                gram = torch.bmm(x, x.mT)
    return (x if product is None else torch.bmm(product, x)).to(matrices.dtype)


def part_length(width: int, n_blocks: int, size: int) -> int:
    """Length of the parts of a matrix's smaller side that each have a sign of their own: as many whole blocks of the
    factor on that side as divide it evenly into parts of at most `LARGEST_PART`, but at least one block.

    The sign of a part of 64 rows costs a fraction of the whole matrix's where this has hundreds, and leads as far
    (figures: benchmarks/default_mode/README.md).

    Args:
        width: of the side.
        n_blocks: of the factor.
        size: of a block.

    >>> part_length(512, n_blocks=8, size=64), part_length(96, n_blocks=2, size=48), part_length(24, n_blocks=6, size=4)
    (64, 48, 24)
    >>> part_length(10, n_blocks=3, size=4)  # the last block has padding
    10
    """
    if n_blocks * size != width:
        return width
    together = max(k for k in range(1, n_blocks + 1) if n_blocks % k == 0 and (k == 1 or k * size <= LARGEST_PART))
    return together * size


def is_wide(small: int, large: int) -> bool:
    """Whether `msign` iterates the Gram matrix of ``[small, large]`` and multiplies the matrix itself once."""
    return large > GRAM_FROM * small
