"""Checkpoints that are there as a whole or not at all, even where a disk is full."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ParallelStrategy

METADATA = "meta.pt"
"""The file that Lightning writes last into a folder of shards, and knows the folder by."""


@contextmanager
def whole(strategy: ParallelStrategy, filepath: Any, *, by_all: bool = False) -> Iterator[Any]:
    """Gives the path to write a checkpoint to, beside ``filepath``, where it is put when it is complete.

    If a rank fails, all raise, nothing is left, and what was at ``filepath`` before is still there. Lightning's own way
    is to write in the folder for temporary files, and to copy from there what lies on another disk: a copy that ends
    half-way has the name that ``ckpt_path="last"`` looks for. Remote paths and other plugins than Lightning's own for
    checkpoints are left as they are.

    Args:
        strategy: whose ranks are all here.
        filepath: of the checkpoint.
        by_all: every rank writes files of its own into a folder; otherwise rank 0 alone writes one file.

    Raises:
        RuntimeError: another rank could not write.
    """
    if "://" in str(filepath) or not (by_all or type(strategy.checkpoint_io) is TorchCheckpointIO):
        yield filepath
        return
    path = Path(strategy.broadcast(str(filepath)) if by_all else filepath)
    # Of no suffix that is looked for.
    beside = path.with_name(f"{path.name}.incomplete")
    error: BaseException | None = None
    try:
        if strategy.is_global_zero:
            _remove(beside)  # of a process that was killed
        yield beside
        if strategy.is_global_zero and not by_all:
            _put(beside, path)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as caught:  # as torch's CheckpointException is one
        error = caught
    done = strategy.reduce_boolean_decision(error is None)
    # Rank 0 first; then the first rank of a node whose disk is its own.
    for is_mine in (strategy.is_global_zero, strategy.local_rank == 0) if by_all else ():
        if done and is_mine and beside.is_dir():
            try:
                _put(beside, path)
            except OSError as caught:
                error = caught
        done = strategy.reduce_boolean_decision(error is None)
    if done:
        return
    if strategy.local_rank == 0:
        _remove(beside)
    if error is not None:
        raise error
    raise RuntimeError(
        f"The checkpoint {path} was not written: another rank failed, and its own output says why. Nothing of it was "
        "left, and an earlier one of this name is as it was."
    )


def _put(beside: Path, path: Path) -> None:
    """Rename what is complete."""
    if not path.is_symlink() and path.is_dir() and beside.is_file() and not (path / METADATA).is_file():
        raise IsADirectoryError(f"The checkpoint path exists and is a directory: {path}")
    if not path.is_dir() and beside.is_file():
        os.replace(beside, path)
        return
    before = path.with_name(f"{path.name}.before")
    _remove(before)
    if path.exists():
        os.replace(path, before)
    os.replace(beside, path)
    if path.is_dir() and before.is_dir() and not before.is_symlink():
        # Of a user who has other things in that folder.
        for part in before.iterdir():
            if part.suffix != ".distcp" and part.name not in (METADATA, ".metadata"):
                os.replace(part, path / part.name)
    _remove(before)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
