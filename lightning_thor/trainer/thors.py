"""The `Thor` optimizers of a Trainer, and what of the Trainer concerns them: its settings, its steps, its folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_thor.optim.thor import Thor
from lightning_thor.preconditioning.modes import MODES
from lightning_thor.schedules import PerStepLR


def loss_multiplier(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float | Tensor:
    """What Lightning multiplied the loss by before backward: read where it lives, each time it is needed."""
    # Manual optimization divides by nothing; automatic divides by N, in a shorter last window too.
    n = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
    return loss_scale(scaler_of(trainer), trainer.strategy.root_device) / n


def loss_scale(scaler: Any | None, device: torch.device) -> float | Tensor:
    """What a GradScaler, if there is one, multiplies the loss by."""
    # Scaling a one instead of get_scale(), which waits for the device.
    return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))


class TrainingSteps:
    """Sees each training step of a trainer just before it is made, where it passes, which is the strategy: also in a
    search, such as Lightning's `LearningRateFinder`, where no hook of another callback is called, and after the
    module's own hooks.

    Args:
        strategy: of the trainer.
        before: called before each training step.

    Attributes:
        batch: the last one that the strategy was given, until it is set to None.
    """

    def __init__(self, strategy: Strategy, before: Callable[[], None]) -> None:
        self.batch: Any = None
        self._strategy, step = strategy, strategy.training_step

        def training_step(batch: Any, *others: Any) -> Any:
            self.batch = batch
            before()
            return step(batch, *others)

        strategy.training_step = training_step  # type: ignore[method-assign]

    def close(self) -> None:
        """Leave the strategy as it was."""
        del self._strategy.training_step


def takes_iterator(pl_module: pl.LightningModule) -> bool:
    """Whether its ``training_step`` fetches batches itself."""
    return is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """The trainer's own list."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def scaler_of(trainer: pl.Trainer) -> Any | None:
    """The trainer's GradScaler, if it has one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def clips_norm(trainer: pl.Trainer) -> bool:
    """Whether the trainer clips gradients by their norm."""
    return bool(trainer.gradient_clip_val) and str(trainer.gradient_clip_algorithm or "norm").endswith("norm")


def warn_of_clipping(trainer: pl.Trainer, optimizer: Thor) -> None:
    """Warn where the trainer's clipping of gradients makes steps no smaller."""
    matched = (
        group["match_rms"] is not None and MODES[group["mode"]].matches_rms and not MODES[group["mode"]].momentum_first
        for group in optimizer.param_groups
    )
    if clips_norm(trainer) and all(matched):
        rank_zero_warn(
            "gradient_clip_val clips the gradient's norm before it is preconditioned, and match_rms sets the scale "
            "afterwards: the clipping at most evens out the steps, as rms_averaging=0 does. Lower lr, or set "
            "match_rms=None."
        )


def warn_of_intervals(trainer: pl.Trainer) -> None:
    """Warn where a `PerStepLR` is stepped once an epoch."""
    wrong = any(
        isinstance(config.scheduler, PerStepLR) and config.interval != "step" for config in trainer.lr_scheduler_configs
    )
    if wrong and trainer.lightning_module.automatic_optimization:
        rank_zero_warn(
            "PerStepLR is stepped once an epoch here, but its schedule counts steps: the learning rate hardly moves. "
            'Return {"optimizer": optimizer, "lr_scheduler": {"scheduler": PerStepLR(...), "interval": "step"}} from '
            "configure_optimizers (the command lightning-thor does so by itself)."
        )


def thors_of(trainer: pl.Trainer) -> list[Thor]:
    """Those among the trainer's optimizers, in their order."""
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Thor)]


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def trained_of(optimizer: Optimizer) -> set[nn.Parameter]:
    """Those that train and have a shape."""
    return {p for p in parameters_of(optimizer) if p.requires_grad and not is_lazy(p)}


def is_training(trainer: pl.Trainer, optimizer: Thor) -> bool:
    """Whether the trainer is in a training step, and has this optimizer now."""
    return trainer.training and optimizer in trainer.optimizers


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of a run's files: the first logger's, as Lightning's ``ModelCheckpoint`` takes it; without a logger
    ``default_root_dir``. None where nothing is to be written: with ``fast_dev_run``, and, with a warning, if the folder
    is a remote one.

    Ask on rank 0, whose loggers know it.
    """
    is_trial: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
    if is_trial:
        return None
    folder: Any = trainer.default_root_dir
    if trainer.loggers:
        logger: Any = trainer.loggers[0]
        folder = getattr(logger, "log_dir", None)
        if folder is None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            folder = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    if "://" in str(folder):
        rank_zero_warn(f"THOR writes its files into local folders alone, and {folder} is none: they are left out.")
        return None
    return Path(folder)


def no_thor(trainer: pl.Trainer) -> str:
    """The error where ``configure_optimizers`` returned no `Thor`."""
    # Lightning has a stand-in where it returned None.
    names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    returned = ", ".join(name for name in names if name != "_MockOptimizer") or "none"
    return (
        f"ThorCallback found no Thor optimizer (configure_optimizers returned: {returned}). Return configure_thor("
        "self, lr=...) there (with LightningCLI: optimizer.class_path: lightning_thor.Thor), or remove the callback. "
        "If the trainer gets a Thor later, say so: ThorCallback(waits_for_thor=True)."
    )
