"""Dtypes with enough range for directions, and for messages that carry them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, reduce

import torch


@cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype, but at least float32: for directions that are not scaled yet, since a float16 gradient times two
    inverses may overflow, and for Adam's moments, since squares may.

    >>> wide(torch.float16), wide(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def message_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of a message with directions of several dtypes: the widest of them, but float32 for float16.

    bfloat16 stays: it has float32's range in half the bytes.

    >>> message_dtype([torch.bfloat16]), message_dtype([torch.float16])
    (torch.bfloat16, torch.float32)
    """
    widest = reduce(torch.promote_types, dtypes)
    return torch.float32 if widest == torch.float16 else widest
