"""Numbers that go wrong, whatever they are: no error of linear algebra, and no weight lost that momentum SGD keeps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.commands import python_module
from tests.helpers.wrong_numbers import CASES, FAULTS, MODES, PRECISIONS, STEPS, laws_broken_in

ALL = os.environ.get("LIGHTNING_THOR_FUZZ") == "1"


def is_chosen(case: tuple[str, str, str]) -> bool:
    """One precision for each fault and mode, so that each meets each; all with LIGHTNING_THOR_FUZZ=1."""
    fault, precision, mode = (
        list(names).index(one) for names, one in zip((FAULTS, PRECISIONS, MODES), case, strict=True)
    )
    return ALL or (fault + 2 * mode) % len(PRECISIONS) == precision


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [*filter(is_chosen, CASES)], ids=" / ".join)
def test_no_weight_is_lost_that_sgd_keeps(case: tuple[str, str, str]) -> None:
    assert laws_broken_in(case) == []


ON_TWO_RANKS = {
    "some": [("batch of one", "bf16-true", "natural")]
    + [
        (fault, [*PRECISIONS][place % 6], MODES[place % 3])
        for place, fault in enumerate(FAULTS)
        if FAULTS[fault].steps != range(STEPS)
    ]
} | ({precision: [case for case in CASES if case[1] == precision] for precision in PRECISIONS} if ALL else {})
"""Each fault that comes and goes, with one precision and one mode, and one that was mended."""


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_nor_on_two_ranks_of_which_one_goes_wrong(name: str, tmp_path: Path) -> None:
    numbers = [str(CASES.index(case)) for case in ON_TWO_RANKS[name]]
    python_module("tests.helpers.wrong_numbers", str(tmp_path / "laws"), *numbers)
    assert [(tmp_path / f"laws.{rank}").read_text(encoding="utf-8") for rank in range(2)] == ["", ""]
