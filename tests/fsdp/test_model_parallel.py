"""Laws of models that FSDP2 shards: they train as on one device, and go on with another number of ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_thor import Curvature, Thor, ThorCallback, ThorModelParallelStrategy, configure_thor
from lightning_thor.distributed import dtensor
from lightning_thor.fsdp.sharded_curvature import ShardedCurvature
from lightning_thor.trainer import callback
from lightning_thor.trainer.fsdp2_strategy import _check_clipping
from lightning_thor.trainer.start_report import curvature_table
from tests.helpers.boring import Boring, assert_bitwise, quiet, without_words
from tests.helpers.distributed_workers import ROWS, Result, batch, fit, one_rank, only, state, whole
from tests.helpers.launching import ROOT
from tests.helpers.marks import marked
from tests.helpers.sharded_workers import (
    BF16,
    KL,
    LONG,
    MODULES,
    Normed,
    Searching,
    Sharded,
    UnfreezingSharded,
    Words,
    consolidated,
    fully_shard,
    ranks,
    results_folder,
    train,
)


def one_device(folder: Path, *module: Any, mode: str = "natural", **options: Any) -> Result:
    return fit(folder, Sharded((ROWS,), *module, mode=mode), devices=1, **options)


@pytest.fixture
def four_processes() -> Iterator[None]:
    """Of which this is the first one, and the others are not there."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


