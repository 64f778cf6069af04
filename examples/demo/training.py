"""One training of the digits network, and what is measured of it."""

import logging
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch.optim.lr_scheduler import OneCycleLR

from examples.classifier import ImageClassifier
from examples.demo.recipes import Recipe
from examples.digits import DigitsData, DigitsNet

BATCH_SIZE = 128  # 9 steps per epoch, the last one with 53 images
CHECKS_PER_EPOCH = 3  # validations, after every third step; epochs are too coarse a measure here
WARMUP_SHARE = 0.1  # of all steps
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


@dataclass
class Curve:
    """What one training measured: epochs, seconds of training and validation accuracy (0..1) at every validation."""

    epochs: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)  # of every training step

    def epochs_to(self, target: float) -> float | None:
        """Epochs until the validation accuracy was first seen to be at least ``target``; None if it never was."""
        return next((e for e, accuracy in zip(self.epochs, self.accuracy, strict=True) if accuracy >= target), None)

    def seconds_to(self, target: float) -> float | None:
        """Seconds of training until then."""
        return next((s for s, accuracy in zip(self.seconds, self.accuracy, strict=True) if accuracy >= target), None)


class Stopwatch(L.Callback):
    """Fills a ``Curve``. Its clock starts in ``setup``, before THOR prepares anything, and stops in validation."""

    def __init__(self) -> None:
        self.curve = Curve()
        self.seconds = 0.0
        self.started = 0.0
        self.step_started = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.step_started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.curve.step_seconds.append(time.perf_counter() - self.step_started)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.perf_counter() - self.started
        self.curve.seconds.append(self.seconds)
        self.curve.epochs.append(trainer.global_step / trainer.num_training_batches)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.curve.accuracy.append(float(trainer.callback_metrics["val_acc"]))
        self.started = time.perf_counter()


class Contender(ImageClassifier):
    """The digits classifier with the optimizer of a ``Recipe`` and a one-cycle schedule, stepped at every batch."""

    def __init__(self, recipe: Recipe, lr: float) -> None:
        super().__init__(DigitsNet())
        self.recipe = recipe
        self.lr = lr

    def configure_optimizers(self) -> Any:
        optimizer = self.recipe.build(self, self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        # The momentum stays where it is: a cycle of it would be one more thing that treats them differently.
        scheduler = OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=steps, pct_start=WARMUP_SHARE, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(recipe: Recipe, lr: float, seed: int, epochs: int, split_seed: int = 0, progress: bool = True) -> Curve:
    """One training of the digits network; ``seed`` decides the initial weights and the order of the batches."""
    L.seed_everything(seed, verbose=False)
    module = Contender(recipe, lr)
    stopwatch = Stopwatch()
    bars: list[L.Callback] = [RichProgressBar(leave=False)] if progress else []
    trainer = L.Trainer(
        max_epochs=epochs,
        val_check_interval=1 / CHECKS_PER_EPOCH,
        callbacks=[stopwatch, *recipe.callbacks(), *bars],
        num_sanity_val_steps=0,
        **QUIET | {"enable_progress_bar": progress},
    )
    data = DigitsData(batch_size=BATCH_SIZE, split_seed=split_seed)
    # Reading the data set is not training, so it is done before the clock starts.
    data.setup()
    trainer.fit(module, train_dataloaders=data.train_dataloader(), val_dataloaders=data.val_dataloader())
    return stopwatch.curve


def warm_up() -> None:
    """Let torch make its one-off choices before anything is timed, or the first contender would pay for all."""
    module = DigitsNet()
    for batch_size in (BATCH_SIZE, BATCH_SIZE, 1077 % BATCH_SIZE):
        module(torch.randn(batch_size, 1, 8, 8)).sum().backward()


def keep_lightning_quiet() -> None:
    """Leave the screen to the progress bars: Lightning's tips and warnings are about settings that are meant here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
