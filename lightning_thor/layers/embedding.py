"""Embeddings: A is the diagonal of token frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.layers.base import FactorWidths, Layer, LayerKind, Rows
from lightning_thor.layers.functional import calls_function_within
from lightning_thor.layers.linear import LINEAR


class EmbeddingKind(LayerKind):
    """A table ``[vocabulary, width]``, multiplied by one-hot tokens."""

    takes_bias = False
    is_matrix = False
    row_factor = "A"
    diagonal = "A"
    ties_to = LINEAR

    def rows(self, module: nn.Embedding, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """``a [...]`` token numbers, ``g [..., width]``: a row per token; `padding_idx` is no row.

        ``max_rows`` leaves nothing out: counts are cheap, and rare tokens matter.
        """
        tokens, g = a.detach().reshape(-1), g.reshape(-1, g.shape[-1]).to(dtype)
        counted = torch.ones(tokens.shape, dtype=dtype, device=tokens.device)
        if module.padding_idx is not None:
            counted = (tokens != module.padding_idx).to(dtype)
            g = g * counted[:, None]
        counts = torch.zeros(module.num_embeddings, dtype=dtype, device=tokens.device).index_add_(0, tokens, counted)
        return Rows(None, g.T[None], counted.sum(), tokens.shape[0], counts)

    def factor_widths(self, module: Any, shape: torch.Size) -> FactorWidths:
        return 1, shape[0], shape[1]

    def to_matrix(self, layer: Layer, grads: Sequence[Tensor]) -> Tensor:
        return grads[0].T[None]

    def from_matrix(self, layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
        return [matrix[0].T]

    def unsupported_reason(self, module: Any, base: type[nn.Module]) -> str | None:
        """Also refuses gradients that are sparse or scaled by frequency."""
        if module.sparse or module.scale_grad_by_freq:
            return "sparse or frequency-scaled gradient"
        return None if calls_function_within(module) else super().unsupported_reason(module, base)


EMBEDDING = EmbeddingKind(nn.Embedding)


def ascend_embedding_rows(
    module: nn.Embedding, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None, batch_size: int | None = None
) -> Rows:
    """As `EmbeddingKind.rows`, with token counts over a batch size (``g.shape[0]`` by default), not over the tokens."""
    rows = EMBEDDING.rows(module, a, g, dtype, max_rows)
    assert rows.token_counts is not None
    return rows._replace(token_counts=rows.token_counts * (rows.n_rows / (batch_size or g.shape[0])))
