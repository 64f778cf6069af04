"""Laws of resumes: a training that was broken off goes on as the unbroken one, wherever and whenever it was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.boring import assert_bitwise
from tests.helpers.distributed_workers import Result
from tests.helpers.resumes import FILE, MATRIX, MODES, MOVES, SINGLE, SITUATIONS, Case, Strategy, resumed, train

IN_PROCESS = [
    Case(MODES[(place + turn) % len(MODES)], situation, SINGLE, SINGLE)
    for place, situation in enumerate(SITUATIONS)
    for turn in range(1 + (situation == "mid_epoch"))
    if situation != "plain"
]
"""Each situation with one mode, and the middle of an epoch with two."""
ONE_FILE = FILE._replace(n_ranks=1)
MOVED_IN_PROCESS = [
    Case("natural", "plain", SINGLE, ONE_FILE),
    Case("polar", "plain", ONE_FILE, Strategy("ddp", 1)),
    Case("adam", "plain", Strategy("thor_ddp", 1), SINGLE),
]
"""On one rank, whatever the strategy."""


def assert_near(found: Result, unbroken: Result) -> None:
    """Weights and curvature, of which a rank under ``inverse_workers`` may lack inverses."""
    for name, tensors in found["curvature"]["layers"].items():
        others = unbroken["curvature"]["layers"][name]
        for key in tensors.keys() ^ others.keys():
            assert key.endswith(("_inverse", "_root", "_inverted")), key
            tensors.pop(key, None)
            others.pop(key, None)
    for part in ("weights", "curvature"):
        torch.testing.assert_close(found[part], unbroken[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", IN_PROCESS, ids=lambda case: case.name)
def test_a_resumed_training_is_bitwise_the_unbroken_one(tmp_path: Path, case: Case) -> None:
    unbroken = train(tmp_path, case, SINGLE, resumes=False)
    found = train(tmp_path, case, SINGLE, resumes=True)
    assert len(found.pop("steps")) < len(unbroken.pop("steps"))
    assert_bitwise(found, unbroken)


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize("case", MOVED_IN_PROCESS, ids=lambda case: case.name)
def test_a_training_goes_on_with_another_strategy(tmp_path: Path, case: Case) -> None:
    unbroken = train(tmp_path, case, case.before, resumes=False)
    if dist.is_initialized():
        dist.destroy_process_group()
    found = train(tmp_path, case, case.after, resumes=True)
    assert len(found.pop("steps")) < len(unbroken.pop("steps"))
    assert_near(found, unbroken)


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
        assert_near(one, unbroken)
