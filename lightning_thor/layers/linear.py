"""Linear layers and the projections of attentions: every position of the input is a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_thor.layers.base import FactorWidths, Layer, LayerKind, Rows, pick, subsample


class ProjectionKind(LayerKind):
    """A weight ``[out, in]`` that multiplies the last dimension of the input."""

    def rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """``a [..., in]`` or its `subsample_input`, ``g [..., out]``: every position is a row."""
        # reshape, never view: gradients can come in any memory format.
        a, g = a.detach().reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        index = subsample(g.shape[0], max_rows, g.device)
        if len(a) == len(g):
            a = pick(a, index)
        a, g = a.to(dtype), pick(g, index).to(dtype)
        return Rows(a.T[None], g.T[None], a.shape[0], a.shape[0])

    def reduced_rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """Inputs averaged and gradients summed over all dimensions between the first and the last."""
        if a.dim() > 2:
            a, g = a.detach().flatten(1, -2).to(dtype).mean(1), g.flatten(1, -2).to(dtype).sum(1)
        return self.rows(module, a, g, dtype, max_rows)

    def subsample_input(self, a: Tensor, max_rows: int | None) -> Tensor:
        """The rows of ``a [..., in]`` that `rows` takes, ``[max_rows, in]``, or all of ``a`` if it has no more."""
        index = subsample(a.numel() // max(a.shape[-1], 1), max_rows, a.device)
        return a if index is None else a.detach().reshape(-1, a.shape[-1]).index_select(0, index)

    def unsupported_reason(self, module: Any, base: type[nn.Module]) -> str | None:
        """None: a subclass with a forward of its own (LoRA, quantised training) still multiplies by its weight."""
        return None


ATTENTION = ProjectionKind(nn.MultiheadAttention)
"""The four projections of an attention, which multiplies by their weights without calling a module."""
ATTENTION.in_attention = ATTENTION


class LinearKind(ProjectionKind):
    """As `nn.Linear`."""

    is_linear = True
    checks_pairs = True
    in_attention: LayerKind | None = ATTENTION

    def computed_shape(self, module: nn.Module) -> torch.Size | None:
        return torch.Size((module.out_features, module.in_features)) if isinstance(module, nn.Linear) else None

    def fits(self, module: Any, a: Tensor, g: Tensor, *, is_whole: bool = True) -> bool:
        """True if ``a [..., in]`` and ``g [..., out]`` have the widths of the weight, and as many rows if ``a`` is
        whole."""
        computed = self.computed_shape(module) if is_parametrized(module) else None
        rows, columns = (computed or module.weight.shape)[:2]
        out, width = (rows, columns) if self.row_factor == "G" else (columns, rows)
        shapes_fit = a.dim() > 0 and g.dim() > 0 and a.shape[-1] == width and g.shape[-1] == out
        return shapes_fit and a.is_floating_point() and not (is_whole and a.numel() * out != g.numel() * width)


class TransposedLinearKind(LinearKind):
    """A weight ``[in, out]``."""

    row_factor = "A"
    is_flat = False
    in_attention = None
    unsupported_reason = LayerKind.unsupported_reason

    def factor_widths(self, module: Any, shape: torch.Size) -> FactorWidths:
        return 1, shape[0], shape[1]

    def to_matrix(self, layer: Layer, grads: Sequence[Tensor]) -> Tensor:
        return super().to_matrix(layer, [grads[0].T, *grads[1:]])

    def from_matrix(self, layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
        weight, *bias = super().from_matrix(layer, matrix)
        return [weight.flatten(0, 1).T, *bias]


LINEAR = LinearKind(nn.Linear, "torch_geometric.nn.dense.linear.Linear")
LINEAR_TRANSPOSED = TransposedLinearKind("transformers.pytorch_utils.Conv1D")
