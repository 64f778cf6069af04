"""Laws of ThorMonitor: it changes nothing, one rank writes what it sees, and what it saw can be drawn."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from rich import get_console

from lightning_thor import ThorCallback, ThorMonitor, configure_thor
from lightning_thor.trainer import cli, pictures
from lightning_thor.trainer.pictures import log_pictures, pictures_of, read_looks, spectra_figure, takes_pictures
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, quiet, trainer
from tests.helpers.launching import fork, run_forked
from tests.helpers.sharded_workers import fully_shard

NAMES = ["net.0", "net.2", "net.4", "net.5", "net.7"]


def monitored(folder: Path, monitor: ThorMonitor | None = None, **options: Any) -> Any:
    """A trainer of 4 steps an epoch, with a refresh at every second one, and its monitor."""
    monitor = monitor or ThorMonitor(every_n_refreshes=2)
    defaults = {"logger": CSVLogger(folder, name="", version=""), "log_every_n_steps": 1, "max_epochs": 3}
    return trainer(folder, ThorCallback(update_every_n_steps=2, summary=False), monitor, **(defaults | options))


def looks_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "thor_monitor.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_look_is_what_the_curvature_is_then(tmp_path: Path) -> None:
    fit = monitored(tmp_path)
    fit.fit(Boring())
    looks = looks_of(tmp_path)
    # Refreshes are in steps 1, 3, 5, 7, 9 and 11: a look after the first, third and fifth, and one at the end.
    assert [look["step"] for look in looks] == [1, 5, 9, 12]
    assert [step for look in looks for step, _ in look["refreshes"]] == [1, 3, 5, 7, 9, 11]
    assert {share for look in looks for _, share in look["refreshes"]} == {1.0}
    curvature = callback_of(fit).curvature
    assert curvature is not None
    assert looks[-1]["layers"] == json.loads(json.dumps(curvature.figures()))
    assert list(looks[0]["layers"]) == NAMES
    assert [look["layers"]["net.0"]["inverted_at"] for look in looks] == [0, 4, 8, 10]
    # The last refresh was measured, as the monitor asks for all of them.
    assert curvature.changed_at == 10
    seconds = [look["seconds"] for look in looks]
    assert all(later[part] >= before[part] >= 0 for before, later in pairwise(seconds) for part in before)
    header = (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    figures = {f"thor/{figure}/{name}.G" for figure in ("trace", "condition", "effective_rank") for name in NAMES}
    assert figures | {f"thor/age/{name}" for name in NAMES} <= set(header)


def test_a_monitored_fit_is_bitwise_the_fit_without(tmp_path: Path) -> None:
    alone = trainer(tmp_path / "alone", max_epochs=3)
    alone.fit(Boring())
    watched = monitored(tmp_path / "watched", ThorMonitor(every_n_refreshes=1, progress_bar=True))
    watched.fit(Boring())
    assert_bitwise(everything(watched), everything(alone))
    assert {"update", "age"} <= watched.progress_bar_metrics.keys()
    assert watched.progress_bar_metrics["age"] == 1.0


def test_the_rich_progress_bar_shows_two_figures(tmp_path: Path) -> None:
    """On a terminal of its own, where the columns of Lightning's bar are drawn as on a screen."""
    screen, before = io.StringIO(), dict(vars(get_console()))
    bar = RichProgressBar(leave=True, console_kwargs={"file": screen, "force_terminal": True, "width": 200})
    callbacks = (ThorCallback(update_every_n_steps=2, summary=False), ThorMonitor(progress_bar=True), bar)
    try:
        fit = quiet(tmp_path, *callbacks, enable_progress_bar=True, log_every_n_steps=1, max_epochs=1)
        fit.fit(Boring())
    finally:
        vars(get_console()).update(before)  # the bar changes rich's global console
    drawn = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue())
    shown = [(float(update), float(age)) for update, age in re.findall(r"update: ([\d.]+)\s+age: ([\d.]+)", drawn)]
    metrics = fit.progress_bar_metrics
    assert shown[-1] == pytest.approx((metrics["update"], metrics["age"]), abs=5e-4)
    assert 0 < metrics["update"] < 1


