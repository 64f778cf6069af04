"""A rank that fails ends the others with an error that helps, at once and by itself: no launcher stops them."""

from __future__ import annotations

from collections.abc import Mapping
from unittest.mock import Mock

import pytest

from lightning_thor.distributed import process_group
from lightning_thor.distributed.process_group import abort_process_groups
from tests.helpers.endings import TIMEOUT
from tests.helpers.lone_ranks import Ended, lone_ranks

pytestmark = pytest.mark.slow
ADVICE = "waited for another one of the 2 in vain: that one raised, died or hung"


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Ended]]:
    names = ("raises", "interrupted", "interrupted_in_backward", "dies_in_backward", "hangs")
    names += ("sharded_raises", "sharded_interrupted")
    return lone_ranks(tmp_path_factory.mktemp("endings"), "by_hand", *names)


@pytest.mark.parametrize(
    ("name", "leaver", "status"),
    [
        ("raises", 1, 1),
        ("interrupted", 0, 1),
        ("interrupted_in_backward", 1, 1),
        ("dies_in_backward", 0, 13),
        ("sharded_raises", 1, 1),
        ("sharded_interrupted", 0, 1),
    ],
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
    assert not name.endswith("raises") or "RuntimeError: a rank of the test raised" in failed.printed


def test_a_rank_that_hangs_ends_the_other_after_the_timeout_of_the_strategy(endings: Mapping[str, list[Ended]]) -> None:
    hung, survivor = endings["hangs"][1], endings["hangs"][0]
    assert survivor.status == 1
    # Which of two collectives on one connection is waited for first is chance: the one that timed out, or the other.
    words = (f"Timed out waiting {1000 * TIMEOUT}ms", "Application timeout caused pair closure")
    assert any(one in survivor.printed for one in words)
    assert f"Rank 0 {ADVICE}" in survivor.printed
    # It waited for no longer: the other one slept for as long again.
    assert survivor.seconds == 0.0
    assert hung.seconds > TIMEOUT / 2


@pytest.mark.parametrize(
    "words",
    [
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "NCCL error: remote process exited",
    ],
)
def test_every_way_in_which_a_collective_tells_of_its_end_gets_the_advice(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("is_distributed", lambda: True), ("ctypes", Mock())):
        monkeypatch.setattr(process_group, name, value)
    monkeypatch.setattr(process_group, "dist", Mock(get_rank=lambda: 0, get_world_size=lambda: 2))
    error, other = RuntimeError(words), RuntimeError("a batch of the wrong shape")
    for exception in (error, other):
        abort_process_groups(exception, None)
    assert str(error).startswith(f"{words}\nRank 0 {ADVICE}")
    assert str(other) == "a batch of the wrong shape"
