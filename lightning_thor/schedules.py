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

    def __call__(self, step: int) -> float:
        return float(self.start * self.factor ** (step / self.every_n_steps))


@dataclass(frozen=True)
class Polynomial:
    """From ``start`` to ``end`` in ``n_steps``: ``end + (start - end) * (1 - step / n_steps) ** power``, then ``end``.

    >>> decay = Polynomial(1.0, end=0.0, n_steps=10, power=2.0)
    >>> decay(0), decay(5), decay(20)
    (1.0, 0.25, 0.0)
    """

    start: float
    end: float
    n_steps: int
    power: float = 1.0

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

    def __call__(self, step: int) -> int:
        return min(self.end, max(self.start, int(self.growth * step)))
