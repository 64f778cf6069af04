"""Embeddings: A is the diagonal of token frequencies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_thor.layers.base import Layer, Rows


def table_to_matrix(layer: Layer, grads: Sequence[Tensor]) -> Tensor:
    """``[vocabulary, width]``: the one-hot token is the input."""
    return grads[0].T[None]


def matrix_to_table(layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
    """The way back of `table_to_matrix`."""
    return [matrix[0].T]


def embedding_rows(module: nn.Embedding, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """``a [...]`` token numbers, ``g [..., width]``: a row per token, its input one-hot; `padding_idx` is no row.

    Counts are cheap and rare tokens matter, so ``max_rows`` leaves nothing out here.
    """
    tokens, g = a.detach().reshape(-1), g.reshape(-1, g.shape[-1]).to(dtype)
    counted = torch.ones(tokens.shape, dtype=dtype, device=tokens.device)
    if module.padding_idx is not None:
        counted = (tokens != module.padding_idx).to(dtype)
        g = g * counted[:, None]
    counts = torch.zeros(module.num_embeddings, dtype=dtype, device=tokens.device).index_add_(0, tokens, counted)
    return Rows(None, g.T[None], counted.sum(), tokens.shape[0], counts)


def embedding_rows_of(
    batch_size: int,
) -> Callable[[nn.Embedding, Tensor, Tensor, torch.dtype, int | None], Rows]:
    """Token counts are divided by ``batch_size``, the argument of ``nn.thor``, not by the number of tokens."""

    def rows_of(module: nn.Embedding, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        rows = embedding_rows(module, a, g, dtype, max_rows)
        assert rows.token_counts is not None
        return rows._replace(token_counts=rows.token_counts * (rows.n_rows / batch_size))

    return rows_of


def ascend_embedding_rows(module: nn.Embedding, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """Token counts are divided by the batch's size."""
    return embedding_rows_of(g.shape[0])(module, a, g, dtype, max_rows)
