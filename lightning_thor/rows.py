"""Any layer as rows: what a forward input and an output gradient say about the layer's weight.

Every function takes ``(module, a, g, dtype, max_rows)`` and gives `Rows`. For a layer with a matrix weight,
``rows.g @ rows.a.mT`` is the gradient of the weight, as a matrix ``[groups, out, in]``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


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


@lru_cache(maxsize=256)
def spread(n: int, max_rows: int | None, device: torch.device) -> Tensor | None:
    """Indices of at most ``max_rows`` of ``n`` rows, spread evenly; None stands for all.

    A multiplicative sequence by the golden ratio rather than every k-th row: a stride that divides the length of a
    sequence would see the same few positions for ever.

    >>> spread(10, 3, torch.device("cpu")), spread(3, 10, torch.device("cpu"))
    (tensor([0, 4, 7]), None)
    """
    if max_rows is None or n <= max_rows:
        return None
    step = max(1, round(n * 0.6180339887498949)) | 1
    while math.gcd(step, n) != 1:
        step += 2
    # In order, or picking them takes up to twice as long.
    return (torch.arange(max_rows, dtype=torch.int64, device=device) * step % n).sort().values


def _pick(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _batched(module: Convolution | TransposedConvolution, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A single image as a batch of one."""
    return (a[None], g[None]) if a.dim() == len(module.kernel_size) + 1 else (a, g)


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