# ── two ranks are one device ──


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "module", "options"),
    [
        ("natural", (), {"max_epochs": 3}),
        ("micro_batches", (), {}),
        ("compiled", (), {}),
        ("kl_clip", (KL,), {"gradient_clip_val": 0.05}),
        ("polar", (), {"mode": "polar"}),
        ("adam", (), {"mode": "adam", "max_epochs": 3}),
    ],
)
def test_two_ranks_with_shards_are_one_device(
    tmp_path: Path, training: str, module: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Weights, momentum, factors, inverses and learning rates."""
    alone = one_device(tmp_path, *module, **options)
    found = ranks(training)
    for result in found:
        assert (result["strategy"], result["world_size"]) == ("ThorModelParallelStrategy", 2)
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)
        assert_bitwise(state(result), state(found[0]))


@pytest.mark.slow
def test_layers_that_are_unfrozen_have_curvature_as_on_one_device(tmp_path: Path) -> None:
    alone = one_rank(tmp_path, kind=UnfreezingSharded, max_epochs=3)
    for result in ranks("unfrozen"):
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_layers_that_compute_their_weights_have_curvature_as_on_one_device(tmp_path: Path) -> None:
    alone = one_rank(tmp_path, kind=Normed)
    assert {"net.conv", "net.hidden"} < set(alone["curvature"]["layers"])
    for result in ranks("normed"):
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)


def test_layers_that_are_unfrozen_after_a_validation_have_curvature_beside_the_others(
    tmp_path: Path, clean_process: None
) -> None:
    """It leaves whole weights in the root of the model, in the place of those that train."""

    class Validated(Searching, UnfreezingSharded):
        def configure_callbacks(self) -> list[L.Callback]:
            return []

    options: dict[str, Any] = {"strategy": "thor_fsdp2", "devices": 1, "max_epochs": 3}
    plain = train(tmp_path, UnfreezingSharded((ROWS,), dtype=torch.float32), **options)
    validated = train(tmp_path, Validated((ROWS,), dtype=torch.float32), **options)
    assert {"conv", "norm"} < {name.removeprefix("net.") for name in plain["curvature"]["layers"]}
    assert_bitwise(state(validated), state(plain))


@pytest.mark.parametrize(
    ("training", "first_step", "options"),
    marked(
        [
            (f"four{mode}{end}", first_step, options)
            for mode, options in (
                ("", {"max_epochs": 3}),
                ("_polar", {"mode": "polar"}),
                ("_adam", {"mode": "adam", "max_epochs": 3}),
            )
            for end, first_step in (("", 1), ("_resumed", 5))
        ],
        LONG,
    ),
)
def test_four_ranks_with_uneven_and_empty_shards_are_one_device_and_go_on_from_checkpoints_of_two(
    tmp_path: Path, training: str, first_step: int, options: dict[str, Any]
) -> None:
    alone = one_device(tmp_path, **options)
    found = ranks(training)
    assert (0, 12) in found[3]["shards"]  # of a table with five rows
    for result in found:
        assert (result["world_size"], result["steps"][0]) == (4, first_step)
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)
        assert_bitwise(state(result), state(found[0]))


@pytest.mark.slow
def test_a_trial_of_block_sizes_runs_the_shards_and_leaves_no_trace(tmp_path: Path) -> None:
    found = ranks("auto")
    (size,) = {result["block_size"] for result in found}
    alone = one_device(tmp_path, block_size=size)
    for result in found:
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)


# ── what lies and travels where ──


@pytest.mark.parametrize(
    "training", marked(["few", "adam_rule_few", "auto_few", "unfrozen_few", "adam_unfrozen_few"], LONG)
)
def test_ranks_that_store_half_of_the_inverses_train_as_ranks_that_store_all(training: str) -> None:
    found = ranks(training)
    expected, _ = ranks("natural" if training == "few" else training.removesuffix("_few"))
    layers = [result["curvature"]["layers"] for result in found]
    for result in found:
        torch.testing.assert_close(state(result, "curvature"), state(expected, "curvature"), rtol=1e-9, atol=1e-9)
        assert_bitwise(state(result, "curvature"), state(found[0], "curvature"))
    for name, layer in expected["curvature"]["layers"].items():
        (own,) = [some[name] for some in layers if some[name].keys() == layer.keys()]
        (other,) = [some[name] for some in layers if some[name] is not own]
        torch.testing.assert_close(own, layer, rtol=1e-9, atol=1e-9)
        assert {key.rsplit("_", 1)[-1] for key in layer.keys() - other.keys()} <= {
            "inverse",
            "eigenvectors",
            "inverted",
        }
    assert all(any(some[name].keys() < layer.keys() for name, layer in layers[0].items()) for some in layers[1:])


@pytest.mark.slow
def test_checkpoints_of_ranks_that_store_half_of_the_inverses_hold_all() -> None:
    saved = torch.load(results_folder() / "few" / "epoch=2.ckpt" / "meta.pt", weights_only=True)
    (expected, _), layers = ranks("natural"), saved["callbacks"]["ThorCallback"]["curvature"]["layers"]
    torch.testing.assert_close(layers, expected["curvature"]["layers"], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_momentum_is_sharded_as_the_weights_are() -> None:
    for result in ranks("natural"):
        assert len(result["shards"]) == result["n_momenta"] == len(result["weights"])
    shapes = [shape for result in ranks("natural") for shape in result["shards"] if shape[1:] == (96,)]
    assert shapes == [(6, 96), (6, 96)]  # of the hidden layer's 12 rows


@pytest.mark.slow
@pytest.mark.parametrize("training", ["natural", "polar"])
def test_a_step_sends_rows_there_and_back_and_sums_all_norms_at_once(training: str) -> None:
    """Those of what directions are made of and those of the directions, in float64 after the largest numbers of each:
    their squares would leave its range."""
    for result in ranks(training):
        ops = [call["op"] for call in result["collectives"]]
        n_steps, refreshes = result["steps"][-1], (result["steps"][-1] + 2) // 3
        assert ops.count("all_to_all") == 2 * n_steps
        assert ops.count("all_reduce") == 4 * n_steps + refreshes
        assert ops[0] == "all_gather"  # once in a run: the unit of gradients
        assert ops.count("all_gather") == 1 + refreshes
        assert len(ops) == 1 + 6 * n_steps + 2 * refreshes
        norms = [call["numel"] for call in result["collectives"] if not call["own_group"]]
        assert norms == [len(result["weights"])] * 4 * n_steps


@pytest.mark.parametrize("training", marked(["in_buckets", "irregular_in_buckets", "growing_in_buckets"], LONG))
def test_how_factors_travel_changes_no_number(training: str) -> None:
    """In a bucket for each layer from backward on, or at once in the step; layers that are used 0 to 2 times;
    windows of one micro-batch, and then of two, the first of which must not take the second for late."""
    for result, plain in zip(ranks(training), ranks(training.replace("buckets", "the_step")), strict=True):
        assert_bitwise(state(result), state(plain))
        assert not any(call["in_backward"] for call in only("all_reduce", plain["collectives"]))


@pytest.mark.slow
def test_split_indices_make_two_buckets_which_change_no_number() -> None:
    for result, plain in zip(ranks("split"), ranks("in_the_step"), strict=True):
        assert_bitwise(state(result), state(plain))
        refreshes = (result["steps"][-1] + 2) // 3
        assert len([call for call in only("all_reduce", result["collectives"]) if call["own_group"]]) == 2 * refreshes


@pytest.mark.slow
@pytest.mark.parametrize(("training", "micro_batches"), [("in_buckets", 1), ("micro_batches_in_buckets", 2)])
def test_from_the_second_refresh_on_buckets_start_in_backward_but_in_none_that_only_accumulates(
    training: str, micro_batches: int
) -> None:
    """Six layers, each in a bucket of its own; every step has four messages of the norms besides."""
    for result in ranks(training):
        calls = [call for call in only("all_reduce", result["collectives"]) if call["own_group"]]
        n_steps = result["steps"][-1]
        refreshes = (n_steps + 2) // 3
        assert [call["in_backward"] for call in calls] == [False] * 6 + [True] * 6 * (refreshes - 1)
        sent = [after - before for before, after in pairwise([0, *result["counts"]])]
        accumulated, stepped = sent[::micro_batches], sent[micro_batches - 1 :: micro_batches]
        assert stepped == [4 if step % 3 else 10 for step in range(n_steps)]
        assert micro_batches == 1 or not any(accumulated)


@pytest.mark.slow
def test_a_layer_that_was_not_used_holds_its_bucket_and_those_behind_it_back_until_the_step() -> None:
    for result in ranks("irregular_in_buckets"):
        calls = [call["in_backward"] for call in only("all_reduce", result["collectives"]) if call["own_group"]]
        assert calls[6:12] == [False] * 6  # nobody uses the layer that comes first in backward
        assert all(calls[12:18])


@pytest.mark.slow
def test_in_mixed_precision_factors_are_float32_and_the_training_is_that_of_one_device(tmp_path: Path) -> None:
    alone = fit(tmp_path, Sharded((ROWS,), **BF16), devices=1, max_epochs=1, precision="bf16-mixed")
    for result in ranks("bf16"):
        kept = [layer[key] for layer in result["curvature"]["layers"].values() for key in ("G", "G_inverse")]
        assert {tensor.dtype for tensor in kept} == {torch.float32}
        assert {weight.dtype for weight in result["weights"].values()} == {torch.float32}
        # Halves of a batch round otherwise than the whole.
        torch.testing.assert_close(result["weights"], alone["weights"], rtol=0.05, atol=0.02)


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_skipped_and_forgotten_on_both() -> None:
    """In float16 with a loss scale; batch 3, whose step would refresh, overflows on rank 1 alone."""
    for overflow, left_out in zip(ranks("overflow"), ranks("overflow_left_out"), strict=True):
        assert overflow["steps"] == [1, 2, 3, 3, 4, 5]
        assert (overflow["window"], int(overflow["curvature"]["rejected_windows"])) == (0.0, 0)
        assert_bitwise(state(overflow, "epochs"), state(left_out, "epochs"))


@pytest.mark.slow
def test_an_overflow_in_the_first_step_after_a_resume_is_forgotten_too() -> None:
    """Step 3, in which a refresh is due."""
    for result in ranks("overflow_resumed"):
        assert result["steps"] == [3, 4, 5]
        assert int(result["curvature"]["rejected_windows"]) == 0


# ── checkpoints ──


@pytest.mark.parametrize(
    ("resumed", "unbroken"),
    marked(
        [
            ("resumed", "natural"),
            ("unused_resumed", "unused"),
            ("one_file_resumed", "one_file"),
            ("polar_resumed", "polar"),
            ("adam_resumed", "adam"),
            ("auto_resumed", "auto"),
            ("few_resumed", "few"),
            ("adam_rule_few_resumed", "adam_rule_few"),
        ],
        LONG,
    ),
)
def test_a_resumed_run_is_bitwise_the_unbroken_one(resumed: str, unbroken: str) -> None:
    """Of a folder, also where parameters never had a gradient, and of one file; all between refreshes."""
    assert (results_folder() / "one_file" / "epoch=0.ckpt").is_file()
    for again, once in zip(ranks(resumed), ranks(unbroken), strict=True):
        assert again["steps"][0] == 5
        assert_bitwise(state(again), state(once))


@pytest.mark.parametrize("strategy", ["thor_fsdp2", consolidated])
def test_a_resumed_run_takes_the_block_size_of_its_checkpoint_not_the_one_it_would_choose(
    tmp_path: Path, clean_process: None, monkeypatch: pytest.MonkeyPatch, strategy: Any
) -> None:
    runs = []
    for size, resume in ((4, None), (16, tmp_path / "sized" / "epoch=0.ckpt")):
        split = SimpleNamespace(block_size=size)
        monkeypatch.setattr(callback, "try_block_sizes", lambda *_, split=split, **__: split)
        made = strategy() if callable(strategy) else strategy
        folder = None if resume else "sized"
        module = Sharded((ROWS,), dtype=torch.float32)
        runs.append(train(tmp_path, module, made, devices=1, block_size="auto", resume=resume, checkpoints=folder))
    assert [run["block_size"] for run in runs] == [4, 4]
    assert_bitwise(state(runs[1]), state(runs[0]))


class Finetuned(Sharded):
    """Its first layer is trained from the second epoch on, also where a fit goes on after that."""

    @property
    def backbone(self) -> nn.Module:
        return self.net.conv

    def configure_callbacks(self) -> list[L.Callback]:
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=1)]

    def on_train_start(self) -> None:
        self.backbone.requires_grad_(self.trainer.current_epoch > 1)


@pytest.mark.parametrize("strategy", ["thor_fsdp2", consolidated])
def test_a_run_resumed_before_or_after_layers_are_unfrozen_is_bitwise_the_unbroken_one(
    tmp_path: Path, clean_process: None, strategy: Any
) -> None:
    """Lightning's callback restores groups when a fit starts, and this strategy checkpoints after that."""

    def run(**options: Any) -> Result:
        module = Finetuned((ROWS,), dtype=torch.float32)
        made = strategy() if callable(strategy) else strategy
        return train(tmp_path, module, made, devices=1, max_epochs=4, **options)

    unbroken = run(checkpoints="unfrozen")
    assert len(unbroken["optimizer"]["param_groups"]) == 3
    for epoch in (0, 2):
        resumed = run(resume=tmp_path / "unfrozen" / f"epoch={epoch}.ckpt")
        # Not the groups: torch adds options to those that come after a state was loaded.
        assert_bitwise(momenta(resumed), momenta(unbroken))
        assert_bitwise(state(resumed, "optimizer"), state(unbroken, "optimizer"))


@pytest.mark.parametrize("strategy", [ThorModelParallelStrategy, consolidated])
def test_weights_alone_are_refused_with_how_to_load_them(tmp_path: Path, clean_process: None, strategy: Any) -> None:
    path = tmp_path / "weights.ckpt"
    fitted = quiet(tmp_path, ThorCallback(summary=False), strategy=strategy(), max_epochs=1)
    fitted.fit(Sharded((ROWS,), dtype=torch.float32))
    fitted.save_checkpoint(path, weights_only=True)
    load = r"torch.distributed.checkpoint.load\(" if path.is_dir() else r"module.load_state_dict\("
    with pytest.raises(ValueError, match=rf"holds weights alone.*{load}.*fit without ckpt_path"):
        train(tmp_path, Sharded((ROWS,), dtype=torch.float32), strategy(), devices=1, resume=path)
    module = Sharded((ROWS,), dtype=torch.float32)
    if path.is_dir():
        torch.distributed.checkpoint.load({"state_dict": module.state_dict()}, checkpoint_id=path)
    else:
        module.load_state_dict(torch.load(path)["state_dict"])
    assert_bitwise(dict(module.net.named_parameters()), whole(dict(fitted.lightning_module.net.named_parameters())))


def test_a_folder_of_another_mode_is_refused_with_the_mode(tmp_path: Path, clean_process: None) -> None:
    train(tmp_path, Sharded((ROWS,), dtype=torch.float32), "thor_fsdp2", devices=1, max_epochs=1, checkpoints="modes")
    adam = Sharded((ROWS,), mode="adam", dtype=torch.float32)
    with pytest.raises(ValueError, match="curvature is of mode='natural', this one of mode='adam'"):
        train(tmp_path, adam, "thor_fsdp2", devices=1, resume=tmp_path / "modes" / "epoch=0.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["natural", "polar"])
def test_a_checkpoint_of_two_ranks_goes_on_with_one(tmp_path: Path, clean_process: None, mode: str) -> None:
    """A distributed one, and in polar mode one that is consolidated."""
    unbroken = one_device(tmp_path, mode=mode)
    file = results_folder() / mode / "epoch=0.ckpt"
    assert file.is_dir() == (mode == "natural")
    strategy = "thor_fsdp2" if mode == "natural" else consolidated()
    resumed = train(tmp_path, Sharded((ROWS,), mode=mode), strategy, devices=1, resume=file)
    assert resumed["steps"][0] == 5
    torch.testing.assert_close(state(resumed), state(unbroken), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", marked([*MODULES, "alone_grouped_of_old"], LONG))
def test_a_checkpoint_of_one_device_goes_on_with_two_ranks(training: str) -> None:
    """Whatever the groups of parameters, and with a layer that does not train or has had no gradient yet."""
    (unbroken,) = ranks(training.removesuffix("_of_old"))
    for result in ranks(f"{training}_goes_on"):
        assert (result["strategy"], result["steps"][0]) == ("ThorModelParallelStrategy", 5)
        torch.testing.assert_close(
            {"momenta": momenta(result), **state(result, "optimizer")},
            {"momenta": momenta(unbroken), **state(unbroken, "optimizer")},
            rtol=1e-9,
            atol=1e-9,
        )


def momenta(result: Result) -> dict[int, torch.Tensor]:
    """By number; without those of parameters that never had a gradient, which only sharded ones have."""
    states = result["optimizer"]["state"].items()
    found = {number: one.get("momentum_buffer", one.get("exp_avg")) for number, one in states}
    found = {number: momentum for number, momentum in found.items() if momentum is not None}
    return {number: momentum for number, momentum in sorted(found.items()) if momentum.any()}


@pytest.mark.slow
def test_one_file_of_two_ranks_goes_on_on_one_device(tmp_path: Path) -> None:
    file = results_folder() / "one_file" / "epoch=0.ckpt"
    (unbroken,) = ranks("alone")
    resumed = one_device(tmp_path, max_epochs=3, resume=file)
    assert resumed["steps"][0] == 5
    torch.testing.assert_close(state(resumed), state(unbroken), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("searching", "plain"), marked([("searching", "natural"), ("searching_in_one_file", "one_file")], LONG)
)
def test_a_fit_after_a_search_for_a_learning_rate_is_the_fit_without_it(searching: str, plain: str) -> None:
    for result, expected in zip(ranks(searching), ranks(plain), strict=True):
        assert len(result["collectives"]) > len(expected["collectives"])
        assert_bitwise(state(result), state(expected))


def test_a_folder_goes_on_with_a_schedule_that_it_does_not_know(tmp_path: Path, clean_process: None) -> None:
    """Such as that of a search for a learning rate, which restores what it saved."""

    class Unscheduled(Searching):
        def configure_optimizers(self) -> Any:
            return configure_thor(self, lr=0.02, weight_decay=0.1)

    options: dict[str, Any] = {"strategy": "thor_fsdp2", "devices": 1, "max_epochs": 1}
    searched = train(tmp_path, Unscheduled((ROWS,), dtype=torch.float32), checkpoints="searched", **options)
    plain = train(tmp_path, Sharded((ROWS,), dtype=torch.float32), **options)
    assert_bitwise(searched["weights"], plain["weights"])
    file = tmp_path / "searched" / "epoch=0.ckpt"
    resumed = train(tmp_path, Sharded((ROWS,), dtype=torch.float32), resume=file, **options | {"max_epochs": 2})
    assert resumed["steps"][0] == 5


def test_a_folder_without_running_means_goes_on(tmp_path: Path, clean_process: None) -> None:
    """Such as one of an earlier version, whose options it takes."""

    class OneSize(Sharded):
        def configure_optimizers(self) -> Any:
            return configure_thor(self, lr=0.02, weight_decay=0.1, rms_averaging=0.0)

    options: dict[str, Any] = {"strategy": "thor_fsdp2", "devices": 1, "max_epochs": 1}
    train(tmp_path, OneSize((ROWS,), dtype=torch.float32), checkpoints="former", **options)
    file, more = tmp_path / "former" / "epoch=0.ckpt", options | {"max_epochs": 2}
    assert file.is_dir()
    ends = [
        train(tmp_path, kind((ROWS,), dtype=torch.float32), resume=file, **more)["weights"]
        for kind in (OneSize, Sharded)
    ]
    assert_bitwise(ends[1], ends[0])


ONE_SIZE = {"rms_averaging": 0.0}
STATELESS = {"momentum": 0.0, "rms_averaging": 0.0}


@pytest.mark.parametrize(("saved", "now"), [({}, ONE_SIZE), ({}, {"momentum": 0.0}), (STATELESS, STATELESS)])
def test_a_folder_goes_on_with_its_options_and_the_state_that_they_make(
    tmp_path: Path, clean_process: None, saved: dict[str, Any], now: dict[str, Any]
) -> None:
    """Whatever the options in the code are by now; and where there is none, it is not made by a step."""
    options: dict[str, Any] = {"strategy": "thor_fsdp2", "devices": 1, "max_epochs": 2}
    modules = [Sharded((ROWS,), dtype=torch.float32, thor=thor) for thor in (saved, now)]
    unbroken = train(tmp_path, modules[0], checkpoints="saved", **options)
    resumed = train(tmp_path, modules[1], resume=tmp_path / "saved" / "epoch=0.ckpt", **options)
    assert resumed["steps"] == unbroken["steps"][-len(resumed["steps"]) :]
    for part in ("weights", "optimizer"):
        assert_bitwise(without_words(resumed[part]), without_words(unbroken[part]))


@pytest.mark.slow
def test_saving_an_optimizer_without_momentum_is_no_step_of_the_curvature() -> None:
    for result in ranks("no_momentum"):
        assert result["steps"] == [1, 2, 3, 4]
        assert result["curvature"]["step"] == 4
        assert result["n_momenta"] == 0
    assert (results_folder() / "no_momentum" / "epoch=0.ckpt").is_dir()


def test_state_that_is_made_beforehand_changes_no_step() -> None:
    torch.manual_seed(4)
    weights, grads = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)], torch.randn(3, 4, 3)
    with torch.no_grad():
        weights[1].copy_(weights[0])

    class Identity:
        def update(self) -> None:
            pass

        def precondition(self, grads: Any) -> Any:
            return {p: grad.clone() for p, grad in grads.items()}

    optimizers = [Thor([weight], preconditioner=Identity()) for weight in weights]
    optimizers[1].make_state()
    for grad in grads:
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    assert_bitwise(weights[1].data, weights[0].data)


# ── the strategy ──


def test_it_is_registered_and_shares_the_data_among_all_ranks(clean_process: None) -> None:
    assert StrategyRegistry["thor_fsdp2"]["strategy"] is ThorModelParallelStrategy
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="thor_fsdp2", logger=False)
    assert isinstance(trainer.strategy, ThorModelParallelStrategy)
    assert issubclass(ThorModelParallelStrategy, ModelParallelStrategy)
    assert trainer.world_size == 2
    assert trainer.strategy._save_distributed_checkpoint


