"""How the damping of a layer's curvature A ⊗ G is shared between its two factors."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

DampingRule = Literal["trace", "pi", "sqrt"]
RULES: tuple[str, ...] = get_args(DampingRule)


def split_damping(
    rule: DampingRule, damping: float, mean_A: Tensor, mean_G: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """What is added to the eigenvalues of A and of G, for all layers at once.

    * ``"trace"``: ``damping`` times the mean eigenvalue of each factor; without units, the same for every layer.
    * ``"pi"``: ``pi * sqrt(damping)`` and ``sqrt(damping) / pi`` with ``pi = sqrt(mean_A / mean_G)``, the split that
      bounds the error of the damped product (Martens & Grosse 2015, arXiv:1503.05671, section 6.3).
    * ``"sqrt"``: ``sqrt(damping / positions)`` and ``sqrt(damping * positions)``; for a layer that is used at one
      position per sample that is ``sqrt(damping)`` on both, for convolutions the rule of MindSpore's ``nn.thor``.

    Args:
        rule: one of the three.
        damping: greater than 0; relative for ``"trace"``, else in the units of the Fisher matrix.
        mean_A: mean eigenvalue (trace / width) of each layer's A, ``[layers]``.
        mean_G: of each layer's G, ``[layers]``.
        positions: rows per sample of each layer (1, or the output positions of a convolution), ``[layers]``.

    Returns:
        Two tensors ``[layers]``, for A and for G.

    >>> one, four = torch.ones(1), torch.full((1,), 4.0)
    >>> split_damping("pi", 0.25, four, one, one)
    (tensor([1.]), tensor([0.2500]))
    """
    if rule == "trace":
        return damping * mean_A, damping * mean_G
    if rule == "pi":
        tiny = torch.finfo(mean_A.dtype).tiny
        pi = mean_A.clamp_min(tiny).sqrt() / mean_G.clamp_min(tiny).sqrt()  # the quotient may be out of range
        return damping**0.5 * pi, damping**0.5 / pi
    return (damping / positions).sqrt(), (damping * positions).sqrt()
