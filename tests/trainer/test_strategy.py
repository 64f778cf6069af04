"""Laws of training on two ranks: two ranks are one rank, resumed runs are unbroken runs, overflows skip on both."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.multiprocessing import ProcessRaisedException

from lightning_thor import Curvature, ThorCallback, ThorDDPStrategy, ThorModelParallelStrategy
from tests.helpers.boring import assert_bitwise, without_words
from tests.helpers.distributed_workers import (
    HALVES,
    ROWS,
    Module,
    Net,
    batch,
    fit,
    in_buckets,
    one_rank,
    raises,
    results_folder,
    state,
    two_ranks,
)

# ── registration ──


def test_every_form_of_ddp_that_lightning_registers_is_there_for_thor_ddp() -> None:
    forms = [name for name in StrategyRegistry if name == "ddp" or name.startswith("ddp_")]
    assert len(forms) >= 12
    for form in forms:
        assert StrategyRegistry[f"thor_{form}"]["strategy"] is ThorDDPStrategy
        assert StrategyRegistry[f"thor_{form}"]["init_params"] == StrategyRegistry[form]["init_params"]
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="thor_ddp_find_unused_parameters_true", logger=False)
    assert isinstance(trainer.strategy, ThorDDPStrategy)
    assert trainer.world_size == 2
    assert trainer.strategy._ddp_kwargs == {"find_unused_parameters": True}


def forked(folder: Path, module: Module, strategy: Any) -> None:
    """Two ranks, forked from here."""
    L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=3,
        precision="64-true",
        callbacks=[ThorCallback(update_every_n_steps=3, block_size=8, summary=False)],
        default_root_dir=folder,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module)


@pytest.mark.slow
def test_ranks_that_are_forked_train_as_those_that_are_launched(tmp_path: Path, clean_process: None) -> None:
    module = Module(HALVES)
    forked(tmp_path, module, "thor_ddp_fork")
    # Not bitwise: a process that has done much before has its numbers elsewhere in memory, by which a product of a
    # matrix with one column (the gradient of a convolution's bias) may be rounded.
    found, expected = dict(module.net.named_parameters()), two_ranks("halves")[0]["weights"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_other_with_an_error_in_bounded_time(tmp_path: Path, clean_process: None) -> None:
    """In a step that refreshes, while the other one goes on to backward and sends its factors."""
    start = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="RuntimeError: a rank of the test raised"):
        forked(tmp_path, Module(HALVES, fail=raises), in_buckets(start_method="fork"))
    assert time.monotonic() - start < 60


def test_what_is_handed_to_spawned_ranks_can_be_pickled() -> None:
    strategy = pickle.loads(pickle.dumps(ThorDDPStrategy(split_indices=[1, 3], start_method="spawn")))
    assert isinstance(strategy, ThorDDPStrategy)
    assert pickle.loads(pickle.dumps(ThorCallback(damping=0.3)))._options["damping"] == 0.3


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), True, "25"])
@pytest.mark.parametrize("strategy", [ThorDDPStrategy, ThorModelParallelStrategy])
def test_a_bucket_size_that_is_none_is_refused(strategy: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="factor_bucket_mb must be a number of megabytes greater than 0"):
        strategy(factor_bucket_mb=value)


@pytest.mark.parametrize("strategy", [ThorDDPStrategy, ThorModelParallelStrategy])
def test_two_ways_of_making_buckets_at_once_are_refused(strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"factor_bucket_mb=1 and split_indices=\[3\] both say"):
        strategy(factor_bucket_mb=1, split_indices=[3])


@pytest.mark.parametrize("strategy", [ThorDDPStrategy, ThorModelParallelStrategy])
def test_bf16_factors_must_be_a_bool(strategy: Any) -> None:
    with pytest.raises(TypeError, match="bf16_factors must be True or False, got 'bf16'"):
        strategy(bf16_factors="bf16")


@pytest.mark.parametrize("strategy", [ThorDDPStrategy, ThorModelParallelStrategy])
def test_bf16_factors_has_no_effect_and_says_so(strategy: Any) -> None:
    with pytest.warns(DeprecationWarning, match="bf16_factors=True has no effect any more"):
        strategy(bf16_factors=True)


@pytest.mark.parametrize("strategy", [ThorDDPStrategy, ThorModelParallelStrategy])
def test_split_indices_of_another_model_are_refused_when_fit_starts(strategy: Any) -> None:
    with pytest.raises(ValueError, match="names layer 4, but this model has 4 layers"):
        strategy(split_indices=[1, 4]).connect_curvature(Curvature(Net()), parameters={})


def test_thor_ddp_takes_the_options_of_ddp() -> None:
    strategy = ThorDDPStrategy(gradient_as_bucket_view=True, process_group_backend="gloo")
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True}


def test_thor_ddp_on_one_process_is_bitwise_a_single_device(tmp_path: Path, clean_process: None) -> None:
    alone = one_rank(tmp_path)
    ddp = one_rank(tmp_path, strategy="thor_ddp")
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
        assert sizes[0] == result["travelling"] == sum(sizes[1:4]) == sum(sizes[4:7])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["polar", "adam"])
def test_two_ranks_in_another_mode_are_one_rank(tmp_path: Path, mode: str) -> None:
    """Roots of the inverses are shared out too, and travel as triangles; eigenvectors travel whole."""
    module = Module((ROWS,), mode=mode)
    alone = fit(tmp_path, module, devices=1, max_epochs=2)
    first, second = two_ranks(mode)
    assert_bitwise(state(first), state(second))
    torch.testing.assert_close(state(first), state(alone), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_micro_batches_on_two_ranks_are_one_batch_on_one_rank(tmp_path: Path) -> None:
    alone = one_rank(tmp_path, max_epochs=2)
    for result in two_ranks("quarters"):
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "training",
    ["halves", "halves_ddp", "quarters", "unequal", "overflow", "unused", "resumed", "irregular", "auto"],
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


# ── buckets that start in backward ──


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ("buckets", "halves_ddp"),
        ("split", "halves_ddp"),
        ("static", "halves_ddp"),
        ("irregular", "irregular_ddp"),
        ("micro_batches_in_buckets", "quarters"),
    ],
)
def test_how_factors_travel_changes_no_number(training: str, expected: str) -> None:
    """In buckets or at once, from backward or from the step; layers that are used 0 to 3 times, other on each rank."""
    for result, plain in zip(two_ranks(training), two_ranks(expected), strict=True):
        assert_bitwise(state(result), state(plain))


@pytest.mark.slow
def test_buckets_are_runs_of_layers_the_last_one_first_and_start_in_backward_from_the_second_refresh_on() -> None:
    for result in two_ranks("split"):
        # conv and its norm | hidden, head | extra
        first = [call["numel"] for call in result["all_reduces"][:3]]
        assert first == [61, 539, 284]
        started = [call["in_backward"] for call in result["all_reduces"]]
        assert started == [False] * 3 + [True] * 9


@pytest.mark.slow
def test_micro_batches_that_only_accumulate_start_nothing() -> None:
    for result in two_ranks("micro_batches_in_buckets"):
        n_buckets = result["counts"][1]
        assert result["counts"][:8] == [0, *[n_buckets] * 6, 2 * n_buckets]
        assert all(call["in_backward"] for call in result["all_reduces"][n_buckets:])


@pytest.mark.slow
def test_a_layer_that_was_not_used_holds_its_bucket_back_until_the_step() -> None:
    for result in two_ranks("irregular"):
        assert {call["in_backward"] for call in result["all_reduces"]} == {True, False}


# ── inversions shared out ──


@pytest.mark.slow
def test_a_refresh_of_thor_ddp_brings_the_inverses_to_all_by_one_collective() -> None:
    for training, own_group in (("halves", True), ("halves_ddp", False)):
        for result in two_ranks(training):
            first, *refreshes = [call["op"] for call in result["collectives"]]
            assert first == "all_gather"  # once in a run: the unit of gradients
            assert refreshes == ["all_reduce", "all_gather"] * 4
            assert {call["own_group"] for call in result["collectives"]} == {own_group}


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
        # The refresh comes one batch later; what the skipped step had on its way comes to its end on both ranks.
        assert overflow["counts"] == [1, 1, 1, 2, 3, 3]
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
    torch.nn.functional.cross_entropy(net(images.double(), 1), classes).backward()
    curvature.update()
    for result in two_ranks("unused"):
        layer = result["curvature"]["layers"]["net.extra"]
        assert float(layer["updates"]) == 2.0
        assert bool(layer["A_inverted"].all())
    # ... and after one refresh it is that of the 16 rows of rank 0, not of 32.
    for result in two_ranks("unused_once"):
        expected = curvature.state_dict()["layers"]["extra"]
        torch.testing.assert_close(result["curvature"]["layers"]["net.extra"], expected, rtol=1e-9, atol=1e-9)
