"""Laws of signals on several ranks: each gets them at another moment of a step, and all follow them after the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.boring import assert_bitwise
from tests.helpers.distributed_workers import results
from tests.helpers.lone_ranks import Ended, lone_ranks
from tests.helpers.signalled import STEPS

pytestmark = pytest.mark.slow
QUICK = ("ended", "sharded_ended", "ended_alone")
LONG = ("accumulating_ended", "validating_ended", "sharded_validating_ended")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def quick(folder: Path) -> dict[str, list[Ended]]:
    return lone_ranks(folder, "by_hand", *QUICK)


def check(folder: Path, name: str, ranks: list[Ended]) -> None:
    """All ranks ended after the same step, and went on from what they saved."""
    printed = "".join(one.printed for one in ranks)
    assert [one.status for one in ranks] == [0, 0], printed[-6000:]
    found = results(folder, name, 2, printed)
    for one in found:
        assert (one["broken"]["ended"], one["resumed"]["ended"]) == ("SIGTERMException", "")
        assert one["resumed"]["from"] == one["broken"]["step"] < one["resumed"]["step"] == STEPS
        assert_bitwise(one["resumed"]["weights"], one["unbroken"]["weights"])
    steps = {one["broken"]["step"] for one in found}
    assert len(steps) == 1
    assert steps <= ({4} if "validating" in name else {4, 5, 6})


@pytest.mark.parametrize("name", QUICK[:2])
def test_sigterm_ends_all_ranks_after_the_same_step(name: str, folder: Path, quick: dict[str, list[Ended]]) -> None:
    check(folder, name, quick[name])


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_sigterm_ends_all_ranks_wherever_it_comes(name: str, tmp_path: Path) -> None:
    check(tmp_path, name, lone_ranks(tmp_path, "by_hand", name)[name])


def test_a_rank_that_alone_gets_sigterm_ends_with_a_warning_and_the_other_with_an_error(
    quick: dict[str, list[Ended]],
) -> None:
    other, one = quick["ended_alone"]
    assert (one.status, other.status) == (0, 1)
    assert "This rank received SIGTERM, and 10 seconds and some steps later some other rank had not" in one.printed
    assert "Rank 0 waited for another one of the 2 in vain" in other.printed
    assert abs(one.seconds - other.seconds) < 30
