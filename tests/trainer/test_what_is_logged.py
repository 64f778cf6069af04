"""Laws of the figures of a fit: what is logged is what happened, and what is printed at the end suggests what to do."""

from __future__ import annotations

import csv
import math
import os
import re
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, ThorCallback, ThorDDPStrategy, ThorMonitor
from lightning_thor.curvature.part_timer import OWN_PARTS, PartTimer
from lightning_thor.trainer.figures import StepFigures, sample_weights
from lightning_thor.trainer.fit_log import FitFigures, fit_report
from tests.helpers.boring import Boring, callback_of, trainer
from tests.helpers.launching import fork, run_forked
from tests.helpers.watch import Watch


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
    fit = trainer(tmp_path, ThorCallback(update_every_n_steps=2, summary=False), **options)
    fit.fit(module)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["thor/refreshes"]]

    def column(name: str) -> list[float]:
        return [float(row[f"thor/{name}"]) for row in rows]

    assert column("refreshes") == [1, 1, 2, 2]
    assert column("inverse_age") == [0, 1, 0, 1]
    assert column("damping") == pytest.approx([0.2] * 4)
    assert column("update_to_weights") == pytest.approx(module.ratios, rel=1e-4)
    # Of the one refresh that changed something, and as of then.
    curvature = callback_of(fit).curvature
    assert curvature is not None
    logarithms = [math.log(change) for change in curvature.factor_change.flatten().tolist() if not math.isnan(change)]
    assert [row["thor/factor_change"] != "" for row in rows] == [False, False, True, True]
    assert float(rows[3]["thor/factor_change"]) == pytest.approx(math.exp(sum(logarithms) / len(logarithms)))
    shares = {part: column(f"time_in_{part}") for part in OWN_PARTS}
    assert all(0 < sum(each) < 1 for each in zip(*shares.values(), strict=True))
    assert [share > 0 for share in shares["inversion"]] == [True, False, True, False]
    assert shares["communication"] == [0] * 4