def test_weights_that_are_not_sharded_over_all_data_are_refused(four_processes: None) -> None:
    mesh = init_device_mesh("cpu", (4,))
    square, weight = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), torch.randn(8, 8)
    model = nn.Linear(8, 8, bias=False)
    curvature = Curvature(model)
    for tensor, fault in (
        (weight, "is not sharded"),
        (distribute_tensor(weight, square["b"], [Shard(0)]), "is sharded over 2 of 4 processes"),
        (distribute_tensor(weight, mesh, [Replicate()]), "is placed as R, whose gradients nothing sums"),
        (distribute_tensor(torch.randn(8, 8, 4), mesh, [Shard(2)]), r"is placed as S\(2\): only its first two"),
    ):
        with pytest.raises(ValueError, match=rf"'weight' {fault}.*fully_shard\(self.net, mesh=self.device_mesh"):
            ThorModelParallelStrategy().connect_curvature(curvature, {"weight": nn.Parameter(tensor)})
    for tensor in (
        distribute_tensor(weight, mesh, [Shard(0)]),
        distribute_tensor(weight, mesh, [Shard(1)]),
        distribute_tensor(weight, square, [Replicate(), Shard(0)]),
    ):
        ThorModelParallelStrategy().connect_curvature(curvature, {"weight": nn.Parameter(tensor)})


