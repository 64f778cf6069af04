"""The curvature of each layer for uses beyond a step: its factors as tensors, and how they look as plain types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_thor.block_size.spectral_loss import diagonal_blocks
from lightning_thor.curvature.refresh_schedule import RefreshSchedule
from lightning_thor.factors.layout import SIDES, Side
from lightning_thor.factors.state import FactorState
from lightning_thor.layers.base import Layer
from lightning_thor.linalg.block_diagonal import partition

N_EIGENVALUES = 32
"""Eigenvalues of a factor that are given, evenly spread over the logarithm of their rank."""

WIDEST = 2048
"""Of larger blocks no eigenvalues are computed: it would take minutes."""


def export_factors(layers: Mapping[str, Layer], factors: FactorState) -> dict[str, dict[str, Any]]:
    """See `lightning_thor.Curvature.export`; ``factors`` are of these layers, in this order."""
    unit = 1.0 if factors.gradient_unit is None else float(factors.gradient_unit)
    updates, positions = factors.updates.tolist(), factors.positions.tolist()
    exported: dict[str, dict[str, Any]] = {}
    for number, (name, layer) in enumerate(layers.items()):
        one: dict[str, Any] = {
            "n_windows": int(updates[number]),
            "rows_per_sample": positions[number],
            "with_bias": layer.with_bias,
            "tied_to": layer.tied_to,
        }
        for side, own in factors.layout.factors(number):
            blocks = factors.blocks(number, side, "average").double()
            if side == "G":
                blocks = blocks * unit**2
            one[side] = blocks.clone()
            one[f"{side}_eigenvalues"], one[f"{side}_eigenvectors"] = torch.linalg.eigh(blocks)
            one[f"{side}_width"] = own.width
        exported[name] = one
    return exported


def layer_figures(
    layers: Mapping[str, Layer], factors: FactorState, schedule: RefreshSchedule
) -> dict[str, dict[str, Any]]:
    """See `lightning_thor.Curvature.figures`; ``factors`` and ``schedule`` are of these layers, in this order."""
    unit = 1.0 if factors.gradient_unit is None else float(factors.gradient_unit)
    spectra = factor_eigenvalues(factors, unit)
    changes, dampings, rows = factors.changes.tolist(), factors.last_damping.tolist(), factors.rows.tolist()
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(layers):
        found[name] = {
            "step": schedule.step,
            "inverted_at": schedule.inverted_at[number],
            "stopped": schedule.has_stopped[number] if schedule.has_trace_rule else None,
            "rows": rows[number],
        }
        for side, blocks in factors.layout.factors(number):
            column, scale = SIDES.index(side), unit**2 if side == "G" else 1.0
            trace = float(factors.blocks(number, side, "average").diagonal(dim1=-2, dim2=-1).sum()) * scale
            damping = dampings[number][column] * scale
            found[name][side] = {
                "width": blocks.groups * blocks.width,
                "block_size": blocks.size,
                "n_blocks": blocks.groups * blocks.n_blocks,
                "is_partitioned": blocks.n_blocks > 1 and blocks.size > 1,
                "trace": _finite(trace),
                "damping": _finite(damping),
                "change": _finite(changes[number][column]),
                **_of_spectrum(spectra.get((number, side)), damping),
                "outside": {str(size): lost for size, lost in energy_outside(factors, number, side).items()},
            }
    return found


def _of_spectrum(values: Tensor | None, damping: float) -> dict[str, Any]:
    if values is None:
        return dict.fromkeys(("ranks", "eigenvalues", "condition", "effective_rank"))
    spread = torch.logspace(0, math.log10(len(values)), N_EIGENVALUES, dtype=torch.float32, device="cpu")
    ranks = sorted({round(rank) for rank in spread.tolist()})
    least = float(values[-1]) + damping
    return {
        "ranks": ranks,
        "eigenvalues": [float(f"{values[rank - 1]:.4g}") for rank in ranks],
        "condition": _finite((float(values[0]) + damping) / least) if least > 0 else None,
        "effective_rank": effective_rank(values),
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def factor_eigenvalues(factors: FactorState, unit: float) -> dict[tuple[int, Side], Tensor]:
    """Eigenvalues of the diagonal blocks of each average together, by layer and side; waits for the device.

    They are falling, at least 0, ``[groups * width]``, in float64 on the CPU, and in units of the gradients: those of G
    times ``unit²``. Factors with blocks wider than `WIDEST` are left out.
    """
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
    """The share of its squared Frobenius norm that a whole factor would lose in diagonal blocks, by their size: powers
    of two from 16 to below the width; none for a factor that is partitioned already."""
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
