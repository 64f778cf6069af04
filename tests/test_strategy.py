"""Laws of training on two ranks: two ranks are one rank, resumed runs are unbroken runs, overflows skip on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_thor import Curvature, ThorDDPStrategy
from tests.boring import without_words
from tests.distributed_workers import ROWS, Module, Net, Result, batch, fit, results_folder, two_ranks

STATE = ("weights", "optimizer", "curvature", "schedulers", "epochs")


def one_rank(folder: Path, **options: Any) -> Result:
    return fit(folder, Module((ROWS,)), devices=1, **options)


def state(result: Result, *without: str) -> Result:
    return {key: without_words(result[key]) for key in STATE if key not in without}


def assert_bitwise(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ── registration ──


def test_the_strategies_are_found_by_name() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="thor_ddp", logger=False)
    assert isinstance(trainer.strategy, ThorDDPStrategy)
    assert trainer.world_size == 2
    assert "thor_ddp" in StrategyRegistry
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="thor_ddp_find_unused_parameters_true", logger=False)
    assert isinstance(trainer.strategy, ThorDDPStrategy)
    assert trainer.strategy._ddp_kwargs == {"find_unused_parameters": True}


def test_thor_ddp_takes_the_options_of_ddp() -> None:
    strategy = ThorDDPStrategy(gradient_as_bucket_view=True, process_group_backend="gloo")
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True}


def test_thor_ddp_on_one_process_is_bitwise_a_single_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)  # the strategy sets them; monkeypatch takes them away again
    alone = one_rank(tmp_path)
    try:
        ddp = one_rank(tmp_path, strategy="thor_ddp")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert ddp["strategy"] == "ThorDDPStrategy"
    assert ddp["all_reduces"] == []
    assert_bitwise(state(ddp), state(alone))


# ── two ranks are one rank ──


@pytest.mark.slow
def test_two_ranks_are_one_rank(tmp_path: Path) -> None:
    """Batches of 2 × 16 train as batches of 32 do: equal weights, momentum, factors, inverses and learning rates."""
    alone = one_rank(tmp_path, max_epochs=3)
    for result in two_ranks("halves"):
        assert (result["strategy"], result["world_size"]) == ("ThorDDPStrategy", 2)
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_two_staggered_ranks_are_one_staggered_rank(tmp_path: Path) -> None:
    """And each step that has layers due takes one all-reduce, of their factors alone."""
    alone = one_rank(tmp_path, max_epochs=3, stagger=True)
    for result in two_ranks("staggered"):
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)
        assert result["counts"] == list(range(1, 13))  # 5 layers on an interval of 3: every step has some
        sizes = [call["numel"] for call in result["all_reduces"]]
        assert sizes[0] == result["numel"] == sum(sizes[1:4]) == sum(sizes[4:7])


@pytest.mark.slow
def test_micro_batches_on_two_ranks_are_one_batch_on_one_rank(tmp_path: Path) -> None:
    alone = one_rank(tmp_path, max_epochs=2)
    for result in two_ranks("quarters"):
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "training", ["halves", "halves_ddp", "quarters", "unequal", "overflow", "unused", "resumed", "auto"]
)
def test_both_ranks_hold_bitwise_the_same(training: str) -> None:
    first, second = two_ranks(training)
    assert_bitwise(state(first), state(second))


@pytest.mark.slow
def test_thor_ddp_is_bitwise_ddp() -> None:
    for thor_ddp, ddp in zip(two_ranks("halves"), two_ranks("halves_ddp"), strict=True):
        assert (thor_ddp["strategy"], ddp["strategy"]) == ("ThorDDPStrategy", "DDPStrategy")
        assert_bitwise(state(thor_ddp), state(ddp))


@pytest.mark.slow
def test_unequal_parts_of_a_batch_have_the_factors_of_the_batch(tmp_path: Path) -> None:
    """10 rows on rank 0, 22 on rank 1. DDP's gradient is the mean of means then, another one; the factors are equal."""
    alone = one_rank(tmp_path, max_steps=1)
    for result in two_ranks("unequal"):
        torch.testing.assert_close(
            without_words(result["curvature"]), without_words(alone["curvature"]), rtol=1e-9, atol=1e-9
        )


@pytest.mark.slow
def test_all_ranks_take_the_block_size_that_rank_0_chose() -> None:
    for result in two_ranks("auto"):
        sizes = {tuple(layer["A"].shape) for layer in result["curvature"]["layers"].values() if "A" in layer}
        assert (1, 1, 96, 96) in sizes  # the widest factor, whole


# ── checkpoints ──


@pytest.mark.slow
def test_a_run_resumed_on_two_ranks_is_bitwise_the_unbroken_one() -> None:
    """Stopped after 4 steps, between the refreshes of steps 3 and 6: the inverses come from the checkpoint."""
    for resumed, unbroken in zip(two_ranks("resumed"), two_ranks("halves"), strict=True):
        assert len(resumed["steps"]) == 8  # of 12: it did not start anew
        assert resumed["steps"][0] == 5
        assert_bitwise(state(resumed), state(unbroken))


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    unbroken = one_rank(tmp_path, max_epochs=3)
    resumed = one_rank(tmp_path, max_epochs=3, resume=results_folder() / "halves" / "epoch=0.ckpt")
    assert resumed["steps"][0] == 5
    torch.testing.assert_close(state(resumed), state(unbroken), rtol=1e-9, atol=1e-9)


# ── overflows ──


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_skipped_and_forgotten_on_both() -> None:
    """Batch 3, whose step would refresh, overflows on rank 1 alone: as if it had not been there."""
    for overflow, left_out in zip(two_ranks("overflow"), two_ranks("overflow_left_out"), strict=True):
        assert overflow["steps"] == [1, 2, 3, 3, 4, 5]
        assert overflow["counts"] == [1, 1, 1, 1, 2, 2]  # the refresh comes one batch later
        assert overflow["window"] == 0.0
        assert int(overflow["curvature"]["rejected_windows"]) == 0
        assert all(weight.isfinite().all() for weight in overflow["weights"].values())
        # The scale is halved after it, and halving rounds nothing.
        assert_bitwise(state(overflow, "epochs"), state(left_out, "epochs"))


# ── layers that not every rank uses ──


@pytest.mark.slow
def test_a_layer_that_only_one_rank_uses_has_its_curvature_on_both() -> None:
    net = Net().double()
    curvature = Curvature(net, block_size=8, update_every_n_steps=3)
    images, classes = (part[:16] for part in batch(0))
    torch.nn.functional.cross_entropy(net(images.double(), True), classes).backward()
    curvature.update()
    for result in two_ranks("unused"):
        layer = result["curvature"]["layers"]["net.extra"]
        assert float(layer["updates"]) == 2.0
        assert bool(layer["A_inverted"].all())
    # ... and after one refresh it is that of the 16 rows of rank 0, not of 32.
    for result in two_ranks("unused_once"):
        expected = curvature.state_dict()["layers"]["extra"]
        torch.testing.assert_close(result["curvature"]["layers"]["net.extra"], expected, rtol=1e-9, atol=1e-9)
