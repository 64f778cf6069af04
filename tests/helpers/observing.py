"""Curvatures that observed one training pass, and whether two of them saw the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor import Curvature


def factors(curvature: Curvature) -> list[Tensor]:
    """The averages of all blocks, by block size."""
    return [stack.average for stack in curvature.factors.batches.values()]


def observing(model: nn.Module, train: Callable[[nn.Module], Any], **options: Any) -> Curvature:
    """A curvature after one refresh, with whole factors of all rows, which no longer listens."""
    curvature = Curvature(model, block_size=None, averaging=0.0, max_rows=None, **options)
    train(model)
    curvature.update()
    curvature.close()
    return curvature


def directions_of(curvature: Curvature, mode: str, grads: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Directions of a mode, of adam mode gradients in its coordinates."""
    if mode == "adam":
        return curvature.change_basis(grads)
    return {p: direction for some in curvature.directions(grads, mode) for p, direction in some.items()}


def told_by(curvature: Curvature) -> list[str]:
    """The warnings of the coming refresh."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        curvature.update()
    return [str(warning.message) for warning in caught]


def assert_same(one: Curvature, other: Curvature, **bounds: float) -> None:
    """Equal factors and directions, to rounding in float64 unless other bounds are given."""
    bounds = bounds or {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(factors(one), factors(other), **bounds)
    found = [
        list(curvature.precondition({p: p.grad for p in curvature.model.parameters() if p.grad is not None}).values())
        for curvature in (one, other)
    ]
    torch.testing.assert_close(*found, **bounds)
    assert all(factor.abs().sum() > 0 for factor in factors(one))
