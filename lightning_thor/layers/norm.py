"""Norms: the diagonal Fisher matrix of scale and shift, without an input factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_thor.layers.base import FactorWidths, Layer, LayerKind, Rows, pick, subsample

UNFUSED_DEVICES = {"cpu"}
"""Devices on which torch's batch norm and var_mean take four to five times as long as their parts."""


class NormKind(LayerKind):
    """A scale, and perhaps a shift of its shape: the matrix is one under the other, as one column."""

    takes_bias = False
    is_matrix = False
    row_factor = None
    is_flat = False
    diagonal = "G"
    owns_all_parameters = True

    def loss_terms(self, module: Any, g: Tensor) -> int:
        """The batch size."""
        return g.shape[0]

    def factor_widths(self, module: Any, shape: torch.Size) -> FactorWidths:
        return 1, None, shape.numel() * (1 if getattr(module, "bias", None) is None else 2)

    def to_matrix(self, layer: Layer, grads: Sequence[Tensor]) -> Tensor:
        return torch.cat([grad.flatten() for grad in grads])[None, :, None]

    def from_matrix(self, layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
        return matrix.flatten().chunk(len(layer.parameters))


class PositionNormKind(NormKind):
    """A norm over the last dimensions, ``[..., *normalized_shape]``: every position is a row."""

    def __init__(self, module_type: type[nn.Module], normalize: Callable[..., Tensor]) -> None:
        super().__init__(module_type)
        self._normalize = normalize

    def rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """Gradients of scale and shift at each position, one under the other: ``[1, 2 * width, n]``."""
        width = torch.Size(module.normalized_shape).numel()
        a, g = a.detach().reshape(-1, width), g.reshape(-1, width)
        index = subsample(a.shape[0], max_rows, a.device)
        a, g = pick(a, index), pick(g, index).to(dtype)
        # The default of an RMS norm depends on the input's dtype.
        a = a if module.eps is None else a.to(dtype)
        return _scale_and_shift(module, g * self._normalize(a, a.shape[1:], eps=module.eps), g)

    def loss_terms(self, module: Any, g: Tensor) -> int:
        """The number of positions."""
        width: int = module.weight.shape.numel()
        return g.numel() // max(width, 1)


class GroupNormKind(NormKind):
    """A group norm of ``[batch, channels, *space]``: every sample is a row, summed over its positions."""

    def rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """Gradients of scale and shift for each sample: ``[1, 2 * channels, n]``; see `_samples` for ``max_rows``."""
        a, g = _samples(a, g, dtype, max_rows)
        per_sample = (*g.shape[:2], g.shape[2:].numel())
        # Not F.group_norm, which refuses a single sample of one number per group.
        normal = torch.group_norm(a, module.num_groups, eps=module.eps)
        return _scale_and_shift(module, (g * normal).reshape(per_sample).sum(2), g.reshape(per_sample).sum(2))


class BatchNormKind(NormKind):
    """A batch norm of ``[batch, channels, *space]``: every sample is a row, summed over its positions."""

    def rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """Gradients of scale and shift for each sample: ``[1, 2 * channels, n]``; see `_samples` for ``max_rows``.

        Inputs are normalised by the mean and variance of the samples that are taken: near the statistics of the whole
        batch, and in a `nn.SyncBatchNorm` of all ranks' batches, but without a pass over all samples.
        """
        a, g = _samples(a, g, dtype, max_rows)
        per_sample = (*g.shape[:2], g.shape[2:].numel())
        a, g = a.reshape(per_sample), g.reshape(per_sample)
        mean, var = (None, None) if module.training else (module.running_mean, module.running_var)
        is_by_batch = mean is None or var is None
        if is_by_batch and a.device.type in UNFUSED_DEVICES:
            # Centred before squaring, so that nothing cancels.
            a = a - a.mean(2).mean(0)[:, None]
            var = torch.linalg.vector_norm(a, dim=2).square().mean(0) / a.shape[2]
            scale = a.mul_(g).sum(2) * (var + module.eps).rsqrt()
        else:
            # Not F.batch_norm, which refuses a batch of one number per channel.
            mean, var = (each if each is None else each.to(dtype) for each in (mean, var))
            normal = torch.batch_norm(a, None, None, mean, var, is_by_batch, 0.0, module.eps, False)
            scale = normal.mul_(g).sum(2)
        return _scale_and_shift(module, scale, g.sum(2))


LAYER_NORM = PositionNormKind(nn.LayerNorm, F.layer_norm)
RMS_NORM = PositionNormKind(nn.RMSNorm, F.rms_norm)
GROUP_NORM = GroupNormKind(nn.GroupNorm)
BATCH_NORM = BatchNormKind(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _samples(a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of whole samples: at most ``max_rows``, of 16 times as many positions; but a 32nd of
    ``max_rows`` even where samples have more.

    16, since a position of a norm costs a few additions, where a row of a matrix costs a product with it. Every k-th
    sample, since a view needs no copy; k is odd, so that of pairs of samples both kinds are seen.
    """
    step = 1
    if max_rows is not None:
        n = min(max_rows, max(16 * max_rows // max(g.shape[2:].numel(), 1), max_rows // 32, 1))
        step = 1 if n >= g.shape[0] else -(-g.shape[0] // n) | 1
    return a.detach()[::step].to(dtype), g[::step].to(dtype)


def _scale_and_shift(module: nn.Module, scale: Tensor, shift: Tensor) -> Rows:
    """Gradients ``[n, width]`` of scale and, if the module has it, shift as rows ``[1, width or 2 * width, n]``."""
    both = [scale] if getattr(module, "bias", None) is None else [scale, shift]
    return Rows(None, torch.cat(both, dim=1).T[None], scale.shape[0], scale.shape[0])
