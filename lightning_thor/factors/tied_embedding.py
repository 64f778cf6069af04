"""One pair of factors for a weight of two roles: a table of embeddings that also is the weight of an output layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_thor.linalg.block_diagonal import BlockPartition, diagonal_to_blocks


def add_table_factors_(A: Tensor, G: Tensor, D: Tensor, G_table: Tensor, partition: BlockPartition) -> None:
    """Take the factors of a table into those of the output layer that has the same weight.

    A table ``W [vocabulary, width]`` that also is the weight of an output layer has two roles, whose Fisher matrices
    add up: ``F ≈ D ⊗ Gₑ + Gₗ ⊗ Aₗ``, with ``D`` the (diagonal) frequencies of tokens and ``Gₑ`` the covariance of the
    gradients of their vectors, and ``Gₗ``, ``Aₗ`` of the output layer. The sum of two Kronecker products is none, so
    it is taken to be ``s (D + Gₗ) ⊗ (Gₑ + Aₗ)``, each product balanced first so that both of its factors have the same
    trace (t for a product of trace t²), and s such that the trace is F's, tₑ² + tₗ².

    Approximated: the cross terms ``D ⊗ Aₗ`` and ``Gₗ ⊗ Gₑ`` are none of F's, and what a sample's gradients in the two
    roles have to do with each other is left out. Where one role says nothing it is the other's own product.

    Args:
        A, G: of the output layer, ``[1, n_blocks, size, size]``; changed in place.
        D, G_table: of the table; ``G_table`` is cut as ``A``.
        cut: of ``G``.
    """
    tiny = torch.finfo(A.dtype).tiny
    trace_D, trace_G_table, trace_A, trace_G = (
        factor.diagonal(dim1=-2, dim2=-1).sum() for factor in (D, G_table, A, G)
    )
    # Roots before products, and no squares: traces may be far from 1.
    t_table, t_output = trace_D.sqrt() * trace_G_table.sqrt(), trace_A.sqrt() * trace_G.sqrt()
    # The square root of s, for each side.
    scale = torch.hypot(t_table, t_output) / (t_table + t_output).clamp_min(tiny)
    weights = [
        torch.where(trace > 0, t * scale / trace, 0.0)
        for t, trace in ((t_table, trace_D), (t_table, trace_G_table), (t_output, trace_A), (t_output, trace_G))
    ]
    G.mul_(weights[3]).add_(diagonal_to_blocks(D.flatten(), partition) * weights[0])
    A.mul_(weights[2]).add_(G_table * weights[1])
