"""Laws of full disks: a checkpoint that could not be written is not there, and the one before it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_thor import ThorDDPStrategy, ThorModelParallelStrategy
from tests.helpers.boring import trainer
from tests.helpers.distributed_workers import ROWS
from tests.helpers.full_disks import SavesOntoAFullDisk, full_disk
from tests.helpers.marks import marked
from tests.helpers.sharded_workers import LONG, Sharded, ranks

pytestmark = pytest.mark.usefixtures("clean_process")


def run(folder: Path, strategy: Any, *callbacks: Any) -> Any:
    module = Sharded((ROWS,), dtype=torch.float32)
    found = trainer(folder, *callbacks, strategy=strategy, max_epochs=1, enable_checkpointing=True)
    found.fit(module)
    return found


STRATEGIES: dict[str, Any] = {
    "single device": (lambda: "auto", {}, "temporary"),
    "ddp": (ThorDDPStrategy, {}, "file"),
    "one file": (ThorModelParallelStrategy, {"save_distributed_checkpoint": False}, "file"),
    "shards": (ThorModelParallelStrategy, {}, "shards"),
    "metadata": (ThorModelParallelStrategy, {}, "metadata"),
}


@pytest.mark.parametrize("sound_first", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_onto_a_full_disk_leaves_the_one_before_or_none(
    name: str, sound_first: bool, tmp_path: Path
) -> None:
    strategy, options, when = STRATEGIES[name]
    saver = SavesOntoAFullDisk(tmp_path / "own", when, sound_first=sound_first)
    run(tmp_path, strategy(**options), saver)
    assert "No space left on device" in saver.error
    first = 1 if sound_first else None
    assert saver.step_of_last == [first, first, 3, 3]
    assert saver.found == [[] if step is None else ["last.ckpt"] for step in saver.step_of_last]
    assert (tmp_path / "own" / "last.ckpt").is_dir() == (when in ("shards", "metadata"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_last_is_not_what_a_full_disk_left(name: str, tmp_path: Path) -> None:
    """Of a ModelCheckpoint that saves in the middle of a fit, which ends with the error."""
    strategy, options, when = STRATEGIES[name]
    saver = ModelCheckpoint(tmp_path / "own", save_last=True, save_top_k=0, every_n_train_steps=2)
    with pytest.raises(BaseException, match="No space left on device"), full_disk(when):
        run(tmp_path, strategy(**options), saver)
    found = trainer(tmp_path, ModelCheckpoint(tmp_path / "own", save_last=True), enable_checkpointing=True)
    (last,) = (one for one in found.checkpoint_callbacks if isinstance(one, ModelCheckpoint))
    assert last._find_last_checkpoints(found) == set()


def test_a_folder_with_other_things_in_it_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "own" / "last.ckpt").mkdir(parents=True)
    (tmp_path / "own" / "last.ckpt" / "notes.txt").write_text("mine", encoding="utf-8")
    saver = SavesOntoAFullDisk(tmp_path / "own", "shards")
    run(tmp_path, ThorModelParallelStrategy(), saver)
    assert saver.step_of_last == [1, 1, 3, 3]
    assert (tmp_path / "own" / "last.ckpt" / "meta.pt").is_file()
    assert (tmp_path / "own" / "last.ckpt" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_file_takes_the_place_of_a_folder_of_shards_and_back_but_of_no_other_folder(tmp_path: Path) -> None:
    path = tmp_path / "own" / "last.ckpt"
    for options, is_dir in ({}, True), ({"save_distributed_checkpoint": False}, False), ({}, True):
        run(tmp_path, ThorModelParallelStrategy(**options)).save_checkpoint(path)
        assert path.is_dir() == is_dir
        dist.destroy_process_group()
    (path / "meta.pt").unlink()
    with pytest.raises(IsADirectoryError, match="exists and is a directory"):
        run(tmp_path, ThorModelParallelStrategy(save_distributed_checkpoint=False)).save_checkpoint(path)
    assert sorted(one.name for one in path.parent.iterdir()) == ["last.ckpt"]


@pytest.mark.parametrize(
    "name", marked(["full_disk_of_shards", "full_disk_of_metadata", "full_disk_of_the_last_rank"], LONG)
)
def test_all_ranks_raise_and_go_on_with_the_checkpoint_before(name: str) -> None:
    for result in ranks(name):
        assert result["error"] is not None
        assert result["found"] == [["last.ckpt"]] * 4
        assert result["step_of_last"] == [1, 1, 3, 3]


@pytest.mark.parametrize("name", marked(["full_disk_of_one_file", "full_disk_of_ddp"], LONG))
def test_a_rank_that_did_not_write_raises_too(name: str) -> None:
    first, second = ranks(name)
    assert "No space left on device" in first["error"]
    assert "another rank failed, and its own output says why" in second["error"]
    for result in (first, second):
        assert result["step_of_last"] == [1, 1, 3, 3]
