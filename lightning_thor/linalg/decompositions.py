"""What is stored per block: its damped inverse, a root of that, or its eigenvectors.

Nothing here raises from inside linear algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_thor.linalg.packing import Form

LAPACK_SIZE = 32
"""Blocks up to this size go to LAPACK as they are."""


def traces(blocks: Tensor) -> Tensor:
    """Trace of each block: ``[n, d, d]`` -> ``[n]``."""
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1)


def damped_inverses(blocks: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of ``blocks + damping * I``, as ``WᵀW`` of their roots, without a device sync.

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
    if blocks.shape[-1] == 1:
        return _positive(_damped(blocks, damping).reciprocal())
    roots, succeeded = damped_inverse_roots(blocks, damping)
    with _ieee_products():
        inverses = _gram(roots)
    return inverses, succeeded & torch.isfinite(traces(inverses))


def damped_inverse_roots(blocks: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """A root W of each inverse that `damped_inverses` gives, ``WᵀW = (blocks + damping * I)⁻¹``.

    W is the inverse of the lower Cholesky factor: no eigenvalues are needed. All other roots are ``Q W`` with an
    orthogonal Q. Arguments and values are those of `damped_inverses`.

    >>> roots, succeeded = damped_inverse_roots(torch.diag(torch.tensor([3.0, 0.0]))[None], torch.tensor([1.0]))
    >>> roots[0], succeeded
    (tensor([[0.5000, 0.0000], [0.0000, 1.0000]]), tensor([True]))
    """
    damped = _damped(blocks, damping)
    if blocks.shape[-1] == 1:
        return _positive(damped.rsqrt())
    roots = torch.zeros_like(damped)
    with _ieee_products():
        failed = _inverse_cholesky_(roots, damped)
    return roots, (failed == 0) & torch.isfinite(roots.sum((-2, -1)))


def _damped(blocks: Tensor, damping: Tensor) -> Tensor:
    rounding = torch.finfo(blocks.dtype).eps * traces(blocks)
    damped = blocks.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(torch.maximum(damping, rounding)[:, None])
    return damped


def _positive(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """``[n, 1, 1]``, and which are finite and above 0."""
    return numbers, torch.isfinite(numbers.flatten()) & (numbers.flatten() > 0)


def _inverse_cholesky_(into: Tensor, damped: Tensor) -> Tensor:
    """Inverses of the lower Cholesky factors, by halves: of ``[[P, Qᵀ], [Q, S]]`` with the inverse factor W of P, and
    that of the Schur complement ``S - Q Wᵀ W Qᵀ``, U, it is ``[[W, 0], [-U Q Wᵀ W, U]]``.

    Nearly all of it is batched products, which take all cores; LAPACK takes a batch block by block. For 24 blocks of
    128 on one core of an AMD EPYC (Zen 3, float32, torch 2.13) roots take 3.4 ms and inverses from them 4.7, LAPACK's
    factorisation and inverse 7.1. Nothing here raises, or waits for the device as `torch.cholesky_inverse` does.

    Args:
        into: zeros, ``[n, d, d]``.
        damped: ``[n, d, d]``.

    Returns:
        Above 0 for blocks that are not positive definite, ``[n]``; what is put in their place is meaningless.
    """
    size = damped.shape[-1]
    if size <= LAPACK_SIZE:
        failed: Tensor
        factors, failed = torch.linalg.cholesky_ex(damped)
        identity = torch.eye(size, dtype=damped.dtype, device=damped.device)
        into.copy_(torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False))
        return failed
    half = size // 2
    W, U, below = into[:, :half, :half], into[:, half:, half:], into[:, half:, :half]
    first = _inverse_cholesky_(W, damped[:, :half, :half])
    Q_W = torch.bmm(damped[:, half:, :half], W.mT)
    second = _inverse_cholesky_(U, torch.baddbmm(damped[:, half:, half:], Q_W, Q_W.mT, alpha=-1))
    torch.neg(torch.bmm(torch.bmm(U, Q_W), W), out=below)
    return first.maximum(second)


def _gram(W: Tensor) -> Tensor:
    """``WᵀW`` of lower triangular matrices, symmetric to the last bit; of large ones by halves, which spares zeros."""
    if W.shape[-1] <= 2 * LAPACK_SIZE:
        return _symmetric(torch.bmm(W.mT, W))
    half = W.shape[-1] // 2
    U, gram = W[:, half:, half:], torch.empty_like(W)
    for columns, place in ((W[:, :, :half], slice(0, half)), (U, slice(half, None))):
        _symmetric(torch.bmm(columns.mT, columns), out=gram[:, place, place])
    below = torch.bmm(U.mT, W[:, half:, :half])
    gram[:, half:, :half], gram[:, :half, half:] = below, below.mT
    return gram


def _symmetric(product: Tensor, out: Tensor | None = None) -> Tensor:
    product.mul_(0.5)
    return torch.add(product, product.mT, out=out)


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Products of float32 in this context are float32's, not TF32's or bfloat16's, whatever the program has chosen: a
    Schur complement that is rounded so coarsely need not be positive definite."""
    try:
        chosen = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was chosen by `fp32_precision` (torch 2.9 or newer), with which this does not mix
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        each = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, each, strict=True):
                backend.fp32_precision = precision
        return
    if chosen == "highest":
        yield
        return
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


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


class Decomposition(NamedTuple):
    """One of them; where the code speaks of inverses, it is what takes their place."""

    name: str
    """In a checkpoint."""
    make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """``(blocks [n, d, d], added to their eigenvalues [n])`` to ``(kept [n, d, d], succeeded [n])``."""
    form: Form
    """What has to travel."""
    power: float
    """Of a block that could never be inverted the identity times this power of its mean eigenvalue is kept."""
    products: int
    """How many times a direction multiplies a layer's matrix by those of both its factors."""


INVERSE = Decomposition("inverse", damped_inverses, "symmetric", -1.0, 1)


ROOT = Decomposition("root", damped_inverse_roots, "lower", -0.5, 2)


EIGENVECTORS = Decomposition("eigenvectors", eigenvectors, "full", 0.0, 2)
