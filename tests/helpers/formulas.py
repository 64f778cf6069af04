"""What tests compare with, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_thor.layers.base import Layer


def preconditioned(layer: Layer, grads: Sequence[Tensor], A_inverse: Tensor | None, G_inverse: Tensor) -> list[Tensor]:
    """``G⁻¹ @ grad @ A⁻¹`` of one layer alone, in the shapes and dtypes of ``grads`` (one for each parameter)."""
    matrix = layer.to_matrix(grads, G_inverse.dtype)
    return layer.from_matrix(layer.product(G_inverse, matrix, A_inverse), grads)
