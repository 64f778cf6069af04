"""A disk that is full, for tests: a callback that saves onto it in the middle of a fit."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from fsspec.implementations.local import LocalFileOpener


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_a_write(file: LocalFileOpener, content: bytes) -> None:
    file.f.write(content[: len(content) // 2])
    full()


def other_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def half(source: str, target: str, **_: Any) -> None:
    """A copy that ends in its middle."""
    content = Path(source).read_bytes()
    Path(target).write_bytes(content[: len(content) // 2])
    full()


@contextmanager
def full_disk(when: str) -> Iterator[None]:
    """``"temporary"``: of a file in the folder for temporary ones; ``"file"``: of one that is copied from there to
    another disk; ``"shards"``, ``"metadata"``: of a folder the shards, or the file that comes after them."""
    save = torch.save

    def save_shards_only(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(file, Path):
            file.write_bytes(b"half")
            full()
        save(value, file, *args, **kwargs)

    patches = {
        "temporary": (patch.object(LocalFileOpener, "write", half_a_write),),
        "file": (patch.object(os, "rename", other_disk), patch.object(shutil, "copyfile", half)),
        "shards": (patch.object(os, "fsync", full),),
        "metadata": (patch.object(torch, "save", save_shards_only),),
    }[when]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


class SavesOntoAFullDisk(L.Callback):
    """After the first step a sound checkpoint as ``last.ckpt``, after the second one onto a disk that is full for some
    ranks, after the third one onto a disk with room again, each time noting what there is."""

    def __init__(self, folder: Path, when: str, ranks: tuple[int, ...] = (0,), sound_first: bool = True) -> None:
        self.folder, self.when, self.ranks, self.sound_first = folder, when, ranks, sound_first
        self.error: str | None = None
        self.found: list[list[str]] = []
        self.step_of_last: list[int | None] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, last = trainer.global_step, self.folder / "last.ckpt"
        if step == 2:
            try:
                if trainer.global_rank in self.ranks:
                    with full_disk(self.when):
                        trainer.save_checkpoint(last)
                else:
                    trainer.save_checkpoint(last)
            except BaseException as error:
                self.error = f"{type(error).__name__}: {error}"
        elif step == 3 or (step == 1 and self.sound_first):
            trainer.save_checkpoint(last)
        trainer.strategy.barrier()
        self.found.append(sorted(path.name for path in self.folder.glob("*")))
        file = last / "meta.pt" if last.is_dir() else last
        self.step_of_last.append(torch.load(file, weights_only=True)["global_step"] if file.is_file() else None)
        trainer.strategy.barrier()
