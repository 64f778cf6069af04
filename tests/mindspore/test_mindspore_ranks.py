"""The migration door on two ranks: factors are averaged over them, and both hold the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import mindspore_workers as workers
from tests.helpers.boring import assert_bitwise, without_words
from tests.helpers.launching import run_forked
from tests.helpers.nn_thor_formulas import NumpyThor


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    status, printed = run_forked(workers.__file__, str(folder))
    assert status == 0, printed[-4000:]
    return {
        (variant, rank): torch.load(folder / f"{variant}-{rank}.pt", weights_only=True)
        for variant in workers.VARIANTS
        for rank in range(workers.RANKS)
    }


@pytest.mark.slow
@pytest.mark.parametrize("variant", workers.VARIANTS)
def test_two_ranks_follow_the_formulas_with_the_mean_of_their_factors(variant: str, results: Any) -> None:
    """Under a Trainer with plain "ddp"; ``batch_size`` is that of each process."""
    reference = NumpyThor(
        workers.make(),
        workers.RATES,
        workers.DAMPINGS,
        0.9,
        loss_scale=1.0,
        enable_clip_grad=False,
        variant=variant,
        decays=lambda name: True,
        **workers.SETTINGS,
    )
    for step in range(workers.STEPS):
        losses = []
        for rank in range(workers.RANKS):
            x, y = workers.part(step, rank)
            losses.append(lambda net, x=x, y=y: F.cross_entropy(net(x), y))
        reference.step(*losses)
    expected = {name: torch.from_numpy(weight) for name, weight in reference.weights.items()}
    torch.testing.assert_close(results[variant, 0]["weights"], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("variant", workers.VARIANTS)
def test_both_ranks_hold_bitwise_the_same(variant: str, results: Any) -> None:
    ours, theirs = (without_words(results[variant, rank]) for rank in (1, 0))
    assert_bitwise(ours, theirs)
    assert results[variant, 0]["optimizer"]["curvature"]["step"] == workers.STEPS
