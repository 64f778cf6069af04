"""One pair of factors for a weight of two roles: a table of embeddings tied to an output layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_thor.linalg.block_diagonal import BlockPartition, diagonal_to_blocks


def add_table_factors_(A: Tensor, G: Tensor, D: Tensor, G_table: Tensor, partition: BlockPartition) -> None:
    """Add the factors of a table to those of the output layer with the same weight.

    The two roles of a weight ``[vocabulary, width]`` have Fisher matrices that add up: ``F ≈ D ⊗ Gₑ + Gₗ ⊗ Aₗ``, with
    the (diagonal) frequencies D of tokens and the covariance Gₑ of the gradients of their vectors, and Gₗ, Aₗ of the
    output layer. The sum of two Kronecker products is none, so it is taken to be ``s (D + Gₗ) ⊗ (Gₑ + Aₗ)``. Each
    product is balanced first, so that both of its factors have the same trace (t for a product of trace t²), and s is
    such that the trace is F's, tₑ² + tₗ².

    Approximated: the cross terms ``D ⊗ Aₗ`` and ``Gₗ ⊗ Gₑ`` are none of F's, and the correlation of a sample's
    gradients in the two roles is left out. Where one role has no gradients, the result is the other's own product.

    Args:
        A: of the output layer, ``[1, n_blocks, size, size]``; changed in place.
        G: of the output layer, ``[1, n_blocks, size, size]``; changed in place.
        D: of the table, ``[1, vocabulary, 1, 1]``.
        G_table: of the table, partitioned as ``A``.
        partition: of ``G``.
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
