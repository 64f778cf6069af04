"""Eigenvalues of the averaged factors, and what they say; nothing here is part of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_thor.block_size.spectral_loss import diagonal_blocks
from lightning_thor.factors.layout import Side
from lightning_thor.factors.state import FactorState
from lightning_thor.linalg.block_diagonal import partition

WIDEST = 2048
"""Of larger blocks no eigenvalues are computed: it would take minutes."""


def factor_eigenvalues(factors: FactorState) -> dict[tuple[int, Side], Tensor]:
    """Eigenvalues of the diagonal blocks of each average together; waits for the device.

    Returns:
        By layer and side, falling, at least 0, ``[groups * width]``, in float64 on the CPU; in units of the gradients,
        whatever unit the factors have. Factors with blocks wider than `WIDEST` are left out.
    """
    unit = 1.0 if factors.gradient_unit is None else float(factors.gradient_unit)
    found: dict[int, Tensor] = {}
    for size, batch in factors.batches.items():
        if size == 1:
            found[size] = batch.average.flatten(1)
        elif size <= WIDEST:
            try:
                found[size] = torch.linalg.eigvalsh(batch.average)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not declare it
                continue
    found = {size: values.double().cpu().clamp_min(0.0) for size, values in found.items()}
    by_factor: dict[tuple[int, Side], Tensor] = {}
    for layer in range(len(factors.updates)):
        for side, blocks in factors.layout.factors(layer):
            size, place = factors.layout.offset(layer, side)
            if size in found:
                values = found[size][place].flatten().sort(descending=True).values
                # Padding adds zeros, the smallest ones.
                own = values[: blocks.groups * blocks.width]
                by_factor[layer, side] = own * unit**2 if side == "G" else own
    return by_factor


def effective_rank(eigenvalues: Tensor) -> float:
    """``exp(-Σ p log p)`` with ``p = λ / Σ λ`` (Roy & Vetterli 2007, "The effective rank", EUSIPCO) of eigenvalues of
    at least 0, ``[n]``: from 1 to their number, at which all are equal; 0 if all are 0.

    >>> effective_rank(torch.ones(8, dtype=torch.float64)), effective_rank(torch.tensor([3.0, 0.0, 0.0]))
    (8.0, 1.0)
    """
    p = eigenvalues / eigenvalues.sum().clamp_min(torch.finfo(eigenvalues.dtype).tiny)
    return float(torch.special.entr(p).sum().exp()) if bool(p.any()) else 0.0


def energy_outside(factors: FactorState, layer: int, side: Side) -> dict[int, float]:
    """What a whole factor would lose in diagonal blocks of each size: the share of its squared Frobenius norm.

    Args:
        factors: of some layers.
        layer: its number.
        side: ``"A"`` or ``"G"``.

    Returns:
        By block size, powers of two from 16 to below the width, 0..1; none for a factor that is partitioned already.
    """
    whole = factors.layout.partition(layer, side)
    if whole.n_blocks > 1 or whole.size <= 16:
        return {}
    blocks = factors.blocks(layer, side, "average")[:, 0].double()
    total = blocks.square().sum()
    kept = {
        size: diagonal_blocks(blocks, partition(whole.width, size, whole.groups)).square().sum() / total
        for size in (2**n for n in range(4, 64) if 2**n < whole.width)
    }
    return {size: 1.0 - float(share) for size, share in kept.items()} if total else {}