def test_factors_that_were_0_and_those_that_no_refresh_changed_are_no_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head that starts at 0 hides the layers behind it from the first loss; a trace rule may keep all layers."""
    for name, rule, told in (("zeros", None, True), ("kept", (1e9, 0.0), False)):
        module = Boring()
        if name == "zeros":
            nn.init.zeros_(module.net.get_parameter("7.weight"))
        callback = ThorCallback(update_every_n_steps=1, trace_rule=rule, summary=True)
        options = {"logger": CSVLogger(tmp_path, name="", version=name), "log_every_n_steps": 1, "max_epochs": 1}
        trainer(tmp_path, callback, enable_progress_bar=True, **options).fit(module)
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            logged = [float(row["thor/factor_change"]) for row in csv.DictReader(file) if row["thor/factor_change"]]
        assert len(logged) == 3
        assert all(0 < change < 10 for change in logged) if told else logged == [0, 0, 0]
        printed = " ".join(capsys.readouterr().out.split())
        found = re.search(r"a refresh the factors by (\S+)%", printed)
        assert (found is not None and 0 < float(found[1]) < 1000) if told else found is None


def rank_with_its_own_logger(folder: Path) -> None:
    logger = CSVLogger(folder, name="", version="") if os.environ["RANK"] == "0" else False
    callback = ThorCallback(update_every_n_steps=2, trace_rule="THOR", summary=False)
    strategy = ThorDDPStrategy(timeout=timedelta(seconds=20))
    options = {"logger": logger, "log_every_n_steps": 1, "devices": 2, "strategy": strategy}
    trainer(folder, callback, **options).fit(Boring())


def test_a_rank_without_a_logger_waits_for_no_other(tmp_path: Path) -> None:
    status, words = run_forked(partial(fork, 2, partial(rank_with_its_own_logger, tmp_path)))
    assert status == 0, words
    assert "self.log('thor/" not in words  # Lightning's advice to add sync_dist=True
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["thor/failed_inversions"]]
    assert [float(row["thor/failed_inversions"]) for row in rows] == [0, 0]
    assert all(float(row["thor/refreshed_share"]) > 0 for row in rows)


def test_figures_of_a_step_wait_for_nothing() -> None:
    model = Boring()
    curvature = Curvature(model, update_every_n_steps=1)
    curvature.timer = PartTimer(torch.device("cpu"))
    figures = StepFigures()
    curvature.measures_change = True
    for step in range(4):
        with Watch() as watch:
            curvature.timer.begin_step()
            model(torch.randn(2, 1, 8, 8)).square().mean().backward()
            curvature.update()
            curvature.timer.end_step()
            logged = figures.of_step(curvature, torch.tensor(0.5))
        assert not watch.waiting, watch.waiting
        assert ("thor/factor_change" in logged) == (step > 0)
    assert figures.of_fit([curvature])["update_ratio"] == 0.5


@pytest.mark.parametrize(("averaging", "few"), [(0.0, ("net.4", "net.7")), (0.9, ())])
def test_rows_are_few_if_an_average_stands_for_fewer_than_a_block_has(averaging: float, few: tuple[str, ...]) -> None:
    """Linear layers have 6 rows, and blocks of up to 36; a convolution has a row at each of its positions."""
    model = Boring()
    curvature = Curvature(model, update_every_n_steps=1, averaging=averaging, block_size=36)
    curvature.measures_change = True
    for _ in range(2):
        model(torch.randn(6, 1, 8, 8)).square().mean().backward()
        curvature.update()
    assert StepFigures().of_fit([curvature])["few_rows"] == few


def seconds(rest: float, refresh: float) -> dict[str, float]:
    return {"rest": rest, "directions": 0.0, "statistics": refresh, "inversion": refresh, "communication": 0.0}


@pytest.mark.parametrize(("progress", "speaks"), [(True, True), (False, False)])
def test_the_end_of_a_fit_is_reported_where_progress_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool, speaks: bool
) -> None:
    options = {"enable_progress_bar": progress, "enable_model_summary": True, "max_epochs": 1}
    trainer(tmp_path, ThorCallback(update_every_n_steps=2), **options).fit(Boring())
    printed = " ".join(capsys.readouterr().out.split())
    assert ("THOR after 4 steps: each layer was refreshed 2 times; 0 inversions failed" in printed) == speaks
    assert bool(re.search(r"Of [\d.]+ s in its steps: [\d.]+% directions, [\d.]+% statistics", printed)) == speaks


class ChangesItsInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


@pytest.mark.parametrize("is_called", [True, False])
def test_only_a_layer_that_was_not_called_is_told_to_be_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_called: bool
) -> None:
    """One whose pairs did not fit was, and a warning has said what to do."""
    module = Boring()
    if is_called:
        module.net[4] = ChangesItsInput(36, 16)
    else:
        module.unused = nn.Linear(36, 16)
    options = {"enable_progress_bar": True, "enable_model_summary": True, "max_epochs": 1}
    with pytest.warns(UserWarning, match="without curvature from now on" if is_called else "was not called"):
        trainer(tmp_path, ThorCallback(update_every_n_steps=2), **options).fit(module)
    assert ("Never observed" in capsys.readouterr().out) != is_called


def test_a_run_that_was_finished_has_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All steps of its checkpoint were of another fit."""
    options = {"enable_progress_bar": True, "enable_model_summary": True, "max_epochs": 1}
    callback, monitor = ThorCallback(update_every_n_steps=2), ThorMonitor()
    found = trainer(tmp_path, callback, monitor, **options)
    found.fit(Boring())
    found.save_checkpoint(tmp_path / "one.ckpt")
    saw = (tmp_path / "thor_monitor.jsonl").read_text(encoding="utf-8")
    capsys.readouterr()
    trainer(tmp_path, callback, monitor, **options).fit(Boring(), ckpt_path=tmp_path / "one.ckpt")
    printed = capsys.readouterr()
    assert "THOR curvature" in printed.out
    assert "THOR after" not in printed.out
    assert "What ThorMonitor saw" not in printed.err
    assert (tmp_path / "thor_monitor.jsonl").read_text(encoding="utf-8") == saw


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50), None),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, n_failed=3), "raise damping"),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, n_rejected=3), "overflows"),
        (FitFigures(n_steps=100, n_refreshes=10, n_possible=10), "Lower update_every_n_steps"),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, update_ratio=0.5), "lower lr"),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, idle=("a.0", "a.1")), "Never observed.*a.0–1"),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, factor_change=0.2), None),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, factor_change=0.6), "by 60%: lower update_every"),
        (
            FitFigures(n_steps=100, n_refreshes=50, n_possible=50, few_rows=("a.0", "a.1")),
            "Too few rows.*: a.0–1. Lower",
        ),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, seconds=seconds(6, 1)), None),
        (FitFigures(n_steps=100, n_refreshes=50, n_possible=50, seconds=seconds(1, 1)), "took 67% of the time: raise"),
        # The default interval refreshes often at first.
        (FitFigures(n_steps=99, n_refreshes=50, n_possible=50, seconds=seconds(1, 1)), None),
    ],
)
def test_advice_is_given_where_a_figure_suggests_one(figures: FitFigures, words: str | None) -> None:
    lines = fit_report(figures, n_layers=10).renderables
    advice = lines[1 if figures.seconds is None else 2 :]
    assert len(advice) == (words is not None)
    assert words is None or re.search(words, str(advice[0]))


def test_parameters_without_entries_here_are_not_sampled() -> None:
    """As on a rank whose shards are all empty."""
    empty, some = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))
    assert list(sample_weights(Thor([empty, some]))) == [some]
    assert not sample_weights(Thor([empty]))
