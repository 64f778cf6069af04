"""Square blocks as one triangle each, folded into a rectangle: what travels is little more than half of the numbers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Form = Literal["symmetric", "lower", "full"]
"""What blocks are: the same on both sides of the diagonal, zero above it, or neither."""


def n_packed(size: int, form: Form = "symmetric") -> int:
    """How many numbers one block of ``size`` x ``size`` takes when packed.

    >>> n_packed(3), n_packed(4), n_packed(4, "full")
    (6, 10, 16)
    """
    return size * size if form == "full" else size * (size + 1) // 2


def pack(blocks: Tensor, form: Form = "symmetric") -> Tensor:
    """The lower triangle of each block, without a table of indices: ``[n, size, size]`` to ``[n, n_packed]``.

    The left half of the columns has the lower triangle of the right half, transposed, in the place of its own upper
    one (rectangular full packed format: Gustavson et al. 2010, ACM Trans. Math. Softw. 37(2)).

    >>> import torch
    >>> pack(torch.tensor([[[1.0, 9.0, 9.0], [2.0, 3.0, 9.0], [4.0, 5.0, 6.0]]]))
    tensor([[1., 6., 2., 3., 4., 5.]])
    """
    n, size, _ = blocks.shape
    if form == "full":
        return blocks.reshape(n, size * size)
    left, right = (size + 1) // 2, size // 2
    above = 1 - size % 2  # an even size takes one row more than the block has
    packed = blocks.new_empty(n, size + above, left)
    packed[:, above:] = blocks[:, :, :left]
    corner = packed[:, :right, left - right :]
    # tril and triu copy, so that a number that is not finite stays in its place.
    corner.copy_(blocks[:, left:, left:].mT.triu() + corner.tril(-1))
    return packed.view(n, -1)


def unpack(packed: Tensor, size: int, form: Form = "symmetric") -> Tensor:
    """What `pack` took: ``[n, n_packed]`` to ``[n, size, size]``.

    >>> import torch
    >>> unpack(pack(torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])), 2)
    tensor([[[2., 1.],
             [1., 3.]]])
    """
    n = len(packed)
    if form == "full":
        return packed.view(n, size, size)
    left, right = (size + 1) // 2, size // 2
    folded = packed.view(n, -1, left)
    blocks = packed.new_zeros(n, size, size)
    blocks[:, :, :left] = folded[:, -size:]
    blocks[:, left:, left:] = folded[:, :right, left - right :].mT
    lower = blocks.tril()
    return lower if form == "lower" else lower + lower.tril(-1).mT