def test_a_resumed_fit_goes_on_in_its_file_and_its_looks_count(tmp_path: Path) -> None:
    first = monitored(tmp_path, max_epochs=1)
    first.fit(Boring())
    first.save_checkpoint(tmp_path / "one.ckpt")
    monitored(tmp_path, max_epochs=3).fit(Boring(), ckpt_path=tmp_path / "one.ckpt")
    monitored(tmp_path, max_epochs=2).fit(Boring(), ckpt_path=tmp_path / "one.ckpt")
    assert [look["step"] for look in looks_of(tmp_path)] == [1, 4, 5, 9, 12, 5, 8]
    assert [look["step"] for look in read_looks(tmp_path)] == [1, 4, 5, 8]
    monitored(tmp_path, max_epochs=1).fit(Boring())
    assert [look["step"] for look in looks_of(tmp_path)] == [1, 4]


def test_a_second_fit_of_a_trainer_leaves_what_the_first_one_saw(tmp_path: Path) -> None:
    trainer = monitored(tmp_path, max_epochs=1)
    trainer.fit(Boring())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Boring())
    names = ["thor_monitor-1.jsonl", "thor_monitor.jsonl"]
    assert [path.name for path in sorted(next(tmp_path.rglob(names[0])).parent.glob("*.jsonl"))] == names


def test_a_line_that_was_cut_off_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    first, file = monitored(tmp_path, max_epochs=1), tmp_path / "thor_monitor.jsonl"
    first.fit(Boring())
    first.save_checkpoint(tmp_path / "one.ckpt")
    file.write_bytes(file.read_bytes()[:-40])
    assert [look["step"] for look in read_looks(tmp_path)] == [1]
    monitored(tmp_path, max_epochs=3).fit(Boring(), ckpt_path=tmp_path / "one.ckpt")
    assert [look["step"] for look in read_looks(tmp_path)] == [1, 5, 9, 12]


class Sharded(Boring):
    def configure_model(self) -> None:
        if self.trainer.state.fn == "fit":  # Lightning calls it again for a validation
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def rank(folder: Path, strategy: str) -> None:
    module = Sharded() if strategy == "thor_fsdp2" else Boring()
    fit = monitored(folder, devices=2, strategy=strategy, max_epochs=2)
    fit.fit(module)
    (metrics,) = fit.validate(module, module.data(), verbose=False)
    assert math.isfinite(metrics["val_loss"])


@pytest.mark.parametrize("strategy", ["thor_ddp", "thor_fsdp2"])
def test_two_ranks_have_one_file(strategy: str, tmp_path: Path) -> None:
    status, printed = run_forked(partial(fork, 2, partial(rank, tmp_path, strategy)))
    assert status == 0, printed[-6000:]
    looks = looks_of(tmp_path)
    assert [look["step"] for look in looks] == [1, 4]
    assert looks[-1]["seconds"]["communication"] > 0
    assert list(looks[-1]["layers"]) == NAMES


def test_it_needs_a_curvature_and_says_so(tmp_path: Path) -> None:
    class Plain(Boring):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="ThorMonitor found no curvature.*needs a ThorCallback"):
        quiet(tmp_path, ThorMonitor(), max_epochs=1).fit(Plain())
    assert list(tmp_path.iterdir()) == []
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="every_n_refreshes must be an int of at least 1"):
            ThorMonitor(every_n_refreshes=wrong)  # type: ignore[arg-type]


