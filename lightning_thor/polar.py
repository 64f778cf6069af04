"""The polar factor (matrix sign) of a batch of matrices, by matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor

SAFETY = 1.01
"""Rounding must not carry a singular value out of the interval that the next polynomial is made for."""

# Odd polynomials a x + b x³ + c x⁵, each the best one towards 1 on the interval that the one before leaves, from
# [1e-3, 1] on: "Polar Express" (Amsel, Persson, Musco & Gower 2025, arXiv:2505.16932, algorithm 2, cushion 0.024).
POLYNOMIALS = (
    (8.2872120, -23.5958865, 17.3003873),
    (4.1070591, -2.9478499, 0.5448431),
    (3.9486909, -2.9089021, 0.5518191),
    (3.3184197, -2.4884880, 0.5100490),
    (2.3006520, -1.6689040, 0.4188073),
    (1.8913014, -1.2679958, 0.3768041),
    (1.875, -1.25, 0.375),
)
STEPS = 5


def msign(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """``U Vᵀ`` of each ``U S Vᵀ``: the nearest matrix with orthonormal rows or columns; zero for a matrix of zeros.

    Polynomials of ``matrix matrixᵀ`` bring all singular values towards 1 together. Five bring those above 0.003 of the
    Frobenius norm to 1 ± 0.13, those above 0.001 to 1 ± 0.15, and smaller ones less far; seven, all above 0.001 to 1
    within rounding. No device sync. A GPU computes float32 in bfloat16, as Muon does.

    Args:
        matrices: finite, ``[n, p, q]``; any scale.
        steps: polynomials applied; from the eighth on the last of `POLYNOMIALS` again.

    Returns:
        ``[n, p, q]`` in the dtype of ``matrices``.

    >>> msign(torch.tensor([[[3.0, 0.0], [0.0, -0.5]], [[0.0, 0.0], [0.0, 0.0]]]), steps=7)
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
    for step in range(steps):
        a, b, c = POLYNOMIALS[min(step, len(POLYNOMIALS) - 1)]
        if step < steps - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)
