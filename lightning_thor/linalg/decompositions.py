"""What is stored per block: its damped inverse, a Cholesky root of the inverse, or its eigenvectors.

A block that cannot be decomposed is reported in a mask; no error of the linear algebra leaves this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_thor.linalg.packing import Form

LAPACK_SIZE = 32
"""Largest block that LAPACK factors whole; larger ones are split in halves."""


def traces(blocks: Tensor) -> Tensor:
    """Trace of each block: ``[n, d, d]`` to ``[n]``."""
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1)


def is_finite(x: Tensor) -> Tensor:
    """`torch.isfinite` of real numbers, in two kernel launches for its four.

    >>> is_finite(torch.tensor([1.0, torch.inf, -torch.inf, torch.nan]))
    tensor([ True, False, False, False])
    """
    return x.abs() < math.inf


def damped_inverses(blocks: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Invert ``blocks + damping * I`` as ``WᵀW`` with the roots W of `damped_inverse_roots`; no device sync.

    Damping below rounding error (machine epsilon times the trace of the block) is raised to it, so that a singular
    positive semi-definite block has an inverse in its own precision.

    Args:
        blocks: symmetric positive semi-definite, ``[n, d, d]``.
        damping: added to every eigenvalue of a block, in the units of ``blocks``, ``[n]``.

    Returns:
        ``(inverses [n, d, d], succeeded [n])``. ``succeeded`` is False, and the inverse meaningless, for a block that
        is indefinite or holds NaN, and for a block of zeros whose damping is not positive. An infinite block, which no
        average is, may be inverted to zeros.

    >>> inverses, succeeded = damped_inverses(torch.diag(torch.tensor([3.0, 1.0]))[None], torch.tensor([1.0]))
    >>> inverses[0].diagonal(), succeeded
    (tensor([0.2500, 0.5000]), tensor([True]))
    """
    damped = _damped(blocks, damping)
    if blocks.shape[-1] == 1:
        return _positive(damped.reciprocal())
    roots = torch.zeros_like(damped)
    with _ieee_products():
        failed = _inverse_cholesky_(roots, damped)
        inverses = _gram(roots)
    return inverses, (failed == 0) & is_finite(traces(inverses))


