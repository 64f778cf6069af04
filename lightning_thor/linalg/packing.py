"""Square blocks packed as one triangle each, which takes little more than half of the numbers to send or store."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Form = Literal["symmetric", "lower", "full"]
"""Blocks that are equal on both sides of the diagonal, zero above it, or neither."""


def packed_numel(size: int, form: Form = "symmetric") -> int:
    """The number of entries of one packed block of ``size`` x ``size``.

    >>> packed_numel(3), packed_numel(4), packed_numel(4, "full")
    (6, 10, 16)
    """
    return size * size if form == "full" else size * (size + 1) // 2


def pack(blocks: Tensor, form: Form = "symmetric") -> Tensor:
    """The lower triangle of each block, row by row: ``[n, size, size]`` to ``[n, packed_numel]``.

    >>> pack(torch.tensor([[[1.0, 9.0, 9.0], [2.0, 3.0, 9.0], [4.0, 5.0, 6.0]]]))
    tensor([[1., 2., 3., 4., 5., 6.]])
    """
    n, size, _ = blocks.shape
    numbers = blocks.reshape(n, size * size)
    return numbers if form == "full" else numbers.index_select(1, _tables(size, blocks.device)[0])


def unpack(packed: Tensor, size: int, form: Form = "symmetric") -> Tensor:
    """The inverse of `pack`: ``[n, packed_numel]`` to ``[n, size, size]``.

    >>> unpack(pack(torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])), 2)
    tensor([[[2., 1.],
             [1., 3.]]])
    """
    if form != "full":
        packed = packed.index_select(1, _tables(size, packed.device)[1])
    blocks = packed.view(-1, size, size)
    return blocks.tril_() if form == "lower" else blocks


# A model has as many tables as block sizes; a table is no larger than two blocks. One look-up, since transposing each
# block takes several times as long on a CPU.
@lru_cache(maxsize=64)
def _tables(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat index in the block of each entry of its triangle ``[packed_numel]``, and index in the triangle of each entry
    of the block ``[size * size]``."""
    rows, columns = torch.tril_indices(size, size, device="cpu")
    table = torch.empty(size, size, dtype=torch.int64, device="cpu")
    table[rows, columns] = table[columns, rows] = torch.arange(len(rows), device="cpu")
    return (rows * size + columns).to(device), table.flatten().to(device)
