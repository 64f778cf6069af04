"""Directions made of rounding errors fade: those of gradients that are tiny beside what this training has had.

Where a direction is brought to a root mean square, a gradient of nothing but rounding errors would take a step of full
size: that of a bias that a softmax or a norm does not see, or of all weights once the loss is 0 for every sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_thor import norms
from lightning_thor.norms import as_real

SLICE = 2**14
"""Of a tensor that has more than four times as many entries, so many are looked at first, on a CPU."""

Mean = float | Tensor
"""Of the largest root mean square of each step so far: a tensor (0-dimensional, in float64) where a device would have
to be waited for to have a number."""


def fades(
    made_of: Sequence[Tensor], of: Sequence[Tensor], times: Sequence[float], mean: Mean, steps: int
) -> tuple[list[float] | list[Tensor], Mean]:
    """``min(1, r / (eps m))`` of each tensor, where r is the root mean square of what its direction is made of and m
    the mean, over the steps so far, of the largest r of each step.

    So m follows the unit of the loss, and one step of gradients that explode fades the later ones only for a while.
    ``eps`` is that of the weights' dtype, at least float32's.

    Args:
        made_of: what lies in this process of what each direction is made of: the gradient, or its momentum.
        of: the parameters, whole or sharded.
        times: what r is multiplied by, for each: 1, or what makes a mean of a momentum.
        mean: m before this step.
        steps: how many there have been, this one included.

    Returns:
        The factors, and m with this step.

    >>> fades([torch.tensor([1e-12]), torch.tensor([1.0])], [torch.zeros(1)] * 2, [1.0, 1.0], 3.0, 2)
    ([5e-06, 1.0], 2.0)
    """
    made_of = [one.resolve_conj() for one in made_of]
    eps = [torch.finfo(torch.promote_types(p.dtype, torch.float32)).eps for p in of]
    if norms.is_read_at_once(made_of, of):
        return _on_host(made_of, eps, times, float(mean), steps)
    real = [as_real(one) for one in made_of]
    r, scales = norms.norms(real, of)
    torch._foreach_mul_(
        list(r.unbind()), [own / math.sqrt(max(1, p.numel())) for own, p in zip(times, of, strict=True)]
    )
    for by in scales:
        r /= by
    before, largest = mean if isinstance(mean, Tensor) else torch.full_like(r[0], mean), r.amax()
    mean = torch.where(largest.isfinite(), before + (largest - before) / steps, before)
    least = mean.expand(len(of)).clone()
    torch._foreach_mul_(list(least.unbind()), eps)
    # Not where r is as large, nor where it is NaN: 0 / 0 of a training that had no gradient yet must not be one.
    return list(torch.where(r < least, r / least, 1.0).unbind()), mean


def _on_host(
    made_of: Sequence[Tensor], eps: Sequence[float], times: Sequence[float], before: float, steps: int
) -> tuple[list[float], float]:
    looked_at = [_slice(one) for one in made_of]
    r = [own * x for own, x in zip(norms.root_mean_squares(looked_at), times, strict=True)]
    shares = [part.numel() / max(1, one.numel()) for part, one in zip(looked_at, made_of, strict=True)]
    # Of a tensor of which a part was looked at, r is at least this.
    least = {index: r[index] * math.sqrt(share) for index, share in enumerate(shares) if 0.0 < share < 1.0}
    mean = _with_step(before, r, steps)
    while small := [index for index, own in least.items() if own < eps[index] * mean]:
        for index, own in zip(small, norms.root_mean_squares([made_of[index] for index in small]), strict=True):
            r[index] = own * times[index]
            del least[index]
        mean = _with_step(before, r, steps)
    return [own / (e * mean) if own < e * mean else 1.0 for own, e in zip(r, eps, strict=True)], mean


def _with_step(before: float, r: Sequence[float], steps: int) -> float:
    """The mean with one step more; without it, if gradients were not finite."""
    return before + (max(r) - before) / steps if all(map(math.isfinite, r)) else before


def _slice(x: Tensor) -> Tensor:
    """From the middle of a large tensor, as it lies in memory; of one with gaps all of it."""
    if x.numel() <= 4 * SLICE:
        return x
    flat = norms.in_memory_order(x)
    return flat[(len(flat) - SLICE) // 2 :][:SLICE] if flat.data_ptr() == x.data_ptr() else x
