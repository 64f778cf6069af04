"""Checkpoints: written whole or not at all, even where a disk is full; and which a fit can go on from."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ParallelStrategy

from lightning_thor.trainer.packages import is_lightnings

METADATA = "meta.pt"
"""The file that Lightning writes last into a folder of shards, by which it recognises such a folder."""


@contextmanager
def whole(strategy: ParallelStrategy, filepath: Any, *, by_all: bool = False) -> Iterator[Any]:
    """Write a checkpoint beside ``filepath``, and rename it when it is complete; all ranks must call it.

    If a rank fails, all raise, nothing of it is left, and an earlier checkpoint at ``filepath`` is still there.
    Lightning itself writes into the folder for temporary files, and copies to another disk: a copy that ends half-way
    has a name that ``ckpt_path="last"`` finds. Remote paths, and checkpoint plugins other than Lightning's own, are
    written directly.

    Args:
        strategy: of the trainer.
        filepath: of the checkpoint.
        by_all: True if every rank writes files of its own into a folder, False if rank 0 alone writes one file.

    Yields:
        The path to write to.

    Raises:
        RuntimeError: another rank could not write.
    """
    io = strategy.checkpoint_io
    is_lightnings_own = is_lightnings(io, "TorchCheckpointIO") and type(io).__name__ == "TorchCheckpointIO"
    if "://" in str(filepath) or not (by_all or is_lightnings_own):
        yield filepath
        return
    path = Path(strategy.broadcast(str(filepath)) if by_all else filepath)
    # Nothing looks for this suffix.
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
    # Rank 0 first; then the first rank of each node that has a disk of its own.
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
        f"The checkpoint {path} was not written: another rank failed, and its own output says why. Nothing of it is "
        "left, and an earlier one of this name is as it was."
    )


def is_folder_of_shards(path: Any) -> bool:
    """True for what ``"thor_fsdp2"`` writes unless it is told to write one file."""
    return (Path(path) / METADATA).is_file()


def folder_advice(path: Any) -> str:
    """What to do with such a folder, for strategies that cannot read it."""
    return (
        f'The checkpoint {path} is a folder of shards, which only strategy="thor_fsdp2" reads, on any number of ranks. '
        "Resume with it; or let it write one file, which goes on with every strategy: "
        "Trainer(strategy=ThorModelParallelStrategy(save_distributed_checkpoint=False))."
    )


def weights_advice(path: Any) -> str:
    """What to do with a checkpoint of weights alone, in a fit."""
    load = "module.load_state_dict(torch.load(path)['state_dict'])"
    if is_folder_of_shards(path):
        load = "torch.distributed.checkpoint.load({'state_dict': module.state_dict()}, checkpoint_id=path)"
    return (
        f"The checkpoint {path} holds weights alone (ModelCheckpoint(save_weights_only=True)), from which a fit "
        f"cannot go on. Start a new one from them: {load}, and fit without ckpt_path."
    )


def _put(beside: Path, path: Path) -> None:
    """Rename the complete file or folder ``beside`` to ``path``."""
    if not path.is_symlink() and path.is_dir() and beside.is_file() and not (path / METADATA).is_file():
        raise IsADirectoryError(f"The checkpoint path exists and is a directory: {path}")
    if not (path.exists() or path.is_symlink()) or (beside.is_file() and not path.is_dir()):
        os.replace(beside, path)
        return
    if path.is_dir() and beside.is_dir() and not path.is_symlink():
        # The user may have other files in that folder.
        own = {METADATA, ".metadata", *(part.name for part in path.glob("*.distcp"))}
        for part in path.iterdir():
            if part.name not in own and part.is_dir() and not part.is_symlink():
                shutil.copytree(part, beside / part.name, symlinks=True, dirs_exist_ok=True)
            elif part.name not in own:
                shutil.copy2(part, beside / part.name, follow_symlinks=False)
    before = beside
    if not _exchange(beside, path):
        # Between these two renames there is no checkpoint of this name, if the process is killed just then.
        before = path.with_name(f"{path.name}.before")
        _remove(before)
        os.replace(path, before)
        os.replace(beside, path)
    _remove(before)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change their places at once, as only Linux can (renameat2(2)); False where that is impossible."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    done: int = renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)
    return done == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
