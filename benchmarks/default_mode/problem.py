"""What a task of this study is: a network, a loss of a random batch, and a score on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[nn.Module, torch.Generator], Tensor]
"""Draws a batch with the generator and computes the loss to differentiate."""

ScoreFn = Callable[[nn.Module], float]
"""The score of a network in evaluation mode; less is better."""


@dataclass(frozen=True)
class Problem:
    """The parts of a task that need its data."""

    model: Callable[[], nn.Module]
    """Makes a network with random weights, by torch's global generator."""
    loss: LossFn
    validation: ScoreFn
    """Chooses learning rates and settings."""
    test: ScoreFn
    """Is reported."""


@dataclass(frozen=True)
class StudyTask:
    """One training, without its optimizer."""

    words: str
    metric: str
    steps: int
    make: Callable[[Path | None], Problem]
    """From the folder of the data sets; None: there is none."""
    decay: float = 0.0
    """Weight decay per step at the peak learning rate, of weights of two or more dimensions; it falls with the rate."""
    per_position: bool = False
    """Whether the loss is a mean over positions as well as samples."""
    checks: int = 20
    """Scores taken in a training, evenly spaced."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What THOR does on this task alone, where that came after its first trials."""
