"""Convolutions and transposed convolutions: a position of the output (input) is a row, its patch the other side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.layers.base import FactorWidths, Layer, LayerKind, Rows, pick, subsample
from lightning_thor.layers.functional import calls_function_within
from lightning_thor.layers.patches import Convolution, TransposedConvolution, mean_patches, patches_and_values


def batched(module: Convolution | TransposedConvolution, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A single image as a batch of one; torch makes this batch too, so the gradient may have it already.

    Args:
        module: a convolution.
        a: its input, ``[channels, *space]`` or ``[batch, channels, *space]``.
        g: the gradient of its output, likewise.
    """
    single = len(module.kernel_size) + 1
    return a[None] if a.dim() == single else a, g[None] if g.dim() == single else g


class ConvolutionKind(LayerKind):
    """A weight ``[out, in / groups, *kernel]``; inputs are ``[batch, in, *space]``, or without a batch."""

    methods: tuple[str, ...] = ("forward", "_conv_forward")

    def rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """``a [batch, in, *space]``, ``g [batch, out, *space]``: every output position is a row, its patch the input.

        ``max_rows`` takes whole lines (all positions behind one index of the first axis of space) from all samples: to
        copy a line is cheap, to copy single positions is not, and a few whole samples say less.
        """
        a, g = batched(module, a, g)
        return Rows(*patches_and_values(module, a.detach(), g, dtype, max_rows))

    def reduced_rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """Patches averaged and gradients summed over the output positions of each image; ``max_rows`` are images."""
        a, g = batched(module, a, g)
        index = subsample(a.shape[0], max_rows, a.device)
        a, g = pick(a.detach(), index), pick(g, index)
        gradients = g.flatten(2).sum(2, dtype=dtype).T.reshape(module.groups, -1, len(g))
        return Rows(mean_patches(module, a, g.shape[2:], dtype), gradients, len(g), len(g))

    def loss_terms(self, module: Any, g: Tensor) -> int:
        """The batch size."""
        return g.shape[0] if g.dim() == len(module.kernel_size) + 2 else 1

    def factor_widths(self, module: Any, shape: torch.Size) -> FactorWidths:
        return module.groups, shape[1:].numel(), shape[0] // module.groups

    def computed_shape(self, module: nn.Module) -> torch.Size | None:
        if not isinstance(module, Convolution | TransposedConvolution):  # of a user's registered type
            return None
        channels = [module.in_channels, module.out_channels]
        first, second = channels if module.transposed else reversed(channels)
        return torch.Size((first, second // module.groups, *module.kernel_size))

    def unsupported_reason(self, module: Any, base: type[nn.Module]) -> str | None:
        return None if calls_function_within(module) else super().unsupported_reason(module, base)


class TransposedConvolutionKind(ConvolutionKind):
    """A weight ``[in, out / groups, *kernel]``; a bias does not belong to the rows."""

    methods = ("forward",)
    takes_bias = False
    row_factor = "A"
    is_flat = False
    reduced_rows = None  # type: ignore[assignment]

    def rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """``a [batch, in, *space]``, ``g [batch, out, *space]``: every *input* position is a row, since each is
        multiplied by the whole kernel; its output is the patch that it writes."""
        a, g = batched(module, a, g)
        outputs, inputs, n_rows, n_samples = patches_and_values(module, g, a.detach(), dtype, max_rows)
        return Rows(inputs, outputs, n_rows, n_samples)

    def factor_widths(self, module: Any, shape: torch.Size) -> FactorWidths:
        return module.groups, shape[0] // module.groups, shape[1:].numel()

    def to_matrix(self, layer: Layer, grads: Sequence[Tensor]) -> Tensor:
        assert layer.A is not None
        return grads[0].reshape(layer.A.groups, layer.A.width, -1).mT

    def from_matrix(self, layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
        return [matrix.mT]


CONVOLUTION = ConvolutionKind(nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLUTION_TRANSPOSED = TransposedConvolutionKind(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
