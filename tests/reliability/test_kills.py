"""Laws of trainings that are killed twenty times at random moments, saves included (run by ``make soak``)."""

from __future__ import annotations

import pytest

from tests.helpers.kills import CHAINS, N_KILLS, killed

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("name", CHAINS)
def test_a_training_that_is_killed_ends_as_the_unbroken_one(name: str) -> None:
    """Bitwise, from ``ckpt_path="last"`` each time; no complete checkpoint is lost, and no rank stays behind."""
    found = killed(name)
    print(name, found)
    assert found["kills"] == N_KILLS
    assert (found["lost"], found["differ"]) == (0, 0)
    assert not found["hung"]
    assert found["seconds"] < 60
