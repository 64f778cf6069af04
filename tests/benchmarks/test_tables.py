"""Laws of tables for a terminal: they can be read at any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.common.tables import rich_table

HEADS = ("workload", "optimizer", "steps to target", "seconds to target", "final")
ROWS = [
    ("digits, CNN with 3 convolutions", "THOR", "160 ± 25", "29.6 ± 4.6", "0.545 ± 0.021"),
    ("", "AdamW", "none got there", "–", "0.445 ± 0.017"),
]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_cell_is_broken_and_no_line_is_too_long(width: int) -> None:
    printed = io.StringIO()
    Console(file=printed, width=width).print(rich_table("To the target", HEADS, ROWS, words=2))
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for cell in (cell for row in ROWS for cell in row):
        assert any(cell in line for line in lines), cell
    assert ("┃" in printed.getvalue()) == (width == 120)
