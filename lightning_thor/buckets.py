"""Which layers' factors travel together: runs of layers, the last one first, as backward goes through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Cut = Callable[[Sequence[int], Sequence[int]], list[list[int]]]
"""Layers in the order in which backward comes to them, and the bytes that each sends, to buckets in that order."""

# A bucket leaves when backward has the first of its layers: with DDP's 25 for gradients, all factors of a ResNet-50,
# 20 MB as triangles, would be one bucket that leaves when backward is over. A few megabytes still outweigh the latency.
DEFAULT_BUCKET_MB = 4.0


def one_bucket(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
    """All of them together."""
    return [list(layers)]


def by_size(limit: float) -> Cut:
    """Close a bucket as soon as it has ``limit`` bytes.

    >>> by_size(10)([3, 2, 1, 0], [4, 7, 12, 1])
    [[3, 2], [1], [0]]
    """

    def cut(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
        buckets: list[list[int]] = []
        filled = limit
        for layer, size in zip(layers, n_bytes, strict=True):
            if filled >= limit:
                buckets.append([])
                filled = 0
            buckets[-1].append(layer)
            filled += size
        return buckets

    return cut


def by_layer(split_indices: Sequence[int], has_A: Sequence[bool]) -> Cut:
    """Groups that end with the given layers, as nn.thor's ``split_indices``: [26, 53] makes 0 to 26 and 27 to 53.

    As there, layers are counted that have A and G; a norm goes with the layer before it. Layers after the last index
    are a group of their own.

    Args:
        split_indices: see `check_split_indices`.
        has_A: of every layer, in the order of the model.

    Raises:
        ValueError: an index that no layer has.

    >>> by_layer([0, 2], [True, False, True, True, True])([4, 3, 2, 1, 0], [1] * 5)
    [[4], [3, 2], [1, 0]]
    """
    n_counted = sum(has_A)
    if split_indices and split_indices[-1] >= n_counted:
        raise ValueError(
            f"split_indices={list(split_indices)!r} names layer {split_indices[-1]}, but this model has {n_counted} "
            f"layers with factors A and G, counted from 0. Give the last layer of each group, or factor_bucket_mb."
        )
    numbers = [max(sum(has_A[: layer + 1]) - 1, 0) for layer in range(len(has_A))]
    groups = [sum(number > index for index in split_indices) for number in numbers]

    def cut(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
        # In the order in which they are whole: that of each group's last layer.
        own = list(dict.fromkeys(groups[layer] for layer in reversed(layers)))
        return [[layer for layer in layers if groups[layer] == group] for group in reversed(own)]

    return cut


def bucket_bytes_of(factor_bucket_mb: Any) -> float:
    """Megabytes (2²⁰ bytes) as bytes, `DEFAULT_BUCKET_MB` for None; a ValueError if they are no number above 0."""
    if factor_bucket_mb is None:
        factor_bucket_mb = DEFAULT_BUCKET_MB
    number = isinstance(factor_bucket_mb, int | float) and not isinstance(factor_bucket_mb, bool)
    if not number or not (math.isfinite(factor_bucket_mb) and factor_bucket_mb > 0):
        raise ValueError(f"factor_bucket_mb must be a number of megabytes greater than 0, got {factor_bucket_mb!r}.")
    return float(factor_bucket_mb * 2**20)


def check_split_indices(split_indices: Any) -> None:
    """Raise a TypeError or ValueError unless it is None or increasing layer numbers, not below 0."""
    if split_indices is None:
        return
    if not isinstance(split_indices, list | tuple) or not all(type(index) is int for index in split_indices):
        raise TypeError(f"split_indices must be a list of ints (the last layer of each group), got {split_indices!r}.")
    if not split_indices or list(split_indices) != sorted(set(split_indices)) or split_indices[0] < 0:
        raise ValueError(f"split_indices must not be empty and increase from 0 on, got {split_indices!r}.")
