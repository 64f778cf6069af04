"""What is kept of each block: its inverse, a root of it, or its eigenvectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from lightning_thor.eigen import eigenvectors
from lightning_thor.inverse import damped_inverse_roots, damped_inverses
from lightning_thor.triangles import Form

Mode = Literal["natural", "polar", "adam"]
MODES: tuple[str, ...] = get_args(Mode)


class Keeping(NamedTuple):
    """One of them; where the code speaks of inverses, it is what takes their place."""

    name: str
    """In a checkpoint."""
    make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """``(blocks [n, d, d], added to their eigenvalues [n])`` to ``(kept [n, d, d], succeeded [n])``."""
    form: Form
    """What has to travel."""
    power: float
    """Of a block that could never be inverted the identity times this power of its mean eigenvalue is kept."""
    products: int
    """How many times a direction multiplies a layer's matrix by those of both its factors."""


INVERSE = Keeping("inverse", damped_inverses, "symmetric", -1.0, 1)
ROOT = Keeping("root", damped_inverse_roots, "lower", -0.5, 2)
EIGENVECTORS = Keeping("eigenvectors", eigenvectors, "full", 0.0, 2)
KEEPINGS: Mapping[str, Keeping] = {"natural": INVERSE, "polar": ROOT, "adam": EIGENVECTORS}
"""By mode."""
PLAIN: Mapping[str, str] = {"natural": "plain momentum", "polar": "plain momentum", "adam": "plain Adam"}
"""By mode: what parameters without curvature take."""
