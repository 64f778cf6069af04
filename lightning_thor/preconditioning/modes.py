"""What is kept of each block: its inverse, a root of it, or its eigenvectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from lightning_thor.linalg.decompositions import (
    EIGENVECTORS,
    INVERSE,
    ROOT,
    Decomposition,
)

Mode = Literal["natural", "polar", "adam"]


MODES: tuple[str, ...] = get_args(Mode)


DECOMPOSITIONS: Mapping[str, Decomposition] = {"natural": INVERSE, "polar": ROOT, "adam": EIGENVECTORS}
"""By mode."""


FALLBACK: Mapping[str, str] = {"natural": "plain momentum", "polar": "plain momentum", "adam": "plain Adam"}
"""By mode: what parameters without curvature take."""
