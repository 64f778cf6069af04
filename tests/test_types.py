"""Static types, checked beside the other tests: a process of its own, that takes most of a minute."""

from __future__ import annotations

import pytest

from tests.helpers.launching import run

pytest.importorskip("mypy", reason="mypy is not installed: pip install '.[dev]'")


@pytest.mark.slow
def test_the_types_hold() -> None:
    status, printed = run(["-m", "mypy"])
    assert status == 0, printed
