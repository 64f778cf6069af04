"""Norms: the diagonal Fisher matrix of scale and shift, without an input factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_thor.layers.base import Layer, Rows, _pick, subsample


def vectors_to_matrix(layer: Layer, grads: Sequence[Tensor]) -> Tensor:
    """Scale and shift, one under the other, as one column."""
    return torch.cat([grad.flatten() for grad in grads])[None, :, None]


def matrix_to_vectors(layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
    """The way back of `vectors_to_matrix`."""
    return matrix.flatten().chunk(len(layer.parameters))


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def _positions(
    module: nn.LayerNorm | nn.RMSNorm, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None
) -> tuple[Tensor, Tensor]:
    """Inputs and gradients at some positions, ``[rows, width]``."""
    width = torch.Size(module.normalized_shape).numel()
    a, g = a.detach().reshape(-1, width), g.reshape(-1, width)
    index = subsample(a.shape[0], max_rows, a.device)
    return _pick(a, index).to(dtype), _pick(g, index).to(dtype)


def layer_norm_rows(module: nn.LayerNorm, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """Gradients of scale and shift at each position, one under the other: ``[1, 2 * width, rows]``."""
    a, g = _positions(module, a, g, dtype, max_rows)
    normal = F.layer_norm(a, a.shape[1:], eps=module.eps)
    return _scale_and_shift(module, g * normal, g)


def rms_norm_rows(module: nn.RMSNorm, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """Gradients of the scale at each position: ``[1, width, rows]``."""
    # Its default eps is that of the input's dtype.
    eps = torch.finfo(a.dtype).eps if module.eps is None else module.eps
    a, g = _positions(module, a, g, dtype, max_rows)
    normal = F.rms_norm(a, a.shape[1:], eps=eps)
    return _scale_and_shift(module, g * normal, g)


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


def group_norm_rows(module: nn.GroupNorm, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """Gradients of scale and shift for each sample, summed over its positions: ``[1, 2 * channels, samples]``.

    ``max_rows`` takes at most so many samples, of 16 times as many positions, but at least a 32nd of ``max_rows``.
    """
    a, g = _samples(a, g, dtype, max_rows)
    per_sample = (*g.shape[:2], g.shape[2:].numel())
    # Not F.group_norm, which refuses a single sample of one number per group.
    normal = torch.group_norm(a, module.num_groups, eps=module.eps)
    return _scale_and_shift(module, (g * normal).reshape(per_sample).sum(2), g.reshape(per_sample).sum(2))


def batch_norm_rows(module: BatchNorm, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """Gradients of scale and shift for each sample, summed over its positions: ``[1, 2 * channels, samples]``.

    ``max_rows`` as in `group_norm_rows`. Inputs are then normalised by the mean and variance of the samples that are
    taken, which are near those of the batch: these would take a pass over all of it. So are those of
    a `nn.SyncBatchNorm`, which itself uses the mean and variance of all processes' batches.
    """
    a, g = _samples(a, g, dtype, max_rows)
    per_sample = (*g.shape[:2], g.shape[2:].numel())
    a, g = a.reshape(per_sample), g.reshape(per_sample)
    if module.training or module.running_mean is None or module.running_var is None:
        # Centred before squaring, so that nothing cancels; torch.var_mean takes five times as long on a CPU.
        a = a - a.mean(2).mean(0)[:, None]
        var = torch.linalg.vector_norm(a, dim=2).square().mean(0) / a.shape[2]
    else:
        a, var = a - module.running_mean.to(dtype)[:, None], module.running_var.to(dtype)
    scale = a.mul_(g).sum(2) * (var + module.eps).rsqrt()
    return _scale_and_shift(module, scale, g.sum(2))


def _scale_and_shift(module: nn.Module, scale: Tensor, shift: Tensor) -> Rows:
    both = [scale] if getattr(module, "bias", None) is None else [scale, shift]
    return Rows(None, torch.cat(both, dim=1).T[None], scale.shape[0], scale.shape[0])
