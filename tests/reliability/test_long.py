"""Laws of long trainings: nothing grows, and no step gets slower (run by ``make soak``)."""

from __future__ import annotations

import io
import os
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers.boring import Boring, callback_of, trainer
from tests.helpers.open_files import open_files

pytestmark = pytest.mark.soak
STEPS = int(os.environ.get("LIGHTNING_THOR_SOAK_STEPS", "20000"))
LOOKS = 10


class Watched(L.Callback):
    """Notes, at ten places of the training, what could grow."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.rss: list[int] = []
        self.checkpoint: list[int] = []
        self.hooks: list[int] = []
        self.files: list[int] = []
        self.seconds: list[float] = []
        self._times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.thread_time()  # of this process alone: others may be busy

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._times.append(time.thread_time() - self._start)
        if trainer.global_step % (STEPS // LOOKS):
            return
        self.seconds.append(statistics.median(self._times))
        self._times.clear()
        file = io.BytesIO()
        torch.save(trainer._checkpoint_connector.dump_checkpoint(), file)
        self.checkpoint.append(file.tell())
        self.hooks.append(sum(len(one._forward_hooks) for one in pl_module.modules()))
        self.files.append(open_files())
        self.rss.append(self.process.memory_info().rss)


class Endless(Boring):
    """One epoch of all its steps, on one batch."""

    def train_dataloader(self) -> Any:
        batch = next(iter(super().train_dataloader()))
        return DataLoader([batch] * STEPS, batch_size=None)


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
def test_nothing_grows_and_no_step_gets_slower(tmp_path: Path, mode: str) -> None:
    psutil = pytest.importorskip("psutil", reason="pip install psutil")
    watched = Watched(psutil.Process())
    found = trainer(tmp_path, watched, max_epochs=1, limit_val_batches=0)
    found.fit(Endless(mode=mode, lr=1e-3))
    print(f"{mode}: RSS {watched.rss}, checkpoint {watched.checkpoint}, seconds {watched.seconds}")
    assert found.global_step == STEPS
    curvature = callback_of(found).curvature
    factors = curvature.factors
    assert curvature.step == STEPS
    assert (float(factors.failed_inversions.sum()), float(factors.rejected_windows.sum())) == (0, 0)
    assert len(watched.rss) == LOOKS
    assert max(watched.rss[2:]) < 1.01 * watched.rss[1]  # the first tenth warms up
    assert statistics.mean(watched.seconds[-3:]) < 1.1 * statistics.mean(watched.seconds[1:4])
    assert max(watched.checkpoint) - min(watched.checkpoint) <= 256  # counters have more digits
    assert len(set(watched.hooks)) == 1
    assert len(set(watched.files)) == 1
    assert not any(one._forward_hooks for one in found.lightning_module.modules())