class Switching(Boring):
    """Gets a Thor for its second epoch alone."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_epoch_start(self) -> None:
        if self.trainer.current_epoch == 1:
            self.trainer.strategy.optimizers = [configure_thor(self)]
        elif self.trainer.current_epoch == 2:
            self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=0.1)]


def test_it_looks_at_a_thor_that_comes_later(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    callback = ThorCallback(update_every_n_steps=2, waits_for_thor=True, summary=False)
    quiet(tmp_path, callback, ThorMonitor(every_n_refreshes=2), max_epochs=3).fit(Switching())
    assert [look["step"] for look in looks_of(tmp_path)] == [1]
    assert not [one for one in recwarn if "ThorMonitor" in str(one.message)]
    quiet(tmp_path, callback, ThorMonitor(every_n_refreshes=2), max_epochs=2).fit(Switching())
    assert [look["step"] for look in looks_of(tmp_path)] == [1, 4]


# ── pictures ──


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    monitored(folder).fit(Boring())
    return folder


def test_the_command_draws_a_run(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("matplotlib.image", reason="pip install '.[plot]'")
    monkeypatch.setattr(sys, "argv", ["lightning-thor", "plot", str(run_dir)])
    cli.main()
    files = capsys.readouterr().out.split()
    assert files == [str(run_dir / f"thor_{name}.png") for name in ("layers", "spectra", "step")]
    assert all(image.imread(file).std() > 0.05 for file in files)
    monkeypatch.setattr(sys, "argv", ["lightning-thor", "plot", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"thor_monitor.jsonl does not exist. Trainer\(callbacks=.*ThorMonitor"):
        cli.main()


@pytest.mark.parametrize(
    ("file", "words"),
    [("thor_monitor.jsonl", "There are no looks in .*monitor.jsonl"), ("thor_split.json", "split.json is damaged")],
)
@pytest.mark.parametrize("content", ["", '{"step": 1, "la'])
def test_the_command_says_that_there_is_nothing_to_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, words: str, content: str
) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[plot]'")
    (tmp_path / file).write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["lightning-thor", "plot", str(tmp_path)])
    with pytest.raises(SystemExit, match=words):
        cli.main()


def test_a_folder_without_a_run_is_told_before_a_missing_matplotlib(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"thor_monitor\.jsonl does not exist"):
        pictures_of(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        pictures_of(run_dir)


def test_the_command_describes_the_folder_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-thor", "plot", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "run_dir folder of the logger's files, such as lightning_logs/version_0" in printed
    assert "Args:" not in printed


def test_a_chosen_block_size_is_drawn_without_a_monitor_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[plot]'")
    split = {"block_size": 16, "crossing": 12.0, "candidates": [1, 16, 20], "shares": [0.0, 0.5, 1.0]}
    split |= {"seconds": [1.0, 2.0, 4.0], "n_factors": 4, "left_out": {}, "device": "cpu", "speeds": [1.0, 0.5, 0.25]}
    (tmp_path / "thor_split.json").write_text(json.dumps(split), encoding="utf-8")
    assert list(pictures_of(tmp_path)) == ["split"]


def test_pictures_show_many_layers_kept_ones_and_what_blocks_lose(run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[plot]'")
    look = looks_of(run_dir)[-1]
    layer = look["layers"]["net.4"]
    layer["A"]["outside"] = {"16": 0.3, "32": 0.1}

    def drawn(stopped: bool | None) -> dict[str, Any]:
        many = {f"block.{n}.linear": {**layer, "stopped": stopped} for n in range(10)}
        looks = [{**look, "step": step, "layers": many} for step in (20, 30)]
        (tmp_path / "thor_monitor.jsonl").write_text("\n".join(map(json.dumps, looks)), encoding="utf-8")
        return {name: picture.get_suptitle() for name, picture in pictures_of(tmp_path).items()}

    titles = drawn(stopped=False)
    assert titles["layers"] == "Curvature of 10 layers; ○ kept, × stopped by the trace rule"
    assert "what diagonal blocks would lose" in titles["spectra"]
    layer["A"]["is_partitioned"] = True
    titles = drawn(stopped=None)
    assert titles["layers"] == "Curvature of 10 layers"
    assert "is not stored: block_size=None" in titles["spectra"]


def test_no_two_ranks_of_narrow_factors_are_written_over_each_other(run_dir: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[plot]'")
    looks = looks_of(run_dir)
    looks[-1]["layers"]["net.4"]["A"]["outside"] = {"16": 0.3, "32": 0.1}
    figure = spectra_figure(looks)
    figure.draw_without_rendering()
    for axes in figure.axes:
        ticks = [*axes.get_xticklabels(which="major"), *axes.get_xticklabels(which="minor")]
        boxes = sorted((one.get_window_extent() for one in ticks if one.get_text()), key=lambda box: box.x0)
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), axes.get_title(loc="left")
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "fits into one block" in texts


class Recorder(Logger):
    """A logger that keeps the pictures that are given to it, or to its ``experiment``."""

    name, version, run_id, save_dir, log_dir, experiment = "fake", 0, "run 7", None, None, None

    def __init__(self) -> None:
        Logger.__init__(self)
        self.calls: list[tuple[Any, ...]] = []
        self.experiment = SimpleNamespace(add_figure=self._add_figure, log_figure=self._log_figure)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...

    def log_graph(self, model: Any, input_array: Any = None) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None: ...

    def _add_figure(self, tag: str, figure: Any, global_step: int | None = None, close: bool = True) -> None:
        self.calls.append((tag, type(figure).__name__, global_step))

    def _log_figure(self, run_id: str, figure: Any, artifact_file: str) -> None:
        self.calls.append((run_id, type(figure).__name__, artifact_file))

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append((key, [type(image).__name__ for image in images], step))


def fake(kind: type[Logger]) -> Any:
    """A `Recorder` that is an instance of one of Lightning's loggers too."""
    return type(kind.__name__, (Recorder, kind), {})()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (TensorBoardLogger, [("thor/layers", "Figure", 12)]),
        (MLFlowLogger, [("run 7", "Figure", "thor/layers.png")]),
        (WandbLogger, [("thor/layers", ["Figure"], 12)]),
    ],
)
def test_loggers_get_pictures_in_their_own_way(kind: type[Logger], expected: list[Any]) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="pip install '.[plot]'").Figure()
    logger = fake(kind)
    assert takes_pictures(logger)
    log_pictures([logger], {"layers": figure}, 12)
    assert logger.calls == expected


