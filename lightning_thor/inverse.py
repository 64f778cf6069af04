"""Damped inverses of a batch of symmetric blocks, which never raise from inside linear algebra."""

from __future__ import annotations

import torch
from torch import Tensor


def traces(blocks: Tensor) -> Tensor:
    """Trace of each block: ``[n, d, d]`` -> ``[n]``."""
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1)


def damped_inverses(blocks: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of ``blocks + damping * I`` by one batched Cholesky factorisation, without a device sync.

    Damping below rounding (the machine epsilon times a block's trace) is raised to it, so that a singular positive
    semi-definite block has an inverse in its own precision instead of a failure.

    Args:
        blocks: symmetric positive semi-definite, ``[n, d, d]``.
        damping: added to every eigenvalue of its block, in the units of ``blocks``, ``[n]``.

    Returns:
        ``(inverses [n, d, d], succeeded [n])``; where ``succeeded`` is False (a non-finite or indefinite block, or a
        damping that is not positive on a block of zeros) the inverse is meaningless and must not be used.

    >>> inverses, succeeded = damped_inverses(torch.diag(torch.tensor([3.0, 1.0]))[None], torch.tensor([1.0]))
    >>> inverses[0].diagonal(), succeeded
    (tensor([0.2500, 0.5000]), tensor([True]))
    """
    rounding = torch.finfo(blocks.dtype).eps * traces(blocks)
    damping = torch.maximum(damping, rounding)
    if blocks.shape[-1] == 1:
        inverses = (blocks + damping[:, None, None]).reciprocal()
        return inverses, torch.isfinite(inverses.flatten()) & (inverses.flatten() > 0)
    damped = blocks.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    factors, info = torch.linalg.cholesky_ex(damped)
    # cholesky_inverse raises where a factor is singular: it gets the identity there, and `succeeded` tells.
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    usable = (info == 0) & torch.isfinite(traces(factors))
    inverses = torch.cholesky_inverse(torch.where(usable[:, None, None], factors, identity))
    return inverses, usable & torch.isfinite(traces(inverses))
