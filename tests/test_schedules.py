"""Schedules refuse at once what would stop a run in its middle; the growing interval in a fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from lightning_thor import ThorCallback
from lightning_thor.schedules import GrowingInterval
from tests.helpers.boring import Boring
from tests.helpers.boring import trainer as trainer_of
from tests.helpers.commands import TINY_DIGITS, run

# jsonargparse, about how LightningCLI calls it.
pytestmark = pytest.mark.filterwarnings(r"ignore:(.|\n)*(deprecated in v4|JsonargparseDeprecationWarning)")


def test_the_interval_grows_with_the_step_from_its_start_to_its_end() -> None:
    every = pickle.loads(pickle.dumps(GrowingInterval(start=5, end=100, growth=0.1)))
    assert [every(step) for step in (0, 50, 59, 60, 500, 999, 1000, 10**6)] == [5, 5, 5, 6, 50, 99, 100, 100]


class Refreshes(ThorCallback):
    """Notes the steps that refresh."""

    def __init__(self, **options: Any) -> None:
        super().__init__(summary=False, **options)
        self.steps: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if self.curvature.is_due():
            self.steps.append(self.curvature.step)


def test_a_fit_refreshes_often_at_first_and_once_an_epoch_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the YAML's way of naming it, by ``class_path``; an epoch has 5 steps."""
    ran = run(
        monkeypatch,
        tmp_path,
        "fit",
        *TINY_DIGITS,
        "--trainer.limit_train_batches=5",
        "--trainer.limit_val_batches=0",
        "--trainer.max_epochs=5",
        "--trainer.callbacks=tests.test_schedules.Refreshes",
        "--trainer.callbacks.update_every_n_steps=lightning_thor.schedules.GrowingInterval",
        "--trainer.callbacks.update_every_n_steps.start=1",
        "--trainer.callbacks.update_every_n_steps.end=5",
        "--trainer.callbacks.update_every_n_steps.growth=0.5",
    )
    callback: Any = next(c for c in ran.trainer.callbacks if isinstance(c, ThorCallback))
    # After step 4 half of it, 2; after 6, 3; after 9, 4; after 13 and on the longest, 5.
    assert callback.steps == [0, 1, 2, 3, 4, 6, 9, 13, 18, 23]


def test_the_interval_of_a_resumed_fit_goes_on_growing(tmp_path: Path) -> None:
    def refreshes(epochs: int, resume: Path | None) -> list[int]:
        callback = Refreshes(update_every_n_steps=GrowingInterval(start=1, end=5, growth=0.5))
        trainer = trainer_of(tmp_path, callback, max_epochs=epochs)
        trainer.fit(Boring(), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return callback.steps

    unbroken = refreshes(4, None)
    assert refreshes(2, None) + refreshes(4, tmp_path / "end.ckpt") == unbroken
