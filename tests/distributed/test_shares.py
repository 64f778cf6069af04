"""Shared inversions: who inverts what, and that all have everything afterwards, failures included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_thor.distributed import shared_inversions
from lightning_thor.distributed.shared_inversions import SharedInversions, assign_inversions
from lightning_thor.linalg.decompositions import INVERSE, Problems, Solutions, damped_inverses
from lightning_thor.linalg.packing import packed_numel
from tests.helpers.boring import assert_bitwise
from tests.helpers.fakes import Place, on_ranks


def problems(n_blocks: dict[int, int]) -> dict[int, tuple[Tensor, Tensor]]:
    made = {}
    for size, n in n_blocks.items():
        rows = torch.randn(n, size, 2 * size, dtype=torch.float64)
        made[size] = rows @ rows.mT / (2 * size), torch.full((n,), 0.1, dtype=torch.float64)
    return made


def on_all(world_size: int, given: Problems, **options: object) -> list[Solutions]:
    """What each of several processes has after it inverted ``given`` together with the others."""
    return on_ranks(world_size, None, lambda place: SharedInversions(place.world, **options)(given))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("n_blocks", [{6: 5, 1: 4, 9: 2}, {32: 1, 2: 3}, {4: 1}, {1: 3}])
def test_shared_inverses_are_those_of_one_process_and_the_same_on_all(
    world_size: int, n_blocks: dict[int, int]
) -> None:
    given = problems(n_blocks)
    for solutions in (everyone := on_all(world_size, given)):
        for size, (blocks, damping) in given.items():
            inverses, succeeded = solutions[size]
            torch.testing.assert_close(inverses, damped_inverses(blocks, damping)[0], rtol=1e-12, atol=1e-12)
            assert_bitwise(inverses, everyone[0][size][0])
            assert succeeded.all()


def test_ever_new_sets_of_blocks_are_not_all_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_inversions, "MOST_ASSIGNMENTS", 2)

    def work(place: Place) -> int:
        shared = SharedInversions(place.world)
        for n in (1, 2, 3, 4, 1):
            shared(problems({4: n}))
        return len(shared._assignments)

    assert on_ranks(2, None, work) == [2, 2]


def test_a_failure_is_known_to_all_and_spoils_no_other_block() -> None:
    given = problems({5: 6})
    given[5][0][1] = torch.nan
    given[5][0][4] -= 50.0 * torch.eye(5)
    whole, _ = damped_inverses(*given[5])
    for solutions in on_all(3, given):
        inverses, succeeded = solutions[5]
        assert succeeded.tolist() == [True, False, True, True, False, True]
        torch.testing.assert_close(inverses[succeeded], whole[succeeded], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["lower", "full"])
def test_inverses_that_are_not_symmetric_travel_too(form: str) -> None:
    def factor(blocks: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        lower = torch.linalg.cholesky(blocks)
        return lower if form == "lower" else lower + 3 * lower.mT, torch.ones(len(blocks), dtype=torch.bool)

    given = problems({5: 3, 2: 2})
    for solutions in on_all(2, given, decomposition=INVERSE._replace(make=factor, form=form)):
        for size, problem in given.items():
            torch.testing.assert_close(solutions[size][0], factor(*problem)[0], rtol=1e-12, atol=1e-12)


def test_the_work_falls_as_one_over_the_number_of_processes() -> None:
    n_blocks = {128: 40, 96: 30, 64: 55, 10: 3}
    total = sum(n * size**3 for size, n in n_blocks.items())
    for world_size in (1, 2, 4, 8):
        for share in range(world_size):
            own = assign_inversions(n_blocks, world_size, share).own
            assert sum(len(blocks) * size**3 for size, blocks in own.items()) <= 1.05 * total / world_size


def test_each_block_is_inverted_by_one_process() -> None:
    n_blocks = {7: 11, 3: 5}
    for size, n in n_blocks.items():
        owned = [block for share in range(4) for block in assign_inversions(n_blocks, 4, share).own[size].tolist()]
        assert sorted(owned) == list(range(n))


def test_what_is_brought_to_all_takes_whatever_is_fewer_bytes() -> None:
    even, lone = assign_inversions({8: 8}, 4, 0).layout, assign_inversions({64: 1, 2: 3}, 4, 0).layout
    assert (even.is_gathered, even.length) == (True, 8 * (packed_numel(8) + 1))
    # Gathered, each of four processes would send as much as the one with the large block.
    assert (lone.is_gathered, lone.length) == (False, packed_numel(64) + 1 + 3 * (packed_numel(2) + 1))
