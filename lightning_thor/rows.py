"""Any layer as rows: what a forward input and an output gradient say about the layer's weight.

Every function takes ``(module, a, g, dtype, max_rows)`` and gives `Rows`. For a layer with a matrix weight,
``rows.g @ rows.a.mT`` is the gradient of the weight, as a matrix ``[groups, out, in]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_thor.patches import Convolution, TransposedConvolution, patches_and_values
from lightning_thor.sampling import spread

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


class Rows(NamedTuple):
    """What one call of a layer contributes to its statistics; features first, so that a factor is ``x @ x.mT``."""

    a: Tensor | None
    """Inputs ``[groups, in, n]``; None where A is given by `token_counts` or does not exist."""
    g: Tensor
    """Output gradients of the loss as it was summed or averaged, ``[groups, out, n]``."""
    n_rows: int | Tensor
    """How many rows A was summed over."""
    n_samples: float
    """How many samples these rows belong to: the terms of the loss that they saw. Not whole where rows are left out."""
    token_counts: Tensor | None = None
    """Embeddings: how often each token stood in the input, ``[vocabulary]``: the diagonal of A, summed."""


class Squares(NamedTuple):
    """The sums of squares of `Rows`: the traces of what they add to A and G."""

    a: Tensor | None
    g: Tensor
    n_rows: int | Tensor
    n_samples: float


def loss_terms(module: nn.Module, g: Tensor) -> int:
    """How many terms the mean of the loss is taken to have: the batch size for convolutions and batch norms, all
    leading dimensions for layers on the last dimension (a loss per token)."""
    if isinstance(module, Convolution | TransposedConvolution):
        return g.shape[0] if g.dim() == len(module.kernel_size) + 2 else 1
    if isinstance(module, BatchNorm | nn.GroupNorm):
        return g.shape[0]
    width = module.weight.shape.numel() if isinstance(module, nn.LayerNorm | nn.RMSNorm) else g.shape[-1]
    return g.numel() // max(width, 1)


def batch_size(module: nn.Module, g: Tensor) -> int:
    """How many terms the mean of a loss has that is one per sample, whatever the layer."""
    return g.shape[0]


def _pick(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _batched(module: Convolution | TransposedConvolution, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A single image as a batch of one; torch makes one of it too, so its gradient may be a batch already."""
    single = len(module.kernel_size) + 1
    return a[None] if a.dim() == single else a, g[None] if g.dim() == single else g


def linear_rows(module: nn.Linear, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """``a [..., in]`` or what `thin_linear` leaves of it, ``g [..., out]``: every position is a row."""
    # reshape, never view: gradients can come in any memory format.
    a, g = a.detach().reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    index = spread(g.shape[0], max_rows, g.device)
    if len(a) == len(g):
        a = _pick(a, index)
    a, g = a.to(dtype), _pick(g, index).to(dtype)
    return Rows(a.T[None], g.T[None], a.shape[0], a.shape[0])


def thin_linear(a: Tensor, max_rows: int | None) -> Tensor:
    """The rows that `linear_rows` takes of ``a [..., in]``, which it also takes in the place of ``a``."""
    index = spread(a.numel() // max(a.shape[-1], 1), max_rows, a.device)
    return a if index is None else a.detach().reshape(-1, a.shape[-1]).index_select(0, index)


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


def squares_of(rows: Rows) -> Squares:
    """The squares of rows that are there."""
    a = rows.token_counts if rows.a is None else rows.a.square()
    return Squares(None if a is None else a.sum(), rows.g.square().sum(), rows.n_rows, rows.n_samples)


def reduced_linear_rows(module: nn.Linear, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """One row per sample: inputs averaged and gradients summed over all dimensions between the first and the last
    (K-FAC-reduce: Eschenhagen et al. 2023, arXiv:2311.00636)."""
    if a.dim() > 2:
        a, g = a.detach().flatten(1, -2).to(dtype).mean(1), g.flatten(1, -2).to(dtype).sum(1)
    return linear_rows(module, a, g, dtype, max_rows)


def reduced_conv_rows(module: Convolution, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """One row per image: patches averaged and gradients summed over the output positions (K-FAC-reduce).

    With ``max_rows`` whole images are left out, so that there are about as many positions.
    """
    a, g = _batched(module, a, g)
    positions = g.shape[2:].numel()
    index = spread(a.shape[0], None if max_rows is None else max(1, max_rows // max(positions, 1)), a.device)
    windows, gradients, _, _ = patches_and_values(module, _pick(a.detach(), index), _pick(g, index), dtype, None)
    n_samples = gradients.shape[-1] // max(positions, 1)
    split = (n_samples, positions)
    return Rows(windows.unflatten(-1, split).mean(-1), gradients.unflatten(-1, split).sum(-1), n_samples, n_samples)


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


def _positions(
    module: nn.LayerNorm | nn.RMSNorm, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None
) -> tuple[Tensor, Tensor]:
    """Inputs and gradients at some positions, ``[rows, width]``."""
    width = torch.Size(module.normalized_shape).numel()
    a, g = a.detach().reshape(-1, width), g.reshape(-1, width)
    index = spread(a.shape[0], max_rows, a.device)
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