class Bare(Logger):
    """What Lightning's documentation shows of a logger of one's own: it has no ``experiment``."""

    name, version = "bare", "0.1"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...


@pytest.mark.parametrize("logger", [Bare(), Recorder(), fake(CometLogger)])
def test_a_logger_of_another_kind_gets_no_pictures(tmp_path: Path, logger: Any) -> None:
    """Whatever its ``experiment`` can do: Comet's has a ``log_figure`` with other arguments than MLflow's."""
    monitored(tmp_path, max_epochs=1, logger=logger).fit(Boring())
    assert not getattr(logger, "calls", [])


def test_pictures_that_fail_are_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[plot]'")
    logger = fake(TensorBoardLogger)
    logger.experiment = None
    with pytest.warns(UserWarning, match=r"pictures did not get to the loggers .AttributeError: .*lightning-thor plot"):
        monitored(tmp_path, max_epochs=1, logger=logger).fit(Boring())


def test_a_fit_gives_pictures_to_those_of_its_loggers_that_take_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[plot]'")
    takes, other = fake(TensorBoardLogger), CSVLogger(tmp_path, name="", version="")
    assert not takes_pictures(other)
    monitored(tmp_path, max_epochs=1, logger=[other, takes]).fit(Boring())
    assert [(tag, step) for tag, _, step in takes.calls] == [("thor/layers", 4), ("thor/spectra", 4), ("thor/step", 4)]


class Writer:
    """What TensorBoardLogger calls of a SummaryWriter; it draws figures as that does."""

    def __init__(self) -> None:
        self.scalars: set[str] = set()
        self.images: dict[str, tuple[Any, int | None]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        float(scalar_value)
        self.scalars.add(tag)

    def add_figure(self, tag: str, figure: Any, global_step: int | None = None, close: bool = True) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.images[tag] = (numpy.asarray(canvas.buffer_rgba()), global_step)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_tensorboards_logger_gets_figures_and_pictures_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's own logger, whose writer alone is made up."""
    pytest.importorskip("matplotlib", reason="pip install '.[plot]'")
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", True)
    logger, writer = TensorBoardLogger(tmp_path, name="", version=""), Writer()
    logger._experiment = writer  # type: ignore[assignment]
    monitored(tmp_path, max_epochs=1, logger=logger).fit(Boring())
    assert set(writer.images) == {"thor/layers", "thor/spectra", "thor/step"}
    for image, step in writer.images.values():
        assert image.shape[2] == 4
        assert image.std() > 10
        assert step == 4
    assert {"thor/trace/net.0.A", "thor/update_to_weights", "thor/time_in_inversion"} <= writer.scalars


def test_tensorboard_gets_figures_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install '.[plot]'")
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="pip install tensorboard",
    )
    monitored(tmp_path, max_epochs=1, logger=TensorBoardLogger(tmp_path, name="", version="")).fit(Boring())
    accumulator = accumulators.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    tags = accumulator.Tags()
    assert set(tags["images"]) == {"thor/layers", "thor/spectra", "thor/step"}
    assert {"thor/trace/net.0.A", "thor/update_to_weights", "thor/time_in_inversion"} <= set(tags["scalars"])
