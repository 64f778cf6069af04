"""What a step costs, version by version: the newest row is of the code that is here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import history
from tests.helpers.launching import run_forked

ROWS: list[dict[str, Any]] = json.loads(history.RESULT.read_text(encoding="utf-8"))


def print_calls() -> None:
    print(json.dumps(history.count_calls()))


@pytest.mark.skipif(history.counted_on()["python"] != ROWS[-1]["python"], reason="other versions of Python call others")
def test_the_newest_rows_calls_are_those_of_the_code() -> None:
    """In a process of its own, since a test may have changed what is called."""
    status, printed = run_forked(print_calls)
    assert status == 0, printed
    assert json.loads(printed.splitlines()[-1]) == ROWS[-1]["calls"], "run: python -m benchmarks.history --append"


def test_a_row_takes_the_place_of_one_of_its_day_and_version_alone() -> None:
    rows = [{"date": "2026-01-01", "version": "1", "n": n} for n in range(2)]
    other = {"date": "2026-01-01", "version": "2", "n": 0}
    assert history.appended([rows[0], other], rows[1]) == [other, rows[1]]


def test_a_measurement_of_times_stands_in_the_row_that_had_it_first_alone() -> None:
    old = {"date": "2026-01-01", "version": "1", "step_cost": {"date": "2026-01-01", "plain": 1.0}}
    same = {"date": "2026-01-02", "version": "1", "step_cost": {"date": "2026-01-01", "plain": 1.0}}
    new = same | {"step_cost": {"date": "2026-01-02", "plain": 1.1}}
    assert history.appended([old], same)[1].keys() == {"date", "version"}
    assert history.appended([old], new)[1] == new
    assert history.appended([new], new) == [new]


def test_rows_go_on_in_time_and_the_file_stays_small() -> None:
    days = [row["date"] for row in ROWS]
    assert days == sorted(days)
    assert history.RESULT.stat().st_size < 50_000
