"""The modes of `Thor`: each is one object that holds everything about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from lightning_thor.linalg.decompositions import EIGENVECTORS, INVERSE, ROOT, Decomposition
from lightning_thor.preconditioning.directions import change_basis, natural, polar
from lightning_thor.preconditioning.grouping import Directions, GroupedLayers, Tensors

if TYPE_CHECKING:
    ModeName = str
else:
    # For configuration files, whose values are checked before any code can call `register_mode`.
    ModeName = Literal["natural", "polar", "adam"]


DirectionsFn = Callable[[GroupedLayers, Tensors], Iterator[Directions]]


class ChangeBasisFn(Protocol):
    """Take tensors to the coordinates of a mode, and back."""

    def __call__(self, stored: GroupedLayers, tensors: Tensors, *, back: bool = False) -> Directions:
        """Return new tensors in the shapes of ``tensors``, for every parameter."""


@dataclass(frozen=True)
class Mode:
    """All that `Thor`, `Curvature` and `ThorCallback` know of a mode, which has ``directions`` or ``change_basis``."""

    name: str
    """Value of the option ``mode``, and of ``"mode"`` in checkpoints."""
    decomposition: Decomposition
    """What a curvature stores per block."""
    directions: DirectionsFn | None = None
    """Directions of descent from gradients (from momenta if `momentum_first`), in parts, as of `natural`."""
    change_basis: ChangeBasisFn | None = None
    """Coordinates in which `Thor` takes Adam's steps."""
    momentum_first: bool = False
    """Whether momentum adds up gradients; otherwise it adds up directions."""
    uses_matrix_sign: bool = False
    """Whether matrices but for the head have a polar direction, which needs all rows of a matrix on one rank."""
    has_diagonal_head: bool = False
    """Whether the output layer's G is its diagonal alone. Its g are prediction errors; inverting their covariance
    removes the component that they share, which is the signal."""
    matches_rms: bool = True
    """Whether the option ``match_rms`` sets the scale of directions."""
    fallback: str = "plain momentum"
    """What parameters without curvature take, in words."""
    serves: tuple[str, ...] = ()
    """Other modes whose directions a curvature of this mode computes too."""


MODES: dict[str, Mode] = {}
"""By name."""


def register_mode(mode: Mode) -> Mode:
    """Add a mode, for ``Thor(mode=...)`` and ``Curvature(model, mode=...)``, and return it.

    Raises:
        ValueError: the name is taken, or not exactly one of ``directions`` and ``change_basis`` is set.
    """
    if mode.name in MODES:
        raise ValueError(f"A mode {mode.name!r} is registered already: choose another name.")
    if (mode.directions is None) == (mode.change_basis is None):
        raise ValueError(f"The mode {mode.name!r} must have either directions or change_basis: set one of them.")
    return MODES.setdefault(mode.name, mode)


NATURAL = register_mode(Mode("natural", INVERSE, natural))

POLAR = register_mode(
    Mode("polar", ROOT, polar, momentum_first=True, uses_matrix_sign=True, has_diagonal_head=True, serves=("natural",))
)

# Adam's directions have the scale of its learning rates, so nothing else sets it.
ADAM = register_mode(
    Mode("adam", EIGENVECTORS, None, change_basis, has_diagonal_head=True, matches_rms=False, fallback="plain Adam")
)


def common_mode(names: Iterable[str]) -> Mode:
    """Choose the one of these modes whose curvature serves parameter groups of all of them.

    Raises:
        ValueError: none does.

    >>> common_mode(["natural", "polar"]).name
    'polar'
    """
    wanted = set(names)
    for name in sorted(wanted):
        if wanted <= {name, *MODES[name].serves}:
            return MODES[name]
    raise ValueError(
        f"Parameter groups of the modes {', '.join(sorted(wanted))} cannot share a curvature: give all groups one mode."
    )
