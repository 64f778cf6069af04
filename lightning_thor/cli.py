"""``lightning-thor fit --config x.yaml``: a LightningCLI that also finds classes of the current folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI, LRSchedulerTypeUnion
from torch.optim import Optimizer

import lightning_thor  # noqa: F401  registers "thor_ddp"


class ThorCLI(LightningCLI):
    """A LightningCLI that steps each epoch the schedulers that do not ask for another interval, as `PerStepLR` does."""

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """What the model's ``configure_optimizers`` returns."""
        interval = getattr(lr_scheduler, "interval", None)
        if interval is None:
            return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": interval}}


def run(args: Sequence[str] | None = None) -> LightningCLI:
    """Run one command (``sys.argv`` without ``args``) and give back the CLI with its trainer, model and data.

    Every part (model, data, optimizer, scheduler, callbacks) is a ``class_path``. The current folder is put on the
    import path, as ``python -m`` does, so that a project's own classes can be named.
    """
    here = os.getcwd()  # not "": jsonargparse changes folder while it reads a configuration
    if here not in sys.path:
        sys.path.insert(0, here)
    return ThorCLI(
        save_config_kwargs={"overwrite": True},  # a second run in one folder is no error
        args=None if args is None else list(args),
        subclass_mode_model=True,
        subclass_mode_data=True,
    )


def main() -> None:
    """The ``lightning-thor`` command."""
    run()  # its value is no exit status
