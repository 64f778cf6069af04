"""Which dtypes hold numbers whose size is not known yet."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, reduce

import torch


@cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: directions are so until they were brought to scale, since a gradient of float16 times two
    inverses may be beyond it, and Adam's moments, since squares may.

    >>> wide(torch.float16), wide(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def message_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """In which directions of gradients of these dtypes travel together: the widest, but float32 for float16.

    bfloat16 stays: it has float32's range, and half its bytes.

    >>> message_dtype([torch.bfloat16]), message_dtype([torch.float16])
    (torch.bfloat16, torch.float32)
    """
    widest = reduce(torch.promote_types, dtypes)
    return torch.float32 if widest == torch.float16 else widest
