"""The share of its spectral norm that a factor loses when it is partitioned into diagonal blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_thor.linalg.block_diagonal import BlockPartition

LANCZOS_STEPS = 48
"""Dimensions of the Krylov space, for wider matrices."""

PartitionFn = Callable[[int, int | None, int], BlockPartition]
"""``(width, block_size, groups)`` to blocks, as `lightning_thor.linalg.block_diagonal.partition` does."""


def spectral_losses(factor: Tensor, sizes: Sequence[int], partition: PartitionFn) -> Tensor:
    """What a matrix A loses by partitioning: ``1 - sqrt(λmax(Â Âᵀ) / λmax(A Aᵀ))`` (THOR: Chen et al., AAAI 2021).

    Â is A in the blocks of the partition, and zero elsewhere. For a symmetric positive semi-definite A the loss equals
    ``1 - λmax(Â) / λmax(A)``; a matrix of zeros loses nothing. Eigenvalues of matrices wider than 48 come from a Krylov
    space of 48 dimensions, so they are never too large.

    Args:
        factor: ``[groups, d, d]``, the diagonal blocks of A (of a grouped convolution: one for each group), symmetric
            positive semi-definite.
        sizes: block sizes.
        partition: how a width is partitioned.

    Returns:
        The lost share for each size, 0..1, ``[len(sizes)]``, on the CPU.

    >>> from lightning_thor.linalg.block_diagonal import partition
    >>> spectral_losses(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), [1, 2], partition)
    tensor([0.3333, 0.0000])
    """
    groups, width, _ = factor.shape
    largest = [_largest_eigenvalue(diagonal_blocks(factor, partition(width, size, groups))) for size in sizes]
    whole, partitioned = _largest_eigenvalue(factor), torch.stack(largest)
    return torch.where(whole > 0, 1 - partitioned / whole, 0.0).cpu()


def diagonal_blocks(factor: Tensor, blocks: BlockPartition) -> Tensor:
    """Take the diagonal blocks out of matrices: ``[groups, d, d]`` to ``[groups * n_blocks, size, size]``."""
    if blocks.n_blocks == 1:
        return factor
    padded = F.pad(factor, (0, blocks.padding, 0, blocks.padding))
    split = padded.view(blocks.groups, blocks.n_blocks, blocks.size, blocks.n_blocks, blocks.size)
    return split.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(-1, blocks.size, blocks.size)


def _largest_eigenvalue(matrices: Tensor) -> Tensor:
    """The largest eigenvalue of ``n`` symmetric positive semi-definite matrices ``[n, d, d]``, 0-dimensional.

    Wide ones by the Lanczos method: an eigenvalue decomposition takes minutes at widths of thousands.
    """
    n, width, _ = matrices.shape
    if width <= LANCZOS_STEPS:
        exact: Tensor = torch.linalg.eigvalsh(matrices).max()
        return exact
    # A generator of its own, so that the same matrix always gives the same number.
    start = torch.randn(width, 1, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64, device="cpu")
    vector = start.to(matrices).div_(start.norm()).repeat(n, 1, 1)
    space = matrices.new_zeros(n, width, LANCZOS_STEPS)
    for step in range(LANCZOS_STEPS):
        space[:, :, step : step + 1] = vector
        vector = matrices @ vector
        for _ in range(2):  # once is not enough in floating point
            vector = vector - space @ (space.mT @ vector)
        # A matrix of low rank ends its Krylov space earlier; the orthogonalisation below takes the rest.
        vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vector.dtype).tiny)
    basis = torch.linalg.qr(space).Q
    largest: Tensor = torch.linalg.eigvalsh(basis.mT @ matrices @ basis).max()
    return largest
