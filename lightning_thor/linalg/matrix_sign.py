"""The polar factor (matrix sign) of a batch of matrices, by matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor

SAFETY = 1.01
"""Rounding must not carry a singular value out of the interval that the next polynomial is made for."""


# Odd polynomials a x + b x³ + c x⁵, each the best one towards 1 on the interval that the one before leaves, from
# [0.005, 1] on: "Polar Express" (Amsel, Persson, Musco & Gower 2025, arXiv:2505.16932, algorithm 2, cushion 0.024).
POLYNOMIALS = (
    (8.1521075, -23.2112081, 17.0183430),
    (3.9094318, -2.8997808, 0.5538707),
    (3.1898183, -2.3919490, 0.4991274),
    (2.2000282, -1.5770596, 0.4089374),
    (1.8829545, -1.2588102, 0.3758821),
    (1.875, -1.25, 0.375),
)


STEPS = 4


GRAM_FROM = 1.5
"""How many times as wide as high a matrix must be for the products of small squares to be fewer multiplications."""


def msign(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """``U Vᵀ`` of each ``U S Vᵀ``: the nearest matrix with orthonormal rows or columns; zero for a matrix of zeros.

    Polynomials of ``matrix matrixᵀ`` bring all singular values towards 1 together, from their Schatten norm
    ``(sum s⁸)^⅛`` on, which is closer to the largest than the Frobenius norm is and comes with the products of the
    first polynomial. Four bring those above 0.005 of it to 1 ± 0.11, and smaller ones less far; six, all above 0.005
    to 1 within rounding. No device sync. A GPU computes float32 in bfloat16, as Muon does.

    Args:
        matrices: finite, ``[n, p, q]``; any scale.
        steps: polynomials applied; from the seventh on the last of `POLYNOMIALS` again.

    Returns:
        ``[n, p, q]`` in the dtype of ``matrices``.

    >>> msign(torch.tensor([[[3.0, 0.0], [0.0, -0.5]], [[0.0, 0.0], [0.0, 0.0]]]), steps=6)
    tensor([[[ 1.,  0.], [ 0., -1.]], [[ 0.,  0.], [ 0.,  0.]]])
    """
    if matrices.shape[-2] > matrices.shape[-1]:  # the Gram matrix is to be of the small side
        return msign(matrices.mT, steps).mT
    tiny = torch.finfo(matrices.dtype).tiny
    # By the largest entry first: squares of very small or large entries would leave the range of the norm's sum.
    x = matrices / matrices.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(tiny)
    if x.is_cuda and x.dtype == torch.float32:
        x = x.to(torch.bfloat16)
    gram = torch.bmm(x, x.mT)
    square = torch.bmm(gram, gram)
    largest = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).sqrt()
    largest = torch.where(largest > 0, largest, 1.0)  # a matrix of zeros
    gram, square, x = gram / largest, square / largest.square(), x * largest.rsqrt()
    # All matrices of one computation commute, so that a wide matrix is multiplied by their product once, at the end.
    # With each step their rounding grows where singular values are zero, though, in the end without bound.
    at_the_end = is_wide(*x.shape[-2:]) and x.dtype in (torch.float32, torch.float64) and steps <= len(POLYNOMIALS)
    whole = None
    for step in range(steps):
        a, b, c = POLYNOMIALS[min(step, len(POLYNOMIALS) - 1)]
        if step < steps - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        if step:
            square = torch.bmm(gram, gram)
        factor = torch.add(b * gram, square, alpha=c)
        if at_the_end:
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            whole = factor if whole is None else torch.bmm(factor, whole)
            if step < steps - 1:
                gram = torch.bmm(torch.bmm(factor, gram), factor)
        else:
            x = torch.baddbmm(x, factor, x, beta=a)
            if step < steps - 1:
                gram = torch.bmm(x, x.mT)
    return (x if whole is None else torch.bmm(whole, x)).to(matrices.dtype)


def is_wide(small: int, large: int) -> bool:
    """Whether a matrix ``[small, large]`` has its Gram matrix iterated, and itself multiplied once."""
    return large > GRAM_FROM * small
