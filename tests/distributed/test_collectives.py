"""Sums of factors over ranks: right, in place, one per refresh, and none on a single process."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_thor import Curvature
from lightning_thor.distributed import process_group
from tests.helpers.boring import assert_bitwise, without_words
from tests.helpers.distributed_workers import STEPS_PER_EPOCH, Net, batch, two_ranks


def test_one_process_is_alone() -> None:
    assert not process_group.is_distributed()
    assert process_group.new_factor_group() is None
    assert (process_group.ProcessGroupCommunicator().world_size, process_group.ProcessGroupCommunicator().rank) == (
        1,
        0,
    )


@pytest.mark.slow
def test_the_sum_over_ranks_is_a_sum_and_in_place() -> None:
    for result in two_ranks("plain_loop"):
        assert result["is_distributed"]
        assert result["in_place"]
        # [1, 10] and [2, 10], summed in the factors' group, then once more in the world's.
        assert_bitwise(result["summed"], torch.tensor([6.0, 40.0]))


@pytest.mark.slow
def test_the_factor_group_holds_all_ranks_and_is_not_the_default_group() -> None:
    for result in two_ranks("plain_loop"):
        assert result["group_size"] == 2
        assert result["own_group"]


@pytest.mark.slow
def test_unequal_parts_of_a_batch_on_two_ranks_have_the_factors_of_the_batch_in_a_plain_loop() -> None:
    """10 rows on rank 0, 22 on rank 1, without a Trainer: the sums are weighted by rows, not by ranks."""
    net = Net().double()
    curvature = Curvature(net, block_size=8)
    images, classes = batch(0)
    F.cross_entropy(net(images.double(), 1), classes).backward()
    curvature.update()
    # The loss of a rank is the mean over its own rows alone: what the gradients need DDP for, G does not.
    expected = without_words(curvature.state_dict())
    for result in two_ranks("plain_loop"):
        torch.testing.assert_close(without_words(result["curvature"]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("training", "epochs", "own_group"), [("halves", 3, True), ("halves_ddp", 3, False)])
def test_a_refresh_makes_exactly_one_all_reduce_and_other_steps_make_none(
    training: str, epochs: int, own_group: bool
) -> None:
    is_refresh = [step % 3 == 0 for step in range(epochs * STEPS_PER_EPOCH)]
    for result in two_ranks(training):
        so_far = [sum(is_refresh[: step + 1]) for step in range(len(is_refresh))]
        assert result["counts"] == so_far
        assert all(
            (call["numel"], call["own_group"]) == (result["travelling"], own_group) for call in result["all_reduces"]
        )


@pytest.mark.slow
def test_accumulated_micro_batches_make_no_all_reduce_of_their_own() -> None:
    for result in two_ranks("quarters"):
        # Two micro-batches per step, and the all-reduce belongs to the second one of a due step.
        assert result["counts"][:8] == [0, 1, 1, 1, 1, 1, 1, 2]


@pytest.mark.slow
def test_a_plain_loop_makes_one_all_reduce_per_refresh() -> None:
    for result in two_ranks("plain_loop"):
        assert len(result["all_reduces"]) == 1
        assert result["n_collectives"] == 3  # the inverses, and once in a run the unit of gradients
