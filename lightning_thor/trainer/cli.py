"""``lightning-thor fit --config x.yaml``: a LightningCLI that also finds classes in the current folder."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, LRSchedulerTypeUnion
from torch.optim import Optimizer

from lightning_thor.trainer.callback import ThorCallback
from lightning_thor.trainer.pictures import plot


class _NothingToTrain(Callback):
    """Ends a fit where training would begin, after everything is set up for it."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.limit_train_batches = 0
        trainer.num_sanity_val_steps = 0


class SplitTrainer(Trainer):
    """A Trainer with the command ``split``."""

    def split(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Measures which block size suits this network on this device; trains nothing."""
        given = [callback for callback in self.callbacks if isinstance(callback, ThorCallback)]
        callback = given[0] if given else ThorCallback()
        callback.measure_block_size()
        # Other callbacks have nothing to do here, and some (LearningRateFinder) would train.
        self.callbacks: list[Callback] = [callback, _NothingToTrain()]
        self.fit(model, datamodule=datamodule)


class ThorCLI(LightningCLI):
    """A LightningCLI with ``split``, which steps a scheduler after each epoch, or each step if it has
    ``interval = "step"``, as `PerStepLR` does; its optimizer has the parameters that ``configure_model`` makes."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, each with its arguments that are no options."""
        return LightningCLI.subcommands() | {"split": {"model", "datamodule"}}

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """As of LightningCLI, with the interval at which ``lr_scheduler`` asks to be stepped.

        LightningCLI gives an optimizer the model's parameters, in one group, before ``configure_model``, which may make
        more, and in which ``fully_shard`` puts others in their places.
        """
        params = list(lightning_module.parameters())
        if len(optimizer.param_groups) == 1 and {*optimizer.param_groups[0]["params"]} != {*params}:
            optimizer.param_groups[0]["params"] = params
        interval = getattr(lr_scheduler, "interval", None)
        if interval is None:
            return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": interval}}


def run(args: Sequence[str] | None = None) -> LightningCLI:
    """Run one command; returns the CLI, with its trainer, model and data.

    Every part (model, data, optimizer, scheduler, callbacks) is a ``class_path``. The current folder is put on the
    import path, as ``python -m`` does, so that a configuration can name a project's own classes.

    Args:
        args: the command and its options; None for ``sys.argv``.
    """
    here = os.getcwd()  # not "": jsonargparse changes folder while it reads a configuration
    if here not in sys.path:
        sys.path.insert(0, here)
    return ThorCLI(
        parser_kwargs={
            "description": "Commands of LightningCLI, and lightning-thor plot RUN_DIR, which draws a run.",
            "version": sys.modules["lightning_thor"].__version__,  # not of an installed package, which need not be this
        },
        save_config_kwargs={"overwrite": True},  # a second run in one folder is no error
        trainer_class=SplitTrainer,
        args=None if args is None else list(args),
        subclass_mode_model=True,
        subclass_mode_data=True,
    )


def main() -> None:
    """The ``lightning-thor`` command."""
    if sys.argv[1:2] == ["plot"]:
        # No command of LightningCLI, whose commands all make a Trainer and a model.
        parser = argparse.ArgumentParser("lightning-thor plot", description=(plot.__doc__ or "").partition("\n\n")[0])
        parser.add_argument("run_dir", help="folder of the logger's files, such as lightning_logs/version_0")
        return plot(parser.parse_args(sys.argv[2:]).run_dir)
    run()  # its value is no exit status
