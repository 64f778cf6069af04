"""Linear layers: weights ``[out, in]``, or ``[in, out]``; every position is a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_thor.layers.base import Layer, Rows, _pick, subsample


def _with_column(layer: Layer, weight: Tensor, grads: Sequence[Tensor]) -> Tensor:
    if not layer.with_bias:
        return weight
    return torch.cat([weight, grads[1].reshape(layer.G.groups, layer.G.width, 1)], dim=2)


def weight_to_matrix(layer: Layer, grads: Sequence[Tensor]) -> Tensor:
    """``[out, in, ...]``, and perhaps a bias ``[out]``."""
    return _with_column(layer, grads[0].reshape(layer.G.groups, layer.G.width, -1), grads)


def matrix_to_weight(layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
    """The way back of `weight_to_matrix`."""
    return [matrix[..., :-1], matrix[..., -1]] if layer.with_bias else [matrix]


def transposed_linear_to_matrix(layer: Layer, grads: Sequence[Tensor]) -> Tensor:
    """``[in, out]``, and perhaps a bias ``[out]``."""
    return _with_column(layer, grads[0].T.reshape(layer.G.groups, layer.G.width, -1), grads)


def matrix_to_transposed_linear(layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
    """The way back of `transposed_linear_to_matrix`."""
    weight, *bias = matrix_to_weight(layer, matrix)
    return [weight.flatten(0, 1).T, *bias]


def linear_rows(module: nn.Linear, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """``a [..., in]`` or what `subsample_linear_input` leaves of it, ``g [..., out]``: every position is a row."""
    # reshape, never view: gradients can come in any memory format.
    a, g = a.detach().reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    index = subsample(g.shape[0], max_rows, g.device)
    if len(a) == len(g):
        a = _pick(a, index)
    a, g = a.to(dtype), _pick(g, index).to(dtype)
    return Rows(a.T[None], g.T[None], a.shape[0], a.shape[0])


def subsample_linear_input(a: Tensor, max_rows: int | None) -> Tensor:
    """The rows that `linear_rows` takes of ``a [..., in]``, which it also takes in the place of ``a``."""
    index = subsample(a.numel() // max(a.shape[-1], 1), max_rows, a.device)
    return a if index is None else a.detach().reshape(-1, a.shape[-1]).index_select(0, index)


def reduced_linear_rows(module: nn.Linear, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """One row per sample: inputs averaged and gradients summed over all dimensions between the first and the last
    (K-FAC-reduce: Eschenhagen et al. 2023, arXiv:2311.00636)."""
    if a.dim() > 2:
        a, g = a.detach().flatten(1, -2).to(dtype).mean(1), g.flatten(1, -2).to(dtype).sum(1)
    return linear_rows(module, a, g, dtype, max_rows)
