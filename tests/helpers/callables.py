"""What a configuration file may name where an option is a function, and what not."""

from __future__ import annotations

from functools import partial

CALLED: list[object] = []


def function(step: int) -> float:
    CALLED.append(step)
    return 1.0


class Own:
    """A user's schedule, which knows nothing of this package."""

    def __init__(self, value: float = 0.25) -> None:
        self.value = value

    def __call__(self, step: int) -> float:
        return self.value


class OwnInterval(Own):
    def __call__(self, step: int) -> int:
        return 2


class Plain:
    """Whose instances cannot be called."""


class OfTwo:
    def __call__(self, step: int, other: int) -> float:
        return 1.0


class Meta(type):
    """Whose instances are classes."""

    def __call__(cls, step: int) -> float:
        return 1.0


a_lambda = lambda step: function(step)  # noqa: E731
a_partial = partial(function)
an_instance = Own()
