"""The curvature of each layer for uses beyond a step: its factors as tensors, and how they look as plain types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_thor.curvature.refresh_schedule import RefreshSchedule
from lightning_thor.factors.layout import SIDES
from lightning_thor.factors.spectra import effective_rank, energy_outside, factor_eigenvalues
from lightning_thor.factors.state import FactorState
from lightning_thor.layers.base import Layer

N_EIGENVALUES = 32
"""Eigenvalues of a factor that are given, evenly spread over the logarithm of their rank."""


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
        for side, partition in factors.layout.factors(number):
            blocks = factors.blocks(number, side, "average").double()
            if side == "G":
                blocks = blocks * unit**2
            one[side] = blocks.clone()
            one[f"{side}_eigenvalues"], one[f"{side}_eigenvectors"] = torch.linalg.eigh(blocks)
            one[f"{side}_width"] = partition.width
        exported[name] = one
    return exported


def layer_figures(
    layers: Mapping[str, Layer], factors: FactorState, schedule: RefreshSchedule
) -> dict[str, dict[str, Any]]:
    """See `lightning_thor.Curvature.figures`; ``factors`` and ``schedule`` are of these layers, in this order."""
    unit = 1.0 if factors.gradient_unit is None else float(factors.gradient_unit)
    spectra = factor_eigenvalues(factors)
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
