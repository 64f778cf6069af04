"""Laws of training on two ranks: two ranks are one rank, resumed runs are unbroken runs, overflows skip on both."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from lightning_thor import Curvature, ThorCallback, ThorDDPStrategy, ThorModelParallelStrategy
from tests.helpers.boring import assert_bitwise, quiet, without_words
from tests.helpers.distributed_workers import (
    HALVES,
    LONG,
    ROWS,
    Module,
    Net,
    batch,
    four_ranks,
    in_buckets,
    one_rank,
    raises,
    results_folder,
    state,
    two_ranks,
)
from tests.helpers.marks import marked
from tests.helpers.text_trainings import T5, Text, train, with_gradients_times, without_running_means

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (the dev extra has it)"
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


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("thor_dpp", "thor_ddp"),
        ("Thor-DDP", "thor_ddp"),
        ("thorddp", "thor_ddp"),
        ("tor_ddp", "thor_ddp"),
        ("thor_ddp_notebok", "thor_ddp_notebook"),
        ("thor_ddp_find_unused_parameter_true", "thor_ddp_find_unused_parameters_true"),
        ("thor", None),
    ],
)
def test_a_misspelt_strategy_is_told_which_was_meant(package: str, wrong: str, meant: str | None) -> None:
    pl = pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[dev]'")
    importlib.import_module("lightning_thor.trainer" + (".pytorch_lightning" if "_" in package else ""))
    with pytest.raises(ValueError, match="There is no strategy") as raised:
        pl.Trainer(accelerator="cpu", strategy=wrong, logger=False)
    assert (f"Did you mean {meant!r}?" if meant else "The names are 'thor_ddp', ") in str(raised.value)


def test_names_of_others_are_answered_by_lightning() -> None:
    assert "ddp" in StrategyRegistry.available_strategies()
    for name in ("dpp", "author_ddp", "fsdp2", None):
        assert name not in StrategyRegistry.available_strategies()
    with pytest.raises(ValueError, match="invalid strategy name"):
        L.Trainer(strategy="dpp")


def forked(folder: Path, module: Module, strategy: Any) -> None:
    """Two ranks, forked from here."""
    callback = ThorCallback(update_every_n_steps=3, block_size=8, summary=False)
    options = {"precision": "64-true", "max_epochs": 3, "use_distributed_sampler": False}
    quiet(folder, callback, devices=2, strategy=strategy, **options).fit(module)


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

LIKE_ONE_RANK: dict[str, tuple[dict[str, Any], float]] = {
    "halves": ({"max_epochs": 3}, 1e-9),
    "quarters": ({}, 1e-9),  # micro-batches of which one rank has one
    "odd": ({"max_epochs": 3, "accumulate": 3}, 1e-9),
    "staggered": ({"max_epochs": 3, "stagger": True}, 1e-9),
    "trace_rule": ({"max_epochs": 3, "trace_rule": (0.2, 0.02)}, 1e-9),
    "compiled": ({}, 1e-9),
    "polar": ({"mode": "polar"}, 1e-8),  # roots of the inverses travel as triangles
    "adam": ({"mode": "adam"}, 1e-8),  # eigenvectors travel whole
}
"""The options of one rank that a training of two is to equal, and how closely."""


@pytest.mark.slow
@pytest.mark.parametrize("training", LIKE_ONE_RANK)
def test_two_ranks_are_one_rank(training: str, tmp_path: Path) -> None:
    """Batches of 2 × 16 train as batches of 32 do: equal weights, momentum, factors, inverses and learning rates."""
    options, rtol = LIKE_ONE_RANK[training]
    alone = one_rank(tmp_path, **options)
    for result in two_ranks(training):
        assert (result["strategy"], result["world_size"]) == ("ThorDDPStrategy", 2)
        torch.testing.assert_close(state(result), state(alone), rtol=rtol, atol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "net", "summed"),
    [
        ("text", Text, False),
        ("unequal_text", Text, True),
        pytest.param("unequal_t5", T5, True, marks=needs_transformers),
        ("four_texts", Text, True),
    ],
)
def test_ranks_of_a_language_model_are_one(training: str, net: type[nn.Module], summed: bool, tmp_path: Path) -> None:
    """With tied tables, attention and transformers' T5; also where one rank has 10 texts and the other one 22."""
    alone = train(tmp_path, net(), (ROWS,), summed=summed)
    for result in (ranks := (four_ranks if training == "four_texts" else two_ranks)(training)):
        assert_bitwise(state(result), state(ranks[0]))
        found, expected = state(result), state(alone)
        if summed:
            found = without_running_means(with_gradients_times(found, len(ranks)))
            expected = without_running_means(expected)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_each_step_of_two_staggered_ranks_sends_the_factors_of_its_layers_alone() -> None:
    for result in two_ranks("staggered"):
        assert result["counts"] == list(range(1, 13))  # 5 layers on an interval of 3: every step has some
        sizes = [call["numel"] for call in result["all_reduces"]]
        assert sizes[0] == result["travelling"] == sum(sizes[1:4]) == sum(sizes[4:7])


