"""Laws of resumes: a training that was broken off goes on as the unbroken one, wherever and whenever it was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.boring import assert_bitwise
from tests.helpers.resumes import MATRIX, MODES, MOVES, SINGLE, SITUATIONS, Case, resumed, train

IN_PROCESS = [
    Case(MODES[(place + turn) % len(MODES)], situation, SINGLE, SINGLE)
    for place, situation in enumerate(SITUATIONS)
    for turn in range(1 + (situation == "mid_epoch"))
    if situation != "plain"
]
"""Each situation with one mode, and the middle of an epoch with two."""


@pytest.mark.parametrize("case", IN_PROCESS, ids=lambda case: case.name)
def test_a_resumed_training_is_bitwise_the_unbroken_one(tmp_path: Path, case: Case) -> None:
    unbroken = train(tmp_path, case, SINGLE, resumes=False)
    found = train(tmp_path, case, SINGLE, resumes=True)
    assert len(found.pop("steps")) < len(unbroken.pop("steps"))
    assert_bitwise(found, unbroken)


@pytest.mark.long
@pytest.mark.parametrize("name", MATRIX)
def test_in_every_mode_situation_and_strategy(name: str) -> None:
    unbroken, found = resumed(name)
    for one, other in zip(found, unbroken, strict=True):
        assert len(one.pop("steps")) < len(other.pop("steps"))
        assert_bitwise(one, other)


@pytest.mark.long
@pytest.mark.parametrize("name", MOVES)
def test_from_every_strategy_to_others_and_other_numbers_of_ranks(name: str) -> None:
    (unbroken, *_), found = resumed(name)
    for one in found:
        for part in ("weights", "curvature"):
            torch.testing.assert_close(one[part], unbroken[part], rtol=1e-9, atol=1e-9)
