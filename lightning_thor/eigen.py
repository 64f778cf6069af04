"""Eigenvectors of a batch of symmetric blocks, which never raise from inside linear algebra."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_thor.inverse import traces


def eigenvectors(blocks: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal eigenvectors of each block, as columns, by rising eigenvalue; then the unit vectors of rows of zeros.

    Rows of zeros are features that were never seen, and the padding of a block: they stay apart from the others, in
    their order, at the end, where products with blocks that are padded cut off what lies in the padding. Waits for the
    device on a GPU, as `torch.linalg.eigh` does.

    Args:
        blocks: symmetric positive semi-definite, ``[n, d, d]``.
        damping: ``[n]``; does not change eigenvectors, and is here for the sake of one signature.

    Returns:
        ``(eigenvectors [n, d, d], succeeded [n])``; where ``succeeded`` is False (a non-finite block) they are those of
        the identity and must not be used.

    >>> found, _ = eigenvectors(torch.tensor([[[0.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0]]]), torch.zeros(1))
    >>> found[0].abs().round(decimals=2)
    tensor([[0.0000, 0.0000, 1.0000],
            [0.7100, 0.7100, 0.0000],
            [0.7100, 0.7100, 0.0000]])
    """
    size = blocks.shape[-1]
    finite = torch.isfinite(blocks).flatten(1).all(1)
    identity = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
    if size == 1:
        return identity.expand_as(blocks), finite
    scale = traces(blocks)
    scale = torch.where(finite & (scale > 0), scale, 1.0)
    sound = torch.where(finite[:, None, None], blocks / scale[:, None, None], identity)
    # Above all eigenvalues, which lie below 1 now, and each its own, so that they do not mix.
    apart = 2.0 + torch.arange(size, dtype=blocks.dtype, device=blocks.device) / size
    diagonal = sound.diagonal(dim1=-2, dim2=-1)
    silent = diagonal == 0
    diagonal.copy_(torch.where(silent, apart, diagonal))
    try:
        found = torch.linalg.eigh(sound)[1]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not declare it
        return identity.repeat(len(blocks), 1, 1), torch.zeros_like(finite)
    return found, finite & torch.isfinite(found).flatten(1).all(1)