@pytest.mark.slow
def test_a_trace_rule_keeps_some_layers_on_all_ranks() -> None:
    for result in two_ranks("trace_rule"):
        assert 0 < int(result["curvature"]["refreshes"]) < int(result["curvature"]["turns"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "training", [*LIKE_ONE_RANK, "halves_ddp", "unequal", "overflow", "unused", "resumed", "irregular", "auto"]
)
def test_both_ranks_hold_bitwise_the_same(training: str) -> None:
    first, second = two_ranks(training)
    assert_bitwise(state(first), state(second))


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


@pytest.mark.parametrize(
    ("training", "expected"),
    marked(
        [
            ("halves", "halves_ddp"),
            ("buckets", "halves_ddp"),
            ("split", "halves_ddp"),
            ("static", "halves_ddp"),
            ("irregular", "irregular_ddp"),  # layers that are used 0 to 3 times, other on each rank
            ("micro_batches_in_buckets", "quarters"),
            # gradient_as_bucket_view; in ddp too, since products may round by where in memory a gradient lies.
            ("view", "view_ddp"),
            ("polar_view", "polar_view_ddp"),
            ("compressed", "compressed_ddp"),
            ("crossed", "crossed_ddp"),
            ("all_at_once", "all_at_once_ddp"),
            ("overflow", "overflow_ddp"),
            ("unequal_text", "unequal_text_ddp"),
        ],
        LONG,
    ),
)
def test_how_factors_travel_changes_no_number(training: str, expected: str) -> None:
    """In buckets or at once, from backward or from the step, with each option of DDP: thor_ddp is bitwise ddp."""
    for result, plain in zip(two_ranks(training), two_ranks(expected), strict=True):
        assert plain["strategy"] == ("DDPStrategy" if expected.endswith("ddp") else "ThorDDPStrategy")
        assert result["strategy"] == "ThorDDPStrategy"
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


@pytest.mark.slow
def test_windows_of_several_lengths_start_nothing_in_backward() -> None:
    """Windows of 3 micro-batches and of 1; the refreshes at steps 0 and 3 are one of each.

    The latter starts nothing in backward: more pairs might be to come, as in the former.
    """
    for result in two_ranks("odd"):
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
def test_a_table_and_the_output_layer_that_is_the_same_start_in_backward() -> None:
    for result in two_ranks("text"):
        first = result["counts"][0]
        started = [call["in_backward"] for call in result["all_reduces"]]
        assert 1 < first < len(started)
        assert started == [False] * first + [True] * (len(started) - first)


@pytest.mark.slow
def test_a_hook_that_rounds_gradients_rounds_no_factors() -> None:
    """The first layer's inputs are data: its A is that of gradients that nothing rounded."""
    for rounded, exact in zip(two_ranks("compressed"), two_ranks("halves"), strict=True):
        assert not torch.equal(rounded["weights"]["conv.weight"], exact["weights"]["conv.weight"])
        ours, theirs = (result["curvature"]["layers"]["net.conv"]["A"] for result in (rounded, exact))
        assert_bitwise(ours, theirs)


@pytest.mark.slow
def test_a_step_that_is_not_due_launches_and_sends_what_one_of_plain_sgd_does() -> None:
    """Operators of forward and backward, and messages of the whole step, DDP's and Lightning's own among them."""
    for ours, plain in zip(two_ranks("counted"), two_ranks("counted_sgd"), strict=True):
        for number in (1, 2):
            assert ours["passes"][number] == plain["passes"][number]
            assert ours["messages"][number] == plain["messages"][number]
        assert plain["messages"][3] == {"allreduce_": 1}  # the gradients
        assert ours["messages"][3] == {"allreduce_": 1 + 3, "_allgather_base_": 1}  # three buckets, and the inverses
        assert ours["passes"][3] != plain["passes"][3]


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
    resumed = one_rank(tmp_path, max_epochs=3, resume=results_folder() / "halves")
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
