"""Functions of the step (the number of applied updates) for damping, the refresh interval and the learning rate.

Each is a small class, so that a YAML file can name it by ``class_path`` and a callback that holds one can be pickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_thor.curvature.callables import StepFn


@dataclass(frozen=True)
class Exponential:
    """``start * factor ** (step / every_n_steps)``; all three are greater than 0.

    Args:
        start: value at step 0.
        factor: what it is multiplied by each ``every_n_steps``.
        every_n_steps: steps from one factor to the next.

    >>> Exponential(0.2, factor=0.5, every_n_steps=100)(200)
    0.05
    """

    start: float
    factor: float
    every_n_steps: int

    def __post_init__(self) -> None:
        check_positive(start=self.start, factor=self.factor, every_n_steps=self.every_n_steps)

    def __call__(self, step: int) -> float:
        return float(self.start * self.factor ** (step / self.every_n_steps))


@dataclass(frozen=True)
class Polynomial:
    """From ``start`` to ``end`` in ``n_steps``: ``end + (start - end) * (1 - step / n_steps) ** power``, then ``end``.

    All four are greater than 0.

    Args:
        start: value at step 0.
        end: value from ``n_steps`` on.
        n_steps: steps from one to the other.
        power: 1 is a straight line, more falls faster at first.

    >>> decay = Polynomial(1.1, end=0.1, n_steps=10, power=2.0)
    >>> decay(0), decay(5), decay(20)
    (1.1, 0.35, 0.1)
    """

    start: float
    end: float
    n_steps: int
    power: float = 1.0

    def __post_init__(self) -> None:
        check_positive(start=self.start, end=self.end, n_steps=self.n_steps, power=self.power)

    def __call__(self, step: int) -> float:
        left = max(0.0, 1.0 - step / self.n_steps)
        return float(self.end + (self.start - self.end) * left**self.power)


@dataclass(frozen=True)
class GrowingInterval:
    """Steps until the next refresh: ``growth * step``, but at least ``start`` and at most ``end``.

    Each refresh comes at about ``1 + growth`` times the step of the one before. THOR's paper (AAAI 2021) refreshes
    often at first and about once an epoch at the end: let ``end`` be the number of steps in an epoch.

    Args:
        start: the first interval, in steps; an int of at least 1.
        end: the longest interval, in steps; an int of at least ``start``.
        growth: the interval divided by the steps so far; greater than 0.

    >>> every = GrowingInterval(start=1, end=100, growth=0.1)
    >>> every(0), every(200), every(10_000)
    (1, 20, 100)
    """

    start: int
    end: int
    growth: float = 0.1

    def __post_init__(self) -> None:
        check_positive(start=self.start, end=self.end, growth=self.growth)
        for name, value in (("start", self.start), ("end", self.end)):
            if not isinstance(value, int):
                raise ValueError(f"{name} must be an int, a number of steps, got {value!r}.")
        if self.end < self.start:
            raise ValueError(f"end must be at least start: the interval grows. Got start={self.start}, end={self.end}.")

    def __call__(self, step: int) -> int:
        return min(self.end, max(self.start, int(self.growth * step)))


class PerStepLR(LRScheduler):
    """A schedule as a torch scheduler of the learning rate: the optimizer's own ``lr`` times ``schedule(step)``.

    It must be stepped after every optimizer step. ``lightning-thor`` does that by itself; ``configure_optimizers``
    returns ``{"scheduler": PerStepLR(optimizer, schedule), "interval": "step"}``. For a schedule of whole learning
    rates, such as those of `lightning_thor.recipes`, the optimizer's ``lr`` is 1.

    Args:
        optimizer: any; each of its groups keeps its own ``lr`` as the factor.
        schedule: a function of the step, counted from 0; in a configuration file its class, by ``class_path``.
        last_epoch: the step after which to go on, as of any torch scheduler; -1 starts anew.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    >>> scheduler = PerStepLR(optimizer, Polynomial(0.4, end=0.2, n_steps=2))
    >>> scheduler.get_last_lr()
    [0.8]
    """

    interval = "step"
    """When ``lightning-thor`` has the Trainer step it."""

    def __init__(self, optimizer: Optimizer, schedule: StepFn, last_epoch: int = -1) -> None:
        self.schedule = schedule
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group at this step."""
        return [lr * self.schedule(self.last_epoch) for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Counters and rates; not the schedule, which belongs to the configuration and may be any object."""
        return {key: value for key, value in super().state_dict().items() if key != "schedule"}


def check_positive(**values: float) -> None:
    """Raise a ValueError at once, rather than in the middle of a run, unless all ``values`` are greater than 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value!r}.")
