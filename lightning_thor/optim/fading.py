"""Directions made of rounding errors fade: those of gradients that are tiny beside the largest of this training.

Where a direction is brought to a root mean square, a gradient of nothing but rounding errors would take a step of full
size: that of a bias that a softmax or a norm does not see, or of all weights once the loss is 0 for every sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_thor.linalg.dtypes import wide
from lightning_thor.optim import norms
from lightning_thor.optim.norms import as_real

SLICE = 2**12
"""Of a tensor that has more than four times as many entries, so many are looked at first, on a CPU."""


ROUNDINGS = 8
"""How many times eps, of the largest gradients, a gradient may be and still be made of rounding errors alone.

A softmax gives them about eps / 10 of the gradients that the training began with: 1e-8 of 0.1. Their steps have one
direction, and in thousands of them weights go far if they fade in proportion only: 512 digits, learnt to a loss of 0,
lost 7 and 10 points of held-out accuracy in 6,000 steps (two seeds), and none where they fade with the square.
"""


GROWTH = 2.0
"""What the largest gradients may grow by in one step: one batch whose gradients explode fades no later one by more."""


Largest = float | Tensor
"""Root mean square of the largest gradients so far, 0 before the first: a tensor (0-dimensional, in float64) where a
device would have to be waited for to have a number."""


def fade_factors(
    made_of: Sequence[Tensor], of: Sequence[Tensor], times: Sequence[float], largest: Largest
) -> tuple[list[float] | list[Tensor], Largest]:
    """``min(1, r / (8 eps R))²`` of each tensor, where r is the root mean square of what its direction is made of and R
    that of the largest ones so far. R follows the unit of the loss, and eps is that of the weights' dtype, at least
    float32's.

    R does not fall with the gradients: their rounding errors do not either, which are those of what was subtracted
    (probabilities and targets). It does not take part in a step whose gradients are not all finite.

    Args:
        made_of: what lies in this process of what each direction is made of: the gradient, or its momentum.
        of: the parameters, whole or sharded.
        times: what r is multiplied by, for each: 1, or what makes a mean of a momentum.
        largest: R before this step.

    Returns:
        The factors, and R with this step.

    >>> fade_factors([torch.tensor([1e-9]), torch.tensor([1.0])], [torch.zeros(1)] * 2, [1.0, 1.0], 0.0)
    ([1.1e-06, 1.0], 1.0)
    """
    made_of = [one.resolve_conj() if one.is_conj() else one for one in made_of]
    rounding = [ROUNDINGS * _eps(p.dtype) for p in of]
    if norms.can_read_on_host(made_of, of):
        return _on_host(made_of, rounding, times, float(largest))
    r, scales = norms.norms([as_real(one) for one in made_of], of)
    means = [own / math.sqrt(max(1, p.numel())) for own, p in zip(times, of, strict=True)]
    torch._foreach_mul_(list(r.unbind()), means)
    for by in scales:
        r /= by
    before, found = largest if isinstance(largest, Tensor) else torch.full_like(r[0], largest), r.amax()
    grown = torch.where(before > 0.0, torch.minimum(found, before * GROWTH), found).maximum(before)
    largest = torch.where(found.isfinite(), grown, before)
    least = largest.expand(len(of)).clone()
    torch._foreach_mul_(list(least.unbind()), rounding)
    # Not where r is as large, nor where it is NaN: 0 / 0 of a training that had no gradient yet must not be one.
    return list(torch.where(r < least, (r / least).square(), 1.0).unbind()), largest


@cache
def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(wide(dtype)).eps


def _on_host(
    made_of: Sequence[Tensor], rounding: Sequence[float], times: Sequence[float], before: float
) -> tuple[list[float], float]:
    looked_at = [_slice(one) for one in made_of]
    r = [own * x for own, x in zip(norms.root_mean_squares(looked_at), times, strict=True)]
    # Of a tensor of which a part was looked at, r is at least this.
    parts = [index for index, part in enumerate(looked_at) if part is not made_of[index]]
    least = {index: r[index] * math.sqrt(SLICE / made_of[index].numel()) for index in parts}
    largest = _with_step(before, r)
    # Not `<`: a part may be not finite.
    while small := [index for index, own in least.items() if not own >= rounding[index] * largest]:
        for index, own in zip(small, norms.root_mean_squares([made_of[index] for index in small]), strict=True):
            r[index] = own * times[index]
            del least[index]
        largest = _with_step(before, r)
    return [
        (own / (e * largest)) ** 2 if own < e * largest else 1.0 for own, e in zip(r, rounding, strict=True)
    ], largest


def _with_step(before: float, r: Sequence[float]) -> float:
    if not all(map(math.isfinite, r)):
        return before
    return max(before, min(max(r), before * GROWTH)) if before else max(r)


def _slice(x: Tensor) -> Tensor:
    """From the middle of a large tensor, as it lies in memory; of one with gaps all of it."""
    n = x.numel()
    if n <= 4 * SLICE:
        return x
    if x.is_contiguous():
        return x.as_strided((SLICE,), (1,), x.storage_offset() + (n - SLICE) // 2)
    flat = norms.in_memory_order(x)
    return flat[(n - SLICE) // 2 :][:SLICE] if flat.data_ptr() == x.data_ptr() else x
