"""Preconditioners that are no curvature."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Identity:
    """A preconditioner that changes nothing."""

    def __init__(self) -> None:
        self.updates = 0

    def update(self) -> None:
        self.updates += 1

    def precondition(self, grads: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        return {p: grad.clone() for p, grad in grads.items()}
