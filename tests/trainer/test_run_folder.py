"""Laws of the folder of a run's files: it is that of Lightning's checkpoints, and no other run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_thor import ThorCallback, ThorMonitor
from lightning_thor.trainer.pictures import read_looks
from tests.helpers.boring import Boring, trainer

FILES = {"thor_monitor.jsonl", "thor_split.json"}


class OfOneFolder(Logger):
    """As Weights & Biases' and MLflow's, all of whose runs have one ``save_dir`` and no ``log_dir``."""

    name, version, save_dir = "mine", None, None

    def __init__(self, version: str | int, save_dir: Path | None = None) -> None:
        super().__init__()
        self.version, self.save_dir = version, save_dir

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...


def fit(folder: Path | str, **options: Any) -> Any:
    callbacks = ThorCallback(block_size="auto"), ThorMonitor()
    found = trainer(folder, *callbacks, max_epochs=1, **options)  # type: ignore[arg-type]
    found.fit(Boring())
    return found


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(".png")}


@pytest.mark.parametrize("save_dir", [None, "runs"])
def test_runs_of_one_logger_have_a_folder_each_beside_their_checkpoints(tmp_path: Path, save_dir: str | None) -> None:
    for version in ("first", 2):
        logger = OfOneFolder(version, None if save_dir is None else tmp_path / save_dir)
        found = fit(tmp_path, logger=logger, enable_checkpointing=True)
        checkpoint = found.checkpoint_callback
        assert isinstance(checkpoint, ModelCheckpoint)
        folder = Path(checkpoint.dirpath or "").parent
        assert folder == tmp_path / (save_dir or "") / "mine" / ("first" if version == "first" else "version_2")
        assert files_in(folder) == FILES
    first = tmp_path / (save_dir or "") / "mine" / "first"
    assert files_in(first) == FILES
    assert [look["step"] for look in read_looks(first)] == [1, 4]


def test_without_a_logger_it_is_the_root(tmp_path: Path) -> None:
    fit(tmp_path)
    assert files_in(tmp_path) == FILES


def test_a_remote_folder_becomes_no_local_one_and_loggers_get_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = OfOneFolder("v", Path("unused"))
    logger.save_dir = "memory://bucket"  # type: ignore[assignment]
    logged: set[str] = set()
    monkeypatch.setattr(OfOneFolder, "log_metrics", lambda self, metrics, step=None: logged.update(metrics))
    with pytest.warns(UserWarning, match="local folders alone, and memory://bucket/mine/v is none"):
        fit("memory://bucket", logger=logger)
    assert list(tmp_path.iterdir()) == []
    assert "thor/trace/net.0.A" in logged


def test_a_trial_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, logger=CSVLogger(tmp_path), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_ends_no_fit(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.warns(UserWarning, match="block size was chosen was not saved in .*Error"),
        pytest.warns(UserWarning, match="ThorMonitor cannot write"),
    ):
        found = fit(tmp_path / "file" / "folder", enable_checkpointing=False)
    assert found.state.finished
