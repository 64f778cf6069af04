"""The statistics of MindSpore's ``nn.thor``, number for number, as rows: what `lightning_thor.mindspore` gathers.

Each is the recorded behaviour of MindSpore 2.7's ``ThorGpu`` or the formulas of its Ascend version. Where those differ
from A = E[a aᵀ] and G = E[g gᵀ], the rows are scaled so that the ordinary mechanism arrives at the same factors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_thor.patches import Convolution, patches_and_values
from lightning_thor.rows import Rows, embedding_rows, linear_rows


def gpu_linear_rows(module: nn.Linear, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """A = aᵀa / in_features, where Ascend (and the paper) divide by the number of rows; G = gᵀg / rows."""
    rows = linear_rows(module, a, g, dtype, None)
    assert rows.a is not None
    return rows._replace(a=rows.a * (rows.n_samples / module.in_features) ** 0.5)


def gpu_conv_rows(module: Convolution, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """Patches and gradients averaged over the batch first: one sample, whose rows are the output positions."""
    mean_a, mean_g = a.detach().to(dtype).mean(0, keepdim=True), g.to(dtype).mean(0, keepdim=True)
    return Rows(*patches_and_values(module, mean_a, mean_g, dtype, None))


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
