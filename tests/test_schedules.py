"""Schedules refuse at once what would stop a run in its middle; the growing interval in a fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_thor import ThorCallback
from lightning_thor.schedules import Exponential, GrowingInterval, Polynomial
from tests.helpers.boring import Boring
from tests.helpers.boring import trainer as trainer_of
from tests.helpers.commands import TINY_DIGITS, run

# jsonargparse, about how LightningCLI calls it.
pytestmark = pytest.mark.filterwarnings(r"ignore:(.|\n)*(deprecated in v4|JsonargparseDeprecationWarning)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Polynomial(1.0, end=0.0, n_steps=10), "end must be greater than 0, got 0.0"),
        (lambda: Polynomial(1.0, end=0.1, n_steps=0), "n_steps must be greater than 0"),
        (lambda: Exponential(0.2, factor=-0.5, every_n_steps=10), "factor must be greater than 0"),
        (lambda: GrowingInterval(start=0, end=10), "start must be greater than 0"),
        (lambda: GrowingInterval(start=1, end=10, growth=0.0), "growth must be greater than 0"),
    ],
)
def test_what_would_reach_zero_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GrowingInterval(start=1, end=10.0), r"end must be an int, a number of steps, got 10\.0"),  # type: ignore[arg-type]
        (lambda: GrowingInterval(start=1.5, end=10), r"start must be an int, a number of steps, got 1\.5"),  # type: ignore[arg-type]
        (lambda: GrowingInterval(start=20, end=10), r"end must be at least start.*start=20, end=10"),
    ],
)
def test_an_interval_that_would_fail_or_shrink_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_interval_grows_with_the_step_from_its_start_to_its_end() -> None:
    every = pickle.loads(pickle.dumps(GrowingInterval(start=5, end=100, growth=0.1)))
    assert [every(step) for step in (0, 50, 59, 60, 500, 999, 1000, 10**6)] == [5, 5, 5, 6, 50, 99, 100, 100]


class Refreshes(ThorCallback):
    """Notes the steps that refresh."""

    def __init__(self, **options: Any) -> None:
        super().__init__(summary=False, **options)
        self.steps: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        assert self.curvature is not None
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
    callback: Any = next(c for c in ran.trainer.callbacks if isinstance(c, ThorCallback))  # type: ignore[attr-defined]
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
