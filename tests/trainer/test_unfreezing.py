"""Laws of layers that are unfrozen in mid-run, under a real Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn

from lightning_thor import Curvature, Thor, ThorDDPStrategy, configure_thor
from lightning_thor.layers import discovery
from lightning_thor.trainer.unfreezing import warn_of_layers_without_optimizer
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, trainer
from tests.helpers.distributed_workers import (
    LONG,
    Unfreezing,
    UnfreezingInABatch,
    UnfreezingTwice,
    one_rank,
    state,
    two_ranks,
)
from tests.helpers.marks import marked

BACKBONE = ["net.0", "net.2"]
ALL = [*BACKBONE, "net.4", "net.5", "net.7"]


class Finetuned(Boring):
    """Its convolutions are a backbone, which Lightning's callback freezes and unfreezes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.backbone = self.net[:4]

    def configure_optimizers(self) -> Thor:
        return configure_thor(self, lr=self.lr, **self.options)


class Unfrozen(Finetuned):
    """With what Lightning's callback leaves out: it freezes the backbone of a fit that goes on after it unfroze it."""

    def on_train_start(self) -> None:
        self.backbone.requires_grad_(self.trainer.current_epoch > 1)


def finetuning() -> BackboneFinetuning:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5)


def layers_of(found: L.Trainer) -> list[str]:
    curvature = callback_of(found).curvature
    assert curvature is not None
    return list(curvature.layers)


def test_a_backbone_that_is_unfrozen_has_the_curvature_that_the_plain_loop_includes(tmp_path: Path) -> None:
    found = trainer(tmp_path, finetuning(), max_epochs=3)
    found.fit(Finetuned())
    module = Finetuned()
    module.backbone.requires_grad_(False)
    optimizer = configure_thor(module, lr=0.01)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    curvature = optimizer.preconditioner = Curvature(module, update_every_n_steps=2, parameters=trained)
    for epoch in range(3):
        if epoch == 1:
            further = list(module.backbone.requires_grad_(True).parameters())
            optimizer.add_param_group({"params": further, "lr": 0.001})
            assert curvature.include(further) == BACKBONE
        elif epoch == 2:
            optimizer.param_groups[-1]["lr"] = 0.0015
        for x, y in module.data():
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    assert layers_of(found) == list(curvature.layers) == ALL
    assert curvature.factors.updates.tolist() == [4.0, 4.0, 6.0, 6.0, 6.0]
    assert_bitwise([p.detach() for p in found.lightning_module.parameters()], [p.detach() for p in module.parameters()])


@pytest.mark.parametrize(
    "mode", ["natural", pytest.param("polar", marks=pytest.mark.slow), pytest.param("adam", marks=pytest.mark.slow)]
)
def test_a_fit_that_goes_on_before_or_after_the_unfreezing_is_bitwise_the_unbroken_one(
    tmp_path: Path, mode: str
) -> None:
    each = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    unbroken = trainer(tmp_path, finetuning(), each, max_epochs=4, enable_checkpointing=True)
    unbroken.fit(Unfrozen(mode=mode))
    for epoch in (0, 1, 2):
        resumed = trainer(tmp_path, finetuning(), max_epochs=4)
        path = tmp_path / f"epoch={epoch}.ckpt"
        resumed.fit(Unfrozen(mode=mode), ckpt_path=path, weights_only=True)
        assert layers_of(resumed) == ALL
        assert_bitwise(everything(resumed), everything(unbroken))


