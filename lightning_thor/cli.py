"""``lightning-thor fit --config x.yaml``: a LightningCLI that also finds classes of the current folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

import lightning_thor  # noqa: F401  registers "thor_ddp"


def run(args: Sequence[str] | None = None) -> LightningCLI:
    """Run one command (``sys.argv`` without ``args``) and give back the CLI with its trainer, model and data.

    Every part (model, data, optimizer, scheduler, callbacks) is a ``class_path``. The current folder is put on the
    import path, as ``python -m`` does, so that a project's own classes can be named.
    """
    here = os.getcwd()  # not "": jsonargparse changes folder while it reads a configuration
    if here not in sys.path:
        sys.path.insert(0, here)
    return LightningCLI(
        save_config_kwargs={"overwrite": True},  # a second run in one folder is no error
        args=None if args is None else list(args),
        subclass_mode_model=True,
        subclass_mode_data=True,
    )


def main() -> None:
    """The ``lightning-thor`` command."""
    run()  # its value is no exit status
