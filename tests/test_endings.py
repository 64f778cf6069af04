"""A rank that fails ends the others with an error that helps, at once and by itself: no launcher stops them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.endings import TIMEOUT
from tests.lone_ranks import Ended, lone_ranks

pytestmark = pytest.mark.slow
ADVICE = "waited for another one of the 2 in vain: that one raised, died or hung"


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Ended]]:
    names = ("raises", "interrupted", "interrupted_in_backward", "dies_in_backward", "hangs")
    return lone_ranks(tmp_path_factory.mktemp("endings"), "by_hand", *names)


@pytest.mark.parametrize(
    ("name", "leaver", "status"),
    [("raises", 1, 1), ("interrupted", 0, 1), ("interrupted_in_backward", 1, 1), ("dies_in_backward", 0, 13)],
)
def test_a_rank_that_fails_ends_the_other_at_once(
    name: str, leaver: int, status: int, endings: Mapping[str, list[Ended]]
) -> None:
    """Though its factors are on their way, the other's are not, and half an hour is what each would wait."""
    failed, survivor = endings[name][leaver], endings[name][1 - leaver]
    assert (failed.status, survivor.status) == (status, 1), failed.printed + survivor.printed
    assert abs(failed.seconds - survivor.seconds) < 30
    assert f"Rank {1 - leaver} {ADVICE}" in survivor.printed
    assert ADVICE not in failed.printed
    assert name != "raises" or "RuntimeError: a rank of the test raised" in failed.printed


def test_a_rank_that_hangs_ends_the_other_after_the_timeout_of_the_strategy(endings: Mapping[str, list[Ended]]) -> None:
    hung, survivor = endings["hangs"][1], endings["hangs"][0]
    assert survivor.status == 1
    assert f"Timed out waiting {1000 * TIMEOUT}ms" in survivor.printed
    assert f"Rank 0 {ADVICE}" in survivor.printed
    assert survivor.seconds < hung.seconds  # it waited for no longer