def patches_and_values(
    module: Convolution | TransposedConvolution, patched: Tensor, valued: Tensor, dtype: torch.dtype,
    max_rows: int | None,
) -> tuple[Tensor, Tensor, int, float]:  # fmt: skip
    """The patches of one tensor and the values of another at the same positions.

    Args:
        module: whose kernel, stride, padding, dilation and groups.
        patched: what patches are taken of, ``[batch, channels, *space]``.
        valued: ``[batch, width, *positions]``.
        dtype: of what is returned.
        max_rows: take about so many positions; None takes all.

    Returns:
        ``[groups, channels / groups * kernel, rows]``, ``[groups, width / groups, rows]``, the number of rows, and that
        of the samples that so many rows make, which need not be whole.
    """
    positions, groups = valued.shape[2:], module.groups
    per_line = max(positions[1:].numel(), 1)
    max_lines = None if max_rows is None else max(1, max_rows // per_line)
    axes = tuple(zip(
        patched.shape[2:], positions, module.kernel_size, module.stride, module.dilation, _padding_before(module),
        strict=True,
    ))  # fmt: skip
    # Kept where it is small: it takes some dozens of operations.
    find = _seen if max_lines is None else _seen_kept
    seen = find(valued.shape[0], axes, max_lines, module.padding_mode, valued.device)
    values, planes = _lines(valued, seen.taken), _lines(patched, seen.read)
    windows = planes.to(dtype) if seen.places is None else _with_zero(planes, dtype).index_select(1, seen.places)
    n_rows = values.shape[1:].numel()
    width = patched.shape[1] // groups * torch.Size(module.kernel_size).numel()
    return (
        windows.reshape(groups, width, n_rows),
        values.to(dtype).reshape(groups, valued.shape[1] // groups, n_rows),
        n_rows,
        n_rows / max(positions.numel(), 1),
    )


Lines = tuple[Tensor, Tensor]
"""Of some lines the samples and the indices along the first axis of space, both ``[n]``."""


class _Seen(NamedTuple):
    """What the rows of a convolution see."""

    taken: Lines | None
    """Of the output; None stands for all."""
    read: Lines | None
    """Of the input, ``[kernel * taken]``; None stands for all."""
    places: Tensor | None
    """``[kernel * rows]``: of what is seen, among the positions of a channel in what is read. One past the end stands
    for zero. None: each row sees its own place."""


def _seen(
    n_samples: int, axes: tuple[tuple[int, ...], ...], max_lines: int | None, mode: str, device: torch.device
) -> _Seen:
    """The rows that are taken, and what they see.

    Args:
        n_samples: in the batch.
        axes: of each axis of space the size of the input and of the output; the kernel's size, stride and dilation; the
            padding before the input.
        max_lines: how many lines of the output (all behind one index of the first axis) to take at most; None: all.
        mode: what stands in the padding, as `nn.Conv2d` names it.
        device: of the indices.

    >>> seen = _seen(1, ((3, 3, 3, 1, 1, 1),), 2, "circular", torch.device("cpu"))
    >>> seen.taken, seen.places.view(3, 2)
    ((tensor([0, 0]), tensor([0, 2])), tensor([[2, 1], [0, 2], [1, 0]]))
    """
    (n_inputs, n_outputs, size, *_), *others = axes
    taken = spread(n_samples * n_outputs, max_lines, device)
    every = torch.arange(n_samples * n_outputs, device=device) if taken is None else taken
    samples, outputs = every.div(n_outputs, rounding_mode="floor"), every % n_outputs
    inputs, outside = _inputs(axes[0], outputs, mode)
    read, index, n_positions = None, samples * n_inputs + inputs, n_samples * n_inputs
    if taken is not None and 2 * inputs.numel() <= n_positions:
        # A pass over the whole input would take longer than all the rest.
        read, n_positions = (samples.repeat(size), inputs.flatten()), inputs.numel()
        index = torch.arange(n_positions, device=device).view(inputs.shape)
    # A kernel of one position, which of lines that were read has no stride along the first axis any more.
    unmoved = read is not None or (taken is None and n_inputs == n_outputs)
    if unmoved and all(axis[0] == axis[1] for axis in others) and all((axis[2], axis[5]) == (1, 0) for axis in axes):
        return _Seen(None if taken is None else (samples, outputs), read, None)
    # From [kernel, lines] axis by axis to [*kernel, lines, *positions].
    for number, axis in enumerate(others, 1):
        more, more_outside = _inputs(axis, torch.arange(axis[1], device=device), mode)
        shape = [1] * number + [axis[2]] + [1] * number + [axis[1]]
        index = index.unsqueeze(number).unsqueeze(-1) * axis[0] + more.view(shape)
        outside = outside.unsqueeze(number).unsqueeze(-1) | more_outside.view(shape)
        n_positions *= axis[0]
    places = index.masked_fill_(outside, n_positions).flatten()
    return _Seen(None if taken is None else (samples, outputs), read, places)


_seen_kept = lru_cache(maxsize=256)(_seen)


def _inputs(axis: tuple[int, ...], outputs: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Which positions of an axis of the input some of the output see, ``[kernel, outputs]``, and where none is there
    (and the position is any)."""
    n_inputs, _, size, stride, dilation, before = axis
    inputs = torch.arange(size, device=outputs.device)[:, None] * dilation + outputs * stride - before
    last = n_inputs - 1
    outside = ((inputs < 0) | (inputs > last)) if mode == "zeros" else torch.zeros_like(inputs, dtype=torch.bool)
    if mode == "circular":
        inputs = inputs % n_inputs
    elif mode == "reflect":
        inputs = last - (last - inputs.abs()).abs()
    return inputs.clamp(0, last), outside


def _lines(x: Tensor, lines: Lines | None) -> Tensor:
    """Some of ``x [batch, channels, lines, *space]``, ``[channels, n, *space]``; of None a view of all,
    ``[channels, batch, lines, *space]``."""
    if lines is None:
        return x.transpose(0, 1)
    samples, indices = lines
    # Laid out as x is, so that it needs no other copy to become rows: channels innermost, or outermost.
    if x.stride(1) == 1:
        return x.movedim(1, -1)[samples, indices].movedim(-1, 0)
    return x.transpose(0, 1)[:, samples, indices]


def _with_zero(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """``[channels, *]`` as ``[channels, n + 1]`` with zeros at the end, contiguous."""
    n = planes.shape[1:].numel()
    flat = planes.new_empty(planes.shape[0], n + 1, dtype=dtype)
    flat[:, :n].view(planes.shape).copy_(planes)
    flat[:, n].zero_()
    return flat


def _padding_before(module: Convolution | TransposedConvolution) -> tuple[int, ...]:
    """Of each axis; of an odd padding of "same" the larger part comes after."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return tuple(int(one) for one in module.padding)


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
    taken, which are near those of the batch: these would take a pass over all of it.
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
