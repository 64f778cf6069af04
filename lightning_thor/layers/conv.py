"""Convolutions and transposed convolutions: every output (input) position is a row, its patch the other side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_thor.layers.base import Layer, Rows, Squares, _pick, subsample
from lightning_thor.layers.patches import Convolution, TransposedConvolution, patches_and_values


def transposed_to_matrix(layer: Layer, grads: Sequence[Tensor]) -> Tensor:
    """``[in, out / groups, *kernel]``."""
    assert layer.A is not None
    return grads[0].reshape(layer.A.groups, layer.A.width, -1).mT


def matrix_to_transposed(layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
    """The way back of `transposed_to_matrix`."""
    return [matrix.mT]


def _batched(module: Convolution | TransposedConvolution, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A single image as a batch of one; torch makes one of it too, so its gradient may be a batch already."""
    single = len(module.kernel_size) + 1
    return a[None] if a.dim() == single else a, g[None] if g.dim() == single else g


def conv_rows(module: Convolution, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """``a [batch, channels, *space]``, ``g [batch, out, *space]``: every output position is a row, its patch the input.

    With ``max_rows`` the positions are those of whole lines (all behind one index of the first axis of space), spread
    over all samples: a copy of a line is cheap, one of single positions is not, and a few whole samples say less.
    """
    a, g = _batched(module, a, g)
    return Rows(*patches_and_values(module, a.detach(), g, dtype, max_rows))


def transposed_conv_rows(
    module: TransposedConvolution, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None
) -> Rows:
    """``a [batch, channels, *space]``, ``g [batch, out, *space]``: every *input* position is a row, since each is
    multiplied by the whole kernel; the patch that it writes is its output. ``max_rows`` as in `conv_rows`."""
    a, g = _batched(module, a, g)
    outputs, inputs, n_rows, n_samples = patches_and_values(module, g, a.detach(), dtype, max_rows)
    return Rows(inputs, outputs, n_rows, n_samples)


def conv_squares(module: Convolution, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Squares:
    """The squares of `conv_rows`, with patches of one channel: the channels' summed squares have the same sum."""
    a, g = _batched(module, a, g)
    squares = a.detach().to(dtype).square().unflatten(1, (module.groups, -1)).sum(2)
    windows, gradients, n_rows, n_samples = patches_and_values(module, squares, g, dtype, max_rows)
    return Squares(windows.sum(), gradients.square().sum(), n_rows, n_samples)


def reduced_conv_rows(module: Convolution, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """One row per image: patches averaged and gradients summed over the output positions (K-FAC-reduce).

    With ``max_rows`` whole images are left out, so that there are about as many positions.
    """
    a, g = _batched(module, a, g)
    positions = g.shape[2:].numel()
    index = subsample(a.shape[0], None if max_rows is None else max(1, max_rows // max(positions, 1)), a.device)
    windows, gradients, _, _ = patches_and_values(module, _pick(a.detach(), index), _pick(g, index), dtype, None)
    n_samples = gradients.shape[-1] // max(positions, 1)
    split = (n_samples, positions)
    return Rows(windows.unflatten(-1, split).mean(-1), gradients.unflatten(-1, split).sum(-1), n_samples, n_samples)