def test_a_backbone_that_lightning_leaves_frozen_is_told(tmp_path: Path) -> None:
    """Its callback does so to any optimizer, where a fit goes on after the unfreezing."""
    each = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, finetuning(), each, enable_checkpointing=True).fit(Finetuned())
    resumed = trainer(tmp_path, finetuning(), max_epochs=3)
    with pytest.warns(UserWarning, match=r"net.0, net.2: trained in the checkpoint and frozen now.*on_train_start"):
        resumed.fit(Finetuned(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert layers_of(resumed) == ALL
    resumed = trainer(tmp_path, finetuning(), max_epochs=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(trained in the checkpoint|not observed)")
        resumed.fit(Unfrozen(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)


def test_an_optimizer_that_has_frozen_parameters_from_the_start(tmp_path: Path) -> None:
    class Everything(Finetuned):
        def configure_optimizers(self) -> Thor:
            self.backbone.requires_grad_(False)
            return Thor(self.parameters(), lr=self.lr)

        def on_train_epoch_start(self) -> None:
            self.net[2].requires_grad_(self.trainer.current_epoch == 1)

    found = trainer(tmp_path)
    found.fit(Everything())
    assert layers_of(found) == ALL[1:]


def test_frozen_layers_are_looked_for_in_one_pass_over_the_model_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    model[:19].requires_grad_(False)
    curvature, passes = Curvature(model), list[nn.Module]()
    every_use = discovery._uses
    monkeypatch.setattr(discovery, "_uses", lambda model: passes.append(model) or every_use(model))
    warn_of_layers_without_optimizer(curvature, [])
    assert passes == [model]


def test_a_strategy_is_asked_about_parameters_that_begin_to_train(tmp_path: Path, clean_process: None) -> None:
    asked: list[list[str]] = []

    class Asked(ThorDDPStrategy):
        def check_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
            asked.append(list(parameters))

        def connect_curvature(self, curvature: Curvature, parameters: Mapping[str, nn.Parameter]) -> Any:
            self.check_parameters(parameters)
            return super().connect_curvature(curvature, parameters)

    trainer(tmp_path, finetuning(), strategy=Asked()).fit(Finetuned())
    backbone = [f"{name}.{part}" for name in BACKBONE for part in ("weight", "bias")]
    assert len(asked) == 2
    assert not set(asked[0]) & set(backbone)
    assert asked[1] == backbone


def test_a_layer_that_comes_within_a_window_is_taken_at_the_next_one(tmp_path: Path) -> None:
    """Its factors then are of whole windows, and the open one of the others loses nothing."""
    found_in: list[tuple[int, int]] = []

    class Midway(Finetuned):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            found_in.append((batch_idx, len(layers_of(self.trainer))))
            if batch_idx == 1:
                further = list(self.backbone.requires_grad_(True).parameters())
                self.trainer.optimizers[0].add_param_group({"params": further})

        def configure_optimizers(self) -> Thor:
            self.backbone.requires_grad_(False)
            return super().configure_optimizers()

    found = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, limit_train_batches=4)
    found.fit(Midway(n=64))
    assert found_in == [(0, 3), (1, 3), (2, 5), (3, 5)]
    assert_bitwise(callback_of(found).curvature.factors.updates, torch.ones(5))


@pytest.mark.parametrize("training", marked(["unfrozen", "unfrozen_ddp", "unfrozen_twice", "unfrozen_one"], LONG))
def test_two_ranks_are_one_rank(training: str, tmp_path: Path) -> None:
    """Gradients of layers that begin to train are averaged as all others, and all ranks have their curvature."""
    without = ["curvature"] if training == "unfrozen_one" else []  # of which each rank stores a part
    kinds = {"unfrozen_ddp": UnfreezingInABatch, "unfrozen_twice": UnfreezingTwice}
    kind = kinds.get(training, Unfreezing)
    alone = one_rank(tmp_path, kind=kind, max_epochs=3, stagger=training == "unfrozen_one")
    assert list(alone["curvature"]["layers"])[:2] == ["net.conv", "net.norm"]
    for result in two_ranks(training):
        torch.testing.assert_close(state(result, *without), state(alone, *without), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_hook_that_remembers_buckets_begins_anew_with_those_of_the_unfrozen_model() -> None:
    one, other = two_ranks("compressed_unfrozen")
    assert one["epochs"] == (3, 12)
    assert_bitwise(one["weights"], other["weights"])


@pytest.mark.slow
def test_two_ranks_that_go_on_are_bitwise_the_unbroken_ones() -> None:
    for resumed, unbroken in zip(two_ranks("unfrozen_resumed"), two_ranks("unfrozen"), strict=True):
        assert_bitwise(state(resumed, "optimizer"), state(unbroken, "optimizer"))
        assert_bitwise(resumed["optimizer"]["state"], unbroken["optimizer"]["state"])