def test_frozen_weights_need_no_shards_until_they_train(four_processes: None) -> None:
    weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    ThorModelParallelStrategy().check_parameters({"weight": weight})
    with pytest.raises(ValueError, match="'weight' is not sharded"):
        ThorModelParallelStrategy().check_parameters({"weight": weight.requires_grad_(True)})


@pytest.mark.parametrize(
    ("others", "algorithm", "is_refused"),
    [
        ("none", None, True),
        ("none", "value", True),
        ("data", None, True),
        ("data", "value", False),
        ("same", None, False),
    ],
)
def test_clipping_that_torch_cannot_do_is_refused_with_the_option_that_can(
    four_processes: None, others: str, algorithm: str | None, is_refused: bool
) -> None:
    """Of a weight that tensor parallelism shares out, beside one that is whole, sharded over the data or like it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    weights = [distribute_tensor(torch.randn(4, 4), mesh, [Shard(0), Shard(1)]), torch.randn(4, 4)]
    if others != "none":
        own = mesh if others == "same" else mesh["data"]
        weights[1] = distribute_tensor(weights[1], own, [Shard(0)] * own.ndim)
    optimizer = Thor([nn.Parameter(weight) for weight in weights])
    trainer: Any = SimpleNamespace(
        gradient_clip_val=0.5, gradient_clip_algorithm=algorithm, lightning_module=L.LightningModule()
    )
    if is_refused:
        with pytest.raises(ValueError, match=r"gradient_clip_val=0.5 cannot clip.*Give Thor or .* clip_norm"):
            _check_clipping(trainer, optimizer)
    else:
        _check_clipping(trainer, optimizer)


@pytest.mark.parametrize("replicas", [0, 1.5, None])
def test_a_number_of_replicas_that_is_none_is_refused(replicas: Any) -> None:
    with pytest.raises(ValueError, match=f"replicas must be a whole number of at least 1, got {replicas}"):
        ThorModelParallelStrategy(replicas=replicas)


@pytest.mark.parametrize(
    ("n_ranks", "options", "said"),
    [
        (4, {"inverse_workers": 3}, "=3 must divide the 4 processes.* give 1, 2, 4, or None"),
        (8, {"inverse_workers": 1, "replicas": 2}, r"multiple of replicas=2 times.*=1, .* give 2, 4, 8, or None"),
        (12, {"inverse_workers": 3, "replicas": 2, "tensor_parallel_size": 2}, "give 4, 12, or None"),
        (2, {"inverse_workers": 1, "tensor_parallel_size": 2}, "give 2, or None"),
    ],
)
def test_inverse_workers_that_some_replica_would_lack_are_refused(
    n_ranks: int, options: dict[str, Any], said: str
) -> None:
    strategy = ThorModelParallelStrategy(**options)
    strategy.cluster_environment = LightningEnvironment()
    strategy.cluster_environment.set_world_size(n_ranks)
    with pytest.raises(ValueError, match=said):
        strategy.new_worker_grid()
    strategy._inverse_workers = n_ranks
    assert strategy.new_worker_grid() is None


def test_the_summary_of_a_sharded_model_is_that_of_the_whole_and_asks_no_other_rank(four_processes: None) -> None:
    """Only one rank prints it: an attention's packed weight must not be gathered for its three parts."""
    tables = []
    for is_sharded in (False, True):
        model = nn.MultiheadAttention(8, 2)
        if is_sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        curvature = Curvature(model)
        with CommDebugMode() as communication:
            table = curvature_table(curvature)
        assert communication.get_total_counts() == 0
        tables.append([list(column.cells) for column in table.columns])
    assert tables[1] == tables[0]


