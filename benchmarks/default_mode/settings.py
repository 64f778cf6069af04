"""The optimizers of this study, each with three peak learning rates to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from benchmarks.common.contenders import CONTENDERS, DEFAULT_RATE, Stepper
from lightning_thor import Curvature, Thor
from lightning_thor.optim.thor import Preconditioner

SCALE: Mapping[str, Mapping[str, float]] = {
    "natural": {
        "max_relative_step": 0.01,
        "rms_averaging": 0.9,
        "spread": 3.0,
        "mean_of_gradients": 1,
        "longest_interval": 100,
    },
    "polar": {"max_relative_step": 0.01},
    "adam": {},
}
"""What sets the scale of a step, and the longest interval where it is not 10, by mode."""


@dataclass(frozen=True)
class Setting:
    """One optimizer of the study."""

    label: str
    rates: tuple[float, ...]
    colour: str
    build: Callable[[nn.Module, float, bool], Stepper]
    """From the model, the peak learning rate, and whether the loss is a mean over positions as well as samples."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Options in plain types; a training with other options is another training."""


def thor(label: str, rates: tuple[float, ...], colour: str, mode: str = "natural", **options: Any) -> Setting:
    """`Thor` with its curvature at their defaults, but for options of the curvature."""

    def build(model: nn.Module, lr: float, per_position: bool) -> Stepper:
        curvature: Preconditioner = Curvature(model, mode=mode, **options)
        return Thor(model.parameters(), lr=lr, mode=mode, preconditioner=curvature)

    facts = {"mode": mode, **options, **SCALE[mode]}
    return Setting(label, rates, colour, build, facts)


def peer(name: str, rates: tuple[float, ...]) -> Setting:
    """An optimizer of the race to a target."""
    contender = CONTENDERS[name]
    return Setting(
        contender.label,
        rates,
        contender.colour,
        lambda model, lr, per_position: contender.build(model, lr, contender.options, per_position),
        contender.options,
    )


SETTINGS: Mapping[str, Setting] = {
    # A third of the default's rate, the default, and three times it.
    "thor": thor("THOR", (2e-3, DEFAULT_RATE, 2e-2), "tab:red"),
    "thor_polar": thor("THOR, polar", (3e-3, 1e-2, 3e-2), "tab:pink", mode="polar"),
    "thor_adam": thor("THOR, adam", (1e-3, 3e-3, 1e-2), "tab:olive", mode="adam"),
    "without": peer("without", (1e-3, 3e-3, 1e-2)),
    "sgd": peer("sgd", (1e-2, 3e-2, 1e-1)),
    "adamw": peer("adamw", (1e-3, 3e-3, 1e-2)),
    "muon": peer("muon", (3e-3, 1e-2, 3e-2)),
    "soap": peer("soap", (1e-3, 3e-3, 1e-2)),
}
