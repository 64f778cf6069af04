"""Block-diagonal factors: a width partitioned into equal blocks, covariances of these blocks, products with them.

A factor of width d is stored as ``[groups, n_blocks, size, size]``; no tensor of d x d is ever made when blocks are
smaller. A diagonal factor is the case ``size == 1``. Where ``size * n_blocks`` exceeds the width, the last block is
padded with zeros, which damping turns into harmless numbers that no product reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_thor.linalg.memory import scratch

UNBATCHED_DEVICES = {"cpu"}
"""Devices on which torch computes a batch of products one by one unless the result is contiguous, which takes longer
than to copy a contiguous result."""

SCRATCH_FROM = 2**15
"""From so many numbers on new memory costs as much as a product: an allocator maps it, and gives it back."""


class BlockPartition(NamedTuple):
    """The partition of a factor: ``groups`` independent ones (grouped convolutions), each ``n_blocks`` of ``size``."""

    groups: int
    width: int
    n_blocks: int
    size: int

    @property
    def padding(self) -> int:
        """Rows of zeros after the width, so that all blocks have one size."""
        return self.n_blocks * self.size - self.width

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.groups, self.n_blocks, self.size, self.size

    @property
    def sums_shape(self) -> tuple[int, ...]:
        """The shape of ``into`` in `add_covariance_`: as many numbers in another arrangement."""
        if self.size == 1:
            return self.groups, self.n_blocks
        return self.groups * self.n_blocks, self.size, self.size


def partition(width: int, block_size: int | None, groups: int = 1) -> BlockPartition:
    """Partition a width into equal blocks.

    A size that divides the width is preferred, if it is no smaller than ``block_size // 2``: it needs no padding.

    Args:
        width: of the factor.
        block_size: largest size of a block; None keeps the factor whole.
        groups: number of factors of this width.

    >>> partition(100, 128).shape, partition(576, 128).shape, partition(257, 128)
    ((1, 1, 100, 100), (1, 6, 96, 96), BlockPartition(groups=1, width=257, n_blocks=3, size=86))
    """
    if block_size is None or width <= block_size:
        return BlockPartition(groups, width, 1, width)
    for size in range(block_size, max(block_size // 2, 1) - 1, -1):
        if width % size == 0:
            return BlockPartition(groups, width, width // size, size)
    n_blocks = -(-width // block_size)
    return BlockPartition(groups, width, n_blocks, -(-width // n_blocks))


def partition_with_remainder(width: int, block_size: int | None, groups: int = 1) -> BlockPartition:
    """As `partition`, but as MindSpore's nn.thor does: blocks of ``block_size`` in order, a smaller one last.

    The remainder is stored as a block of full size, padded with zeros, which changes no number.

    >>> partition_with_remainder(300, 128).n_blocks, partition_with_remainder(300, 128).padding
    (3, 84)
    """
    if block_size is None or width <= block_size:
        return BlockPartition(groups, width, 1, width)
    return BlockPartition(groups, width, -(-width // block_size), block_size)


def diagonal(width: int) -> BlockPartition:
    """The partition of a diagonal factor: blocks of size 1."""
    return BlockPartition(1, width, width, 1)


def diagonal_to_blocks(diagonal: Tensor, blocks: BlockPartition) -> Tensor:
    """A diagonal matrix ``[groups * width]`` in the ``blocks`` of a partition, ``[groups, n_blocks, size, size]``.

    >>> diagonal_to_blocks(torch.tensor([1.0, 2.0, 3.0]), partition_with_remainder(3, 2))[0, 1]
    tensor([[3., 0.],
            [0., 0.]])
    """
    padded = F.pad(diagonal.view(blocks.groups, blocks.width), (0, blocks.padding))
    return padded.view(blocks.groups, blocks.n_blocks, blocks.size).diag_embed()


def add_covariance_(into: Tensor, rows: Tensor, blocks: BlockPartition, scale: float | Tensor = 1.0) -> None:
    """Add the diagonal blocks of ``(scale * rows) @ (scale * rows).T`` to ``into``.

    Args:
        into: ``[groups * n_blocks, size, size]``, or ``[groups, n_blocks]`` where the size is 1; changed in place.
        rows: features first, ``[groups, width, n]``, in the dtype of ``into``; any strides.
        blocks: the partition of ``width``.
        scale: a number costs nothing; a 0-dimensional tensor costs a pass over the rows, but no device sync.

    >>> x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    >>> out = torch.zeros(diagonal(2).sums_shape)
    >>> add_covariance_(out, x, diagonal(2))
    >>> out
    tensor([[ 5., 25.]])
    """
    if isinstance(scale, Tensor):
        rows, scale = rows * scale, 1.0
    if blocks.padding:
        rows = F.pad(rows, (0, 0, 0, blocks.padding))
    if blocks.size == 1:
        into.add_(rows.square().sum(-1), alpha=scale**2)
        return
    x = rows if blocks.n_blocks == 1 else rows.reshape(-1, blocks.size, rows.shape[-1])
    into.baddbmm_(x, x.mT, alpha=scale**2)


def left_product(factor: Tensor, matrix: Tensor, blocks: BlockPartition) -> Tensor:
    """``blockdiag(factor) @ matrix``.

    Args:
        factor: ``[groups, n_blocks, size, size]``, contiguous, or transposed blocks of a contiguous tensor.
        matrix: ``[groups, width, n]``.
        blocks: the partition of the factor.

    Returns:
        ``[groups, width, n]``.
    """
    groups, width, n = matrix.shape
    if blocks.size == 1:
        return factor.reshape(groups, blocks.n_blocks, 1) * matrix
    if blocks.padding:
        matrix = F.pad(matrix, (0, 0, 0, blocks.padding))
    split = matrix.reshape(groups * blocks.n_blocks, blocks.size, n)
    product = torch.bmm(factor.view(-1, blocks.size, blocks.size), split)
    return product.view(groups, blocks.n_blocks * blocks.size, n)[:, :width]


def right_product(matrix: Tensor, factor: Tensor, blocks: BlockPartition) -> Tensor:
    """``matrix @ blockdiag(factor)``.

    Args:
        matrix: ``[groups, m, width]``.
        factor: ``[groups, n_blocks, size, size]``, contiguous, or transposed blocks of a contiguous tensor.
        blocks: the partition of the factor.

    Returns:
        ``[groups, m, width]``.
    """
    groups, m, width = matrix.shape
    if blocks.size == 1:
        return matrix * factor.reshape(groups, 1, blocks.n_blocks)
    if blocks.padding:
        matrix = F.pad(matrix, (0, blocks.padding))
    split = matrix.reshape(groups, m, blocks.n_blocks, blocks.size)
    if groups > 1:
        return torch.matmul(split.transpose(1, 2), factor).transpose(1, 2).reshape(groups, m, -1)[..., :width]
    product = matrix.new_empty(1, m, blocks.n_blocks, blocks.size)
    columns_product(split[0], factor[0], into=product[0])
    return product.view(1, m, -1)[..., :width]


def columns_product(matrix: Tensor, factor: Tensor, into: Tensor, scale: Tensor | None = None) -> None:
    """Write ``diag(scale) @ matrix @ blockdiag(factor)`` into a tensor.

    Args:
        matrix: ``[m, n_blocks, size]``.
        factor: ``[n_blocks, size, size]``.
        into: ``[m, n_blocks, size]``, contiguous; on a device of `UNBATCHED_DEVICES` it may be ``matrix`` itself.
        scale: ``[m, 1, 1]``; None for ones.
    """
    if into.device.type not in UNBATCHED_DEVICES:
        torch.bmm(matrix.transpose(0, 1), factor, out=into.transpose(0, 1))
        if scale is not None:
            into.mul_(scale)
        return
    columns = matrix.transpose(0, 1)
    if into.numel() < SCRATCH_FROM:
        product = torch.bmm(columns, factor).transpose(0, 1)
    else:
        out = scratch(into.numel(), factor).view(columns.shape)
        product = torch.bmm(columns, factor, out=out).transpose(0, 1)
    if scale is None:
        into.copy_(product)
    else:
        torch.mul(product, scale, out=into)
