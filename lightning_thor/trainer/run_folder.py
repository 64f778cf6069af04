"""The folder in which a run leaves its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of a run's files: the first logger's, as Lightning's ``ModelCheckpoint`` takes it; without a logger
    ``default_root_dir``. None where nothing is to be written: with ``fast_dev_run``, and, with a warning, if the folder
    is a remote one.

    Ask on rank 0, whose loggers know it.
    """
    is_trial: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
    if is_trial:
        return None
    folder = str(_folder_of(trainer.loggers[0], trainer) if trainer.loggers else trainer.default_root_dir)
    if "://" in folder:
        rank_zero_warn(f"THOR writes its files into local folders alone, and {folder} is none: they are left out.")
        return None
    return Path(folder)


def _folder_of(logger: Any, trainer: pl.Trainer) -> str:
    folder: str | None = getattr(logger, "log_dir", None)
    if folder is not None:
        return folder
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
