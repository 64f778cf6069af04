"""Laws of thor_ddp with the options of DDP: what they change in ddp they change here, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.boring import assert_bitwise
from tests.helpers.distributed_workers import one_rank, state, two_ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "expected"),
    [
        # gradient_as_bucket_view; in ddp too, since products may round by where in memory a gradient lies.
        ("view", "view_ddp"),
        ("polar_view", "polar_view_ddp"),
        ("compressed", "compressed_ddp"),
        ("crossed", "crossed_ddp"),
        ("all_at_once", "all_at_once_ddp"),
        ("overflow", "overflow_ddp"),
        ("unequal_text", "unequal_text_ddp"),
    ],
)
def test_thor_ddp_is_bitwise_ddp_with_every_option(training: str, expected: str) -> None:
    for result, plain in zip(two_ranks(training), two_ranks(expected), strict=True):
        assert_bitwise(state(result), state(plain))


@pytest.mark.slow
def test_a_hook_that_rounds_gradients_rounds_no_factors() -> None:
    """The first layer's inputs are data: its A is that of gradients that nothing rounded."""
    for rounded, exact in zip(two_ranks("compressed"), two_ranks("halves"), strict=True):
        assert not torch.equal(rounded["weights"]["conv.weight"], exact["weights"]["conv.weight"])
        ours, theirs = (result["curvature"]["layers"]["net.conv"]["A"] for result in (rounded, exact))
        assert_bitwise(ours, theirs)


@pytest.mark.slow
def test_a_shorter_last_window_on_two_ranks_is_one_on_one_rank(tmp_path: Path) -> None:
    """Windows of 3 micro-batches and of 1; the refreshes at steps 0 and 3 are one of each.

    The latter starts nothing in backward: more pairs might be to come, as in the former.
    """
    alone = one_rank(tmp_path, max_epochs=3, accumulate=3)
    for result in two_ranks("odd"):
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)
        assert result["counts"] == [0, 0, *[3] * 5, *[6] * 5]
        assert not any(call["in_backward"] for call in result["all_reduces"])


@pytest.mark.slow
def test_ranks_that_run_layers_in_other_orders_send_them_in_one_order_and_from_backward() -> None:
    """A bucket a layer, two layers of one shape: in two orders their factors would be added to each other's."""
    for result in two_ranks("crossed"):
        first, *later = (result["all_reduces"][5 * refresh :][:5] for refresh in range(4))
        assert not any(call["in_backward"] for call in first)
        assert all(call["in_backward"] for refresh in later for call in refresh)


@pytest.mark.slow
def test_a_step_that_is_not_due_launches_and_sends_what_one_of_plain_sgd_does() -> None:
    """Operators of forward and backward, and messages of the whole step, DDP's and Lightning's own among them."""
    for ours, plain in zip(two_ranks("counted"), two_ranks("counted_sgd"), strict=True):
        for batch in (1, 2):
            assert ours["passes"][batch] == plain["passes"][batch]
            assert ours["messages"][batch] == plain["messages"][batch]
        assert plain["messages"][3] == {"allreduce_": 1}  # the gradients
        assert ours["messages"][3] == {"allreduce_": 1 + 3, "_allgather_base_": 1}  # three buckets, and the inverses
        assert ours["passes"][3] != plain["passes"][3]
