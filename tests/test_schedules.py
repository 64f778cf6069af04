"""Schedules refuse at once what would stop a run in its middle."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_thor.schedules import Exponential, GrowingInterval, Polynomial


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Polynomial(1.0, end=0.0, n_steps=10), "end must be greater than 0, got 0.0"),
        (lambda: Polynomial(1.0, end=0.1, n_steps=0), "n_steps must be greater than 0"),
        (lambda: Exponential(0.2, factor=-0.5, every_n_steps=10), "factor must be greater than 0"),
        (lambda: GrowingInterval(start=0, end=10), "start must be greater than 0"),
    ],
)
def test_what_would_reach_zero_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
