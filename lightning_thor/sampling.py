"""Which rows are taken where there are more than are wanted."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


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
