"""Laws of a process that is killed while it saves, at every moment in which its files change."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_thor.trainer import checkpoints
from lightning_thor.trainer.checkpoints import METADATA, whole

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copyfile"}
"""Of Python's audit events, those that come right before files change. (`renameat2` is called without one: the events
before and after it are its two sides.)"""


class Strategy:
    """What `whole` asks of a strategy, with one rank."""

    is_global_zero, local_rank, checkpoint_io = True, 0, TorchCheckpointIO()

    def broadcast(self, value: str) -> str:
        return value

    def reduce_boolean_decision(self, decision: bool) -> bool:
        return decision


def write(file: Path, step: int) -> None:
    """In two halves, each of which opens the file."""
    file.write_text(f"step {step}", encoding="utf-8")
    with file.open("a", encoding="utf-8") as opened:
        opened.write(" is whole")


def save(path: Path, step: int, is_folder: bool) -> None:
    """Write a file, or a folder of two shards and what comes after them."""
    with whole(Strategy(), path, by_all=is_folder) as beside:
        if not is_folder:
            write(beside, step)
            return
        beside.mkdir()
        for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", METADATA):
            write(beside / name, step)


def step_of(path: Path) -> int:
    """Of a checkpoint; an error if its parts are of several, or one of them is missing or torn."""
    files = [path / name for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", METADATA)]
    (words,) = {file.read_text(encoding="utf-8") for file in (files if path.is_dir() else [path])}
    return int(words.removeprefix("step ").removesuffix(" is whole"))


def killed(work: Callable[[], None], moment: int) -> bool:
    """Do ``work`` in a process that is killed before the change number ``moment`` of files; whether it was."""
    process = os.fork()
    if not process:
        changes = iter(range(moment + 1))

        def kill(event: str, arguments: Any) -> None:
            is_change = event in CHANGES and not (event == "open" and arguments[1] == "r")
            if is_change and next(changes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def moments(
    tmp_path: Path, prepare: Callable[[Path], None], work: Callable[[Path], None]
) -> Iterator[tuple[int, Path]]:
    """A folder for each moment in which ``work`` is killed, and at last for the one that is not."""
    for moment in range(1000):
        folder = tmp_path / str(moment)
        folder.mkdir()
        prepare(folder)
        was_killed = killed(lambda folder=folder: work(folder), moment)
        yield moment, folder
        if not was_killed:
            return
    raise AssertionError("It is never done.")


@pytest.mark.parametrize(("before", "after"), [(False, False), (True, True), (True, False), (False, True)])
def test_last_is_the_checkpoint_before_or_the_new_one_and_the_next_save_leaves_nothing_else(
    before: bool, after: bool, tmp_path: Path
) -> None:
    """Files and folders, and one in the place of the other."""
    found = []

    def prepare(folder: Path) -> None:
        save(folder / "last.ckpt", 1, before)
        if before and after:
            (folder / "last.ckpt" / "notes.txt").write_text("mine", encoding="utf-8")

    for _, folder in moments(tmp_path, prepare, lambda folder: save(folder / "last.ckpt", 2, after)):
        (last,) = ModelCheckpoint(folder, save_last=True)._find_last_checkpoints(Mock())
        found.append(step_of(Path(last)))
        save(folder / "last.ckpt", 3, after)
        assert step_of(folder / "last.ckpt") == 3
        assert [one.name for one in folder.iterdir()] == ["last.ckpt"]
        if before and after:
            assert (folder / "last.ckpt" / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_without_an_exchange_of_names_nothing_torn_is_taken_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other systems than Linux there is a moment without a checkpoint of that name: the one before lies beside."""
    monkeypatch.setattr(checkpoints, "_exchange", lambda *_: False)
    absent = []
    for moment, folder in moments(
        tmp_path, lambda folder: save(folder / "last.ckpt", 1, True), lambda folder: save(folder / "last.ckpt", 2, True)
    ):
        if ModelCheckpoint(folder, save_last=True)._find_last_checkpoints(Mock()):
            assert step_of(folder / "last.ckpt") in (1, 2)
        else:
            absent.append(moment)
            assert (step_of(folder / "last.ckpt.before"), step_of(folder / "last.ckpt.incomplete")) == (1, 2)
        shutil.rmtree(folder)
    assert len(absent) == 1