def damped_inverse_roots(blocks: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a root W of each damped inverse: ``WᵀW = (blocks + damping * I)⁻¹``; no device sync.

    W is the inverse of the lower Cholesky factor, so no eigenvalues are needed. Every other root is ``Q W`` with an
    orthogonal Q. Arguments and results are as of `damped_inverses`.

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
    return roots, (failed == 0) & is_finite(roots.sum((-2, -1)))


def _damped(blocks: Tensor, damping: Tensor) -> Tensor:
    rounding = torch.finfo(blocks.dtype).eps * traces(blocks)
    damped = blocks.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(torch.maximum(damping, rounding)[:, None])
    return damped


def _positive(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``numbers [n, 1, 1]`` and a mask ``[n]`` of the ones that are finite and above 0."""
    return numbers, is_finite(numbers.flatten()) & (numbers.flatten() > 0)


def _inverse_cholesky_(into: Tensor, damped: Tensor) -> Tensor:
    """Write the inverses of the lower Cholesky factors of ``damped [n, d, d]`` into zeros ``into``, by halves.

    For a block ``[[P, Qᵀ], [Q, S]]``, the inverse factor W of P, and the inverse factor U of the Schur complement
    ``S - Q Wᵀ W Qᵀ``, it is ``[[W, 0], [-U Q Wᵀ W, U]]``.

    Nearly all work is batched products, which use every core; LAPACK factors a batch block by block, in up to twice the
    time. Unlike `torch.cholesky_inverse` it neither raises nor waits for the device.

    Returns:
        ``[n]``, above 0 for a block that is not positive definite, whose result is meaningless.
    """
    size = damped.shape[-1]
    if size <= LAPACK_SIZE:
        failed: Tensor
        factors, failed = torch.linalg.cholesky_ex(damped)
        identity = _identity(size, damped.dtype, damped.device)
        into.copy_(torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False))
        return failed
    half = size // 2
    W, U, below = into[:, :half, :half], into[:, half:, half:], into[:, half:, :half]
    first = _inverse_cholesky_(W, damped[:, :half, :half])
    Q_W = torch.bmm(damped[:, half:, :half], W.mT)
    second = _inverse_cholesky_(U, torch.baddbmm(damped[:, half:, half:], Q_W, Q_W.mT, alpha=-1))
    torch.neg(torch.bmm(torch.bmm(U, Q_W), W), out=below)
    return first.maximum(second)


@lru_cache(maxsize=64)
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Not to be changed."""
    return torch.eye(size, dtype=dtype, device=device)


def _gram(W: Tensor) -> Tensor:
    """Compute ``WᵀW``, symmetric to the last bit, of lower triangular ``W [n, d, d]``; by halves where d is large,
    which skips the products with zeros."""
    if W.shape[-1] <= 2 * LAPACK_SIZE:
        return _symmetrize_(torch.bmm(W.mT, W))
    half = W.shape[-1] // 2
    U, gram = W[:, half:, half:], torch.empty_like(W)
    for columns, place in ((W[:, :, :half], slice(0, half)), (U, slice(half, None))):
        _symmetrize_(torch.bmm(columns.mT, columns), out=gram[:, place, place])
    below = torch.bmm(U.mT, W[:, half:, :half])
    gram[:, half:, :half], gram[:, :half, half:] = below, below.mT
    return gram


def _symmetrize_(product: Tensor, out: Tensor | None = None) -> Tensor:
    product.mul_(0.5)
    return torch.add(product, product.mT, out=out)


_LOCK = Lock()
_OPEN: list[list[Callable[[], object]]] = []
"""For each context of `_ieee_products` that is open, in any thread, what restores the program's own choice."""


@contextmanager
def _ieee_products() -> Iterator[None]:
    """Multiply float32 in float32 within this context, in all threads, also if the program allows TF32 or bfloat16:
    rounded to them, a Schur complement may be indefinite."""
    with _LOCK:
        restores = _OPEN[0] if _OPEN else []
        try:
            chosen = "highest" if _OPEN else torch.get_float32_matmul_precision()
            if chosen != "highest":
                restores.append(partial(torch.set_float32_matmul_precision, chosen))
                torch.set_float32_matmul_precision("highest")
        except RuntimeError:  # the program set `fp32_precision` (torch 2.9 or newer), which excludes this older setting
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                restores.append(partial(setattr, backend, "fp32_precision", backend.fp32_precision))
                backend.fp32_precision = "ieee"
        _OPEN.append(restores)
    try:
        yield
    finally:
        with _LOCK:
            _OPEN.pop()
            for restore in () if _OPEN else restores:
                restore()


def eigenvectors(blocks: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Compute orthonormal eigenvectors of each block, as columns, by rising eigenvalue, zero rows' last.

    A zero row is a feature that was never seen, or the padding of a block. Its eigenvector is a unit vector, mixes with
    no other, and comes at the end, in order, where products with padded blocks cut the padding off. Waits for the
    device on a GPU, as `torch.linalg.eigh` does.

    Arguments are as of `damped_inverses`; ``damping`` changes no eigenvector.

    Returns:
        ``(eigenvectors [n, d, d], succeeded [n])``. ``succeeded`` is False for a block that is not finite, whose result
        is the identity.

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
    # Distinct numbers above all other eigenvalues, which are below 1 now: their eigenvectors do not mix.
    distinct = 2.0 + torch.arange(size, dtype=blocks.dtype, device=blocks.device) / size
    diagonal = sound.diagonal(dim1=-2, dim2=-1)
    silent = diagonal == 0
    diagonal.copy_(torch.where(silent, distinct, diagonal))
    try:
        found = torch.linalg.eigh(sound)[1]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not declare it
        return identity.repeat(len(blocks), 1, 1), torch.zeros_like(finite)
    return found, finite & torch.isfinite(found).flatten(1).all(1)


Problems = Mapping[int, tuple[Tensor, Tensor]]
"""By block size: blocks ``[n, size, size]`` and the damping of each, added to its eigenvalues, ``[n]``."""

Solutions = Mapping[int, tuple[Tensor, Tensor]]
"""By block size: decompositions ``[n, size, size]`` and whether each succeeded ``[n]``."""


class Decomposition(NamedTuple):
    """What is stored per block: its inverse, a Cholesky root of the inverse, or its eigenvectors.

    Names of other modules say "inverse" for any of the three.
    """

    name: str
    """Suffix of the tensors' keys in a checkpoint."""
    make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """``(blocks [n, d, d], damping [n])`` to ``(decompositions [n, d, d], succeeded [n])``."""
    form: Form
    """Which entries are sent to other ranks."""
    power: float
    """A block without any successful decomposition has its mean damped eigenvalue to this power, times the identity."""
    products: tuple[tuple[bool, bool], ...]
    """The products ``G X A`` with both stored factors that a direction takes, in order: whether A, and whether G, is
    transposed in each. One makes G⁻¹ X A⁻¹ of inverses; two make it of roots, and lead to the eigenbasis and back."""


INVERSE = Decomposition("inverse", damped_inverses, "symmetric", -1.0, ((False, False),))
ROOT = Decomposition("root", damped_inverse_roots, "lower", -0.5, ((True, False), (False, True)))
EIGENVECTORS = Decomposition("eigenvectors", eigenvectors, "full", 0.0, ((False, True), (True, False)))
