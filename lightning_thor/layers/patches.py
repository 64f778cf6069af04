"""Patches of convolutions by one look-up: the numbers of the input that each position of the output sees."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_thor.layers.base import subsample

SMALL_INDEX_NUMEL = 2**16
"""Numbers in a small index: those of 1,024 rows and a kernel of 64."""

LARGE_INDEX_NUMEL = 2**21
"""Numbers in the largest index that is kept, 16 MiB: a large ``max_rows`` may have one of gigabytes for each layer."""

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def patches_and_values(
    module: Convolution | TransposedConvolution, patched: Tensor, valued: Tensor, dtype: torch.dtype,
    max_rows: int | None,
) -> tuple[Tensor, Tensor, int, float]:  # fmt: skip
    """The patches of one tensor and the values of another at the same positions.

    Args:
        module: its kernel, stride, padding, dilation and groups count.
        patched: the tensor that patches are taken of, ``[batch, channels, *space]``.
        valued: the other one, ``[batch, width, *positions]``.
        dtype: of patches and values.
        max_rows: about how many positions to take; None takes all.

    Returns:
        Patches ``[groups, channels / groups * kernel, n]``, values ``[groups, width / groups, n]``, the number of rows
        n, and the number of samples that have n rows, which need not be whole.
    """
    positions, groups = valued.shape[2:], module.groups
    per_line = max(positions[1:].numel(), 1)
    max_lines = None if max_rows is None else max(1, max_rows // per_line)
    axes = _axes_of(module, patched.shape[2:], positions)
    # Cached, since it takes some dozens of operations; few of the larger ones, since each size of inputs has its own.
    find = _find_patches
    if max_lines is not None:
        n = torch.Size(module.kernel_size).numel() * min(max_lines, len(valued) * positions[0]) * per_line
        if n <= LARGE_INDEX_NUMEL:
            find = _find_patches_cached if n <= SMALL_INDEX_NUMEL else _find_large_patches_cached
    seen = find(valued.shape[0], axes, max_lines, module.padding_mode, valued.device)
    values, planes = _lines(valued, seen.taken), _lines(patched, seen.read)
    windows = planes.to(dtype) if seen.positions is None else _with_zero(planes, dtype).index_select(1, seen.positions)
    n_rows = values.shape[1:].numel()
    width = patched.shape[1] // groups * torch.Size(module.kernel_size).numel()
    return (
        windows.reshape(groups, width, n_rows),
        values.to(dtype).reshape(groups, valued.shape[1] // groups, n_rows),
        n_rows,
        n_rows / max(positions.numel(), 1),
    )


def mean_patches(module: Convolution, patched: Tensor, positions: torch.Size, dtype: torch.dtype) -> Tensor:
    """The mean over all positions of each sample's patches, without any patch: one pass over the input.

    Args:
        module: see `patches_and_values`.
        patched: see `patches_and_values`.
        positions: of the output.
        dtype: of the result.

    Returns:
        ``[groups, channels / groups * kernel, batch]``.

    >>> conv = nn.Conv1d(1, 1, 3, padding=1)
    >>> mean_patches(conv, torch.tensor([[[1.0, 2.0, 6.0]]]), torch.Size([3]), torch.float32)
    tensor([[[1.0000], [3.0000], [2.6667]]])
    """
    means = patched.to(dtype)
    # From the last axis to the first, each of which becomes an axis of the kernel at the end.
    for number, axis in reversed(list(enumerate(_axes_of(module, patched.shape[2:], positions), 2))):
        find = _shares_cached if axis[0] * axis[2] <= SMALL_INDEX_NUMEL else _shares
        means = torch.tensordot(means, find(axis, module.padding_mode, dtype, patched.device), ([number], [0]))
    means = means.permute(0, 1, *range(means.dim() - 1, 1, -1))
    return means.reshape(len(means), module.groups, -1).permute(1, 2, 0)


def _axes_of(
    module: Convolution | TransposedConvolution, space: torch.Size, positions: torch.Size
) -> tuple[tuple[int, ...], ...]:
    """For each axis of space the size of the input and of the output; the kernel's size, stride and dilation; the
    padding before the input."""
    own = module.kernel_size, module.stride, module.dilation, _padding_before(module)
    return tuple(zip(space, positions, *own, strict=True))


def _shares(axis: tuple[int, ...], mode: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which share of the positions on an axis of the output sees each of the input, by each entry of the kernel:
    ``[inputs, kernel]``, not to be changed."""
    n_inputs, n_outputs, size, *_ = axis
    inputs, outside = _inputs(axis, torch.arange(n_outputs, device=device), mode)
    each = outside.logical_not().to(dtype) / max(n_outputs, 1)
    entries = torch.arange(size, device=device)[:, None].expand_as(inputs)
    shares = torch.zeros(n_inputs, size, dtype=dtype, device=device)
    return shares.index_put_((inputs, entries), each, accumulate=True)


_shares_cached = lru_cache(maxsize=256)(_shares)


Lines = tuple[Tensor, Tensor]
"""Lines by sample and by index along the first axis of space, both ``[n]``."""


