"""Laws of the figures of a fit: what is logged is what happened, and what is printed at the end suggests what to do."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_thor import ThorCallback
from lightning_thor.trainer.fit_report import FitFigures, fit_report
from tests.helpers.boring import Boring, trainer


class Watching(Boring):
    """Notes by how much each step moves the weights; all of its tensors are small enough to be looked at whole."""

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.before, self.ratios = self.flat(), getattr(self, "ratios", [])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ratios.append(float((self.flat() - self.before).norm() / self.before.norm()))


def test_what_is_logged_is_what_happened(tmp_path: Path) -> None:
    module = Watching()
    options = {"logger": CSVLogger(tmp_path, name="", version=""), "log_every_n_steps": 1, "max_epochs": 1}
    trainer(tmp_path, ThorCallback(update_every_n_steps=2, summary=False), **options).fit(module)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["thor/refreshes"]]

    def column(name: str) -> list[float]:
        return [float(row[f"thor/{name}"]) for row in rows]

    assert column("refreshes") == [1, 1, 2, 2]
    assert column("inverse_age") == [0, 1, 0, 1]
    assert column("damping") == pytest.approx([0.2] * 4)
    assert column("update_to_weights") == pytest.approx(module.ratios, rel=1e-4)


@pytest.mark.parametrize(("progress", "speaks"), [(True, True), (False, False)])
def test_the_end_of_a_fit_is_reported_where_progress_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool, speaks: bool
) -> None:
    options = {"enable_progress_bar": progress, "enable_model_summary": True, "max_epochs": 1}
    trainer(tmp_path, ThorCallback(update_every_n_steps=2), **options).fit(Boring())
    printed = " ".join(capsys.readouterr().out.split())
    assert ("THOR after 4 steps: each layer was refreshed 2 times; 0 inversions failed" in printed) == speaks


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50), None),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, n_failed=3), "raise damping"),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, n_rejected=3), "overflows"),
        (FitFigures(n_steps=100, n_refreshes=10, n_possible=10), "Lower update_every_n_steps"),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, update_ratio=0.5), "lower lr"),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, idle=("a.0", "a.1")), "Never observed.*a.0–1"),
    ],
)
def test_advice_is_given_where_a_figure_suggests_one(figures: FitFigures, words: str | None) -> None:
    _, *advice = fit_report(figures, n_layers=10).renderables
    assert len(advice) == (words is not None)
    assert words is None or re.search(words, str(advice[0]))
