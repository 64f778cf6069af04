"""Marks of tests by the training that they need."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def marked(cases: Iterable[Any], long: Collection[str], plain: Collection[str] = ()) -> list[Any]:
    """Parameters of tests, of which the first or only one names a training: slow ones, but for ``plain`` trainings, and
    ``long`` ones."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = [] if values[0] in plain else [pytest.mark.slow]
        found.append(pytest.param(*values, marks=[*marks, pytest.mark.long] if values[0] in long else marks))
    return found