def test_a_shard_without_the_sharded_curvature_is_told(four_processes: None) -> None:
    model = nn.Linear(8, 8, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.data, init_device_mesh("cpu", (4,)), [Shard(0)]))
    curvature = Curvature(model)
    assert dtensor.local_parts([model.weight.data])[0].shape == (2, 8)
    with pytest.raises(ValueError, match=r"\[2, 8\], a shard of its weight \[8, 8\].*ShardedCurvature\(curvature\)"):
        curvature.precondition({model.weight: dtensor.local_parts([model.weight.data])[0]})


# ── what the documentation shows ──


@pytest.mark.slow
def test_the_sharded_model_of_fsdp2_md_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None
) -> None:
    page = ROOT / "docs" / "tutorials" / "fsdp2.md"
    (snippet,) = re.findall(r"```python\n([^`]*fully_shard[^`]*)```", page.read_text(encoding="utf-8"))

    class Model(Boring):
        def __init__(self) -> None:
            super().__init__()
            self.net.blocks = nn.Sequential()  # empty: the net's own layers are sharded with it

    monkeypatch.chdir(tmp_path)
    quiet = partial(
        L.Trainer, accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    names: dict[str, Any] = {
        "Model": Model,
        "L": SimpleNamespace(Trainer=quiet),
        "ThorCallback": partial(ThorCallback, summary=False),
        "train_dataloader": Boring().data(),
    }
    exec(snippet, names)
    trainer = names["trainer"]
    assert trainer.global_step == 4
    assert all(dtensor.is_sharded(p) for p in trainer.lightning_module.parameters())
    assert (tmp_path / "checkpoints").is_dir()
    trainer.validate(trainer.lightning_module, verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module)
    assert trainer.global_step == 8


@pytest.mark.slow
def test_without_lightning_shards_train_as_the_whole_model(
    clean_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not bitwise: shards lie elsewhere in memory, by which some processors' products round."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    models = [Words().double() for _ in range(2)]
    fully_shard(models[0], mesh=init_device_mesh("cpu", (1,)))
    curvatures = [Curvature(model, block_size=8) for model in models]
    preconditioners: list[Any] = [ShardedCurvature(curvatures[0]), curvatures[1]]
    for model, preconditioner in zip(models, preconditioners, strict=True):
        optimizer = Thor(model.parameters(), preconditioner=preconditioner)
        for number in range(3):
            images, classes = batch(number)
            nn.functional.cross_entropy(model(images, 1), classes).backward()
            optimizer.step()
            optimizer.zero_grad()
    shards, alone = whole(dict(models[0].named_parameters())), dict(models[1].named_parameters())
    torch.testing.assert_close(shards, alone, rtol=1e-13, atol=1e-15)
