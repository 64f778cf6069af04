"""The `lightning-thor` command, in a new process, in a fork or in this process, and what it leaves in a folder."""

from __future__ import annotations

import csv
import io
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_thor.trainer import cli
from tests.helpers import launching

ROOT = Path(__file__).parents[2]

COMMAND = Path(sys.executable).with_name("lightning-thor")

DATA = Path(os.environ.get("LIGHTNING_THOR_DATA", ROOT.parent / "shared" / "data"))

TINY_DIGITS = (
    "--config=examples/digits.yaml",
    "--trainer.accelerator=cpu",
    "--trainer.limit_train_batches=3",
    "--model.init_args.network.init_args.width=4",
)


def python_module(name: str, *arguments: str, columns: int = 160) -> str:
    """What ``python -m name ...`` prints in the repository's root, by `launching.run_forked`."""
    module = partial(runpy.run_module, name, run_name="__main__", alter_sys=True)
    status, printed = launching.run_forked(module, *arguments, COLUMNS=str(columns))
    assert status == 0, f"exit status {status}:\n{printed[-4000:]}"
    return printed


def command(*arguments: str, folder: Path) -> str:
    """Run the installed command in the repository's root, in a fork; everything that it printed.

    What Lightning starts for further ranks is a new process.
    """
    assert COMMAND.is_file(), f"{COMMAND} is missing: pip install -e . puts it there."
    status, printed = launching.run_forked(str(COMMAND), *arguments, *paths(folder), COLUMNS="160")
    assert status == 0, f"exit status {status}:\n{printed[-4000:]}"
    return printed


def forked_command(*arguments: str, folder: Path, status: int = 0) -> str:
    """As `command`, by `launching.run_forked`, and with another exit status too."""
    ended, printed = launching.run_forked(cli.main, *arguments, *paths(folder), COLUMNS="160")
    assert ended == status, f"exit status {ended}:\n{printed[-4000:]}"
    return printed


def paths(folder: Path) -> tuple[str, ...]:
    return f"--trainer.default_root_dir={folder}", f"--trainer.logger.init_args.save_dir={folder}"


def checkpoint_in(folder: Path) -> Path:
    (found,) = folder.rglob("*.ckpt")
    return found


def metrics_in(folder: Path) -> list[dict[str, str]]:
    (found,) = folder.rglob("metrics.csv")
    return list(csv.DictReader(io.StringIO(found.read_text(encoding="utf-8"))))


def only(monkeypatch: pytest.MonkeyPatch, subcommand: str) -> None:
    """Have LightningCLI describe one subcommand instead of all: most of the time of a short command goes there."""
    described = {subcommand: LightningCLI.subcommands()[subcommand]}
    monkeypatch.setattr(LightningCLI, "subcommands", staticmethod(lambda: described))


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str, root: Path = ROOT) -> LightningCLI:
    """`cli.run` in ``root``, as the command calls it; what it changes in this process is taken back."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lightning-thor"])  # pytest's own arguments would make LightningCLI warn
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    with monkeypatch.context() as context:
        if arguments[0] in LightningCLI.subcommands():
            only(context, arguments[0])
        return cli.run([*arguments, *paths(folder)])