class _PatchIndex(NamedTuple):
    """The rows of a convolution that are taken, and the positions of the input that they see."""

    taken: Lines | None
    """Lines of the output; None stands for all."""
    read: Lines | None
    """Lines of the input, ``[kernel * taken]``; None stands for all."""
    positions: Tensor | None
    """The position that each entry of each patch sees, ``[kernel * rows]``, counted within a channel of the lines that
    are read; one past the end stands for zero. None: each row sees its own position."""


def _find_patches(
    n_samples: int, axes: tuple[tuple[int, ...], ...], max_lines: int | None, mode: str, device: torch.device
) -> _PatchIndex:
    """The rows that are taken, and the positions of the input that they see.

    Args:
        n_samples: samples in the batch.
        axes: for each axis of space the size of the input and of the output; the kernel's size, stride and dilation;
            the padding before the input.
        max_lines: lines of the output (all behind one index of the first axis) to take at most; None: all.
        mode: the padding's values, as `nn.Conv2d` names it.
        device: of the indices.

    >>> seen = _find_patches(1, ((3, 3, 3, 1, 1, 1),), 2, "circular", torch.device("cpu"))
    >>> seen.taken, seen.positions.view(3, 2)
    ((tensor([0, 0]), tensor([0, 1])), tensor([[2, 0], [0, 1], [1, 2]]))
    """
    (n_inputs, n_outputs, size, *_), *others = axes
    taken = taken_lines(n_samples, n_outputs, max_lines, device)
    every = torch.arange(n_samples * n_outputs, device=device) if taken is None else taken
    samples, outputs = every.div(n_outputs, rounding_mode="floor"), every % n_outputs
    inputs, outside = _inputs(axes[0], outputs, mode)
    read, index, n_positions = None, samples * n_inputs + inputs, n_samples * n_inputs
    if taken is not None and 2 * inputs.numel() <= n_positions:
        # A pass over the whole input would take longer than all the rest.
        read, n_positions = (samples.repeat(size), inputs.flatten()), inputs.numel()
        index = torch.arange(n_positions, device=device).view(inputs.shape)
    # A kernel of one position: the lines that are read are the lines that are taken.
    unmoved = read is not None or (taken is None and n_inputs == n_outputs)
    if unmoved and all(axis[0] == axis[1] for axis in others) and all((axis[2], axis[5]) == (1, 0) for axis in axes):
        return _PatchIndex(None if taken is None else (samples, outputs), read, None)
    # From [kernel, lines] axis by axis to [*kernel, lines, *positions].
    for number, axis in enumerate(others, 1):
        more, more_outside = _inputs(axis, torch.arange(axis[1], device=device), mode)
        shape = [1] * number + [axis[2]] + [1] * number + [axis[1]]
        index = index.unsqueeze(number).unsqueeze(-1) * axis[0] + more.view(shape)
        outside = outside.unsqueeze(number).unsqueeze(-1) | more_outside.view(shape)
        n_positions *= axis[0]
    seen = index.masked_fill_(outside, n_positions).flatten()
    return _PatchIndex(None if taken is None else (samples, outputs), read, seen)


_find_patches_cached = lru_cache(maxsize=256)(_find_patches)
_find_large_patches_cached = lru_cache(maxsize=16)(_find_patches)


def taken_lines(n_samples: int, n_outputs: int, max_lines: int | None, device: torch.device) -> Tensor | None:
    """Numbers of at most ``max_lines`` of the ``n_outputs`` lines of each sample, sorted; None stands for all.

    They are spread from the middle of the first sample on: its first line sees the padding, and may be all that is
    taken (a plane of a volume, a long line of a spectrogram).

    >>> taken_lines(4, 5, 1, torch.device("cpu")), taken_lines(1, 5, 5, torch.device("cpu"))
    (tensor([2]), None)
    """
    index = subsample(n_samples * n_outputs, max_lines, device)
    return index if index is None else ((index + n_outputs // 2) % (n_samples * n_outputs)).sort().values


def _inputs(axis: tuple[int, ...], outputs: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """The positions on an axis of the input that positions of the output see, and a mask, True outside the input (where
    the position is arbitrary): both ``[kernel, outputs]``."""
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
    """Lines of ``x [batch, channels, lines, *space]`` as ``[channels, n, *space]``; for None a view of all of them as
    ``[channels, batch, lines, *space]``."""
    if lines is None:
        return x.transpose(0, 1)
    samples, indices = lines
    # In the layout of x, so that no other copy is needed to make rows: channels innermost, or outermost.
    if x.stride(1) == 1:
        return x.movedim(1, -1)[samples, indices].movedim(-1, 0)
    return x.transpose(0, 1)[:, samples, indices]


def _with_zero(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """``[channels, ...]`` as contiguous ``[channels, n + 1]`` with a zero at the end of each channel."""
    n = planes.shape[1:].numel()
    flat = planes.new_empty(planes.shape[0], n + 1, dtype=dtype)
    flat[:, :n].view(planes.shape).copy_(planes)
    flat[:, n].zero_()
    return flat


def _padding_before(module: Convolution | TransposedConvolution) -> tuple[int, ...]:
    """Padding before the input on each axis; the larger part of an odd padding of "same" comes after it."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return tuple(int(one) for one in module.padding)
