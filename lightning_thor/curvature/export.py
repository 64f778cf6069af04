"""The factors of a curvature as plain tensors, for uses beyond a step: a Laplace approximation, pruning, a look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_thor.factors.state import FactorState
from lightning_thor.layers.base import Layer


def export_factors(layers: Mapping[str, Layer], factors: FactorState) -> dict[str, dict[str, Any]]:
    """See `lightning_thor.Curvature.export`.

    Args:
        layers: with curvature, by name.
        factors: of these layers, in this order.

    Returns:
        Copies, by name of the layer.
    """
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
