"""Functions of the step (the number of applied updates) for damping and for the refresh interval.

Each is a small class, so that a YAML file can name it by ``class_path`` and a callback that holds one can be pickled.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exponential:
    """``start * factor ** (step / every_n_steps)``.

    >>> Exponential(0.2, factor=0.5, every_n_steps=100)(200)
    0.05
    """

    start: float
    factor: float
    every_n_steps: int

    def __post_init__(self) -> None:
        _check_positive(start=self.start, factor=self.factor, every_n_steps=self.every_n_steps)

    def __call__(self, step: int) -> float:
        return float(self.start * self.factor ** (step / self.every_n_steps))


@dataclass(frozen=True)
class Polynomial:
    """From ``start`` to ``end`` in ``n_steps``: ``end + (start - end) * (1 - step / n_steps) ** power``, then ``end``.

    >>> decay = Polynomial(1.1, end=0.1, n_steps=10, power=2.0)
    >>> decay(0), decay(5), decay(20)
    (1.1, 0.35, 0.1)
    """

    start: float
    end: float
    n_steps: int
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(start=self.start, end=self.end, n_steps=self.n_steps, power=self.power)

    def __call__(self, step: int) -> float:
        left = max(0.0, 1.0 - step / self.n_steps)
        return float(self.end + (self.start - self.end) * left**self.power)


@dataclass(frozen=True)
class GrowingInterval:
    """An interval in steps that grows from ``start`` to ``end`` in proportion to the step (THOR, AAAI 2021: often at
    first, about once an epoch at the end).

    >>> every = GrowingInterval(start=1, end=100, growth=0.1)
    >>> every(0), every(200), every(10_000)
    (1, 20, 100)
    """

    start: int
    end: int
    growth: float = 0.1

    def __post_init__(self) -> None:
        _check_positive(start=self.start, end=self.end, growth=self.growth)

    def __call__(self, step: int) -> int:
        return min(self.end, max(self.start, int(self.growth * step)))


def _check_positive(**values: float) -> None:
    """A ValueError at once, rather than in the middle of a run: no damping and no interval may reach 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value!r}.")
