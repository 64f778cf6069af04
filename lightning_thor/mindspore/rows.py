"""The statistics of MindSpore's ``nn.thor`` on a GPU, number for number, as rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_thor.layers.base import Rows
from lightning_thor.layers.linear import LINEAR
from lightning_thor.layers.patches import Convolution, patches_and_values


def gpu_linear_rows(module: nn.Linear, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """A = aᵀa / in_features, where Ascend (and the paper) divide by the number of rows; G = gᵀg / rows."""
    rows = LINEAR.rows(module, a, g, dtype, None)
    assert rows.a is not None
    return rows._replace(a=rows.a * (rows.n_samples / module.in_features) ** 0.5)


def gpu_conv_rows(module: Convolution, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """Patches and gradients averaged over the batch first: one sample, whose rows are the output positions."""
    mean_a, mean_g = a.detach().to(dtype).mean(0, keepdim=True), g.to(dtype).mean(0, keepdim=True)
    return Rows(*patches_and_values(module, mean_a, mean_g, dtype, None))
