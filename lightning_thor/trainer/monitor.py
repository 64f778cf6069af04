"""ThorMonitor: looks at the curvature of each layer now and then, and writes down what it sees."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.trainer.figures import seconds_of
from lightning_thor.trainer.pictures import FILE, Look, log_pictures, pictures_of, takes_pictures
from lightning_thor.trainer.thors import callbacks_of, run_folder

ON_BAR = {"update": "thor/update_to_weights", "age": "thor/inverse_age"}
"""The figures that the progress bar can show, by the names that it has room for."""
LOGGED = ("trace", "condition", "effective_rank", "change")
"""Of each factor."""


class ThorMonitor(Callback):
    """Looks at the curvature of each layer now and then; use it beside `ThorCallback`.

    A look writes one line of JSON into ``thor_monitor.jsonl`` in the folder of the first logger's files, beside
    Lightning's ``checkpoints`` (without a logger in ``default_root_dir``; not into a remote folder, nor with
    ``fast_dev_run``): traces, condition numbers, effective ranks and some eigenvalues of A and G, by how much the last
    refresh changed them, which layers the trace rule kept or stopped, the refreshes since the last look, and the time
    of each part of a step. ``lightning-thor plot FOLDER`` draws these. A look takes about as long as some refreshes; it
    waits for the device. Only rank 0 looks.

    The loggers get, as ``thor/trace/<layer>.A`` and so on: ``trace``, the damped ``condition`` number,
    ``effective_rank`` and ``change`` of each factor; and the pictures at the end of the fit, if they are TensorBoard,
    Weights & Biases or MLflow and matplotlib is installed. With this callback the time of the parts of a step is
    measured on a GPU too.

    Args:
        every_n_refreshes: refreshes of a layer, on average, from one look to the next. It looks after the first one and
            at the end of the fit too.
        progress_bar: show ``thor/update_to_weights`` and ``thor/inverse_age`` in the progress bar, as ``update`` and
            ``age``, of the last step that was logged.

    Raises:
        ValueError: ``every_n_refreshes`` is not a whole number of at least 1.
    """

    def __init__(self, *, every_n_refreshes: int = 10, progress_bar: bool = False) -> None:
        super().__init__()
        if type(every_n_refreshes) is not int or every_n_refreshes < 1:
            raise ValueError(f"every_n_refreshes must be an int of at least 1, got {every_n_refreshes!r}.")
        self.every_n_refreshes, self.progress_bar = every_n_refreshes, progress_bar
        self.path: Path | None = None
        """Of the file of the present or last fit; None where none is written."""
        self._is_looking = False
        self._refreshes: list[tuple[int, float]] = []
        """Since the last look: steps, and the share of the layers that were refreshed there."""
        self._done, self._n_steps = 0, 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_looking = False
        folder = run_folder(trainer) if trainer.is_global_zero else None
        self.path = None if folder is None else folder / FILE

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        curvatures = curvatures_of(trainer)
        # A ThorCallback may get its first Thor later.
        if not curvatures and not any(one.state_key == "ThorCallback" for one in callbacks_of(trainer)):
            rank_zero_warn(
                "ThorMonitor found no curvature to look at: Trainer(callbacks=...) needs a ThorCallback too."
            )
            return
        self._is_looking = trainer.is_global_zero
        if not self._is_looking:
            return
        self._refreshes, self._done, self._n_steps = [], sum(one.refreshes[0] for one in curvatures), _step(curvatures)
        # A resumed fit goes on in its file, if it has the same folder.
        is_resumed = self._n_steps > 0 if curvatures else trainer.global_step > 0
        if self.path is not None and not is_resumed and self.path.exists():
            if trainer.global_step:  # a second fit in the folder of the first
                _move_away(self.path)
            else:
                self.path.unlink()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._is_looking:
            for curvature in curvatures_of(trainer):
                curvature.measures_change = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_looking:
            return
        curvatures = curvatures_of(trainer)
        done, n_layers = sum(one.refreshes[0] for one in curvatures), sum(len(one.layers) for one in curvatures)
        if done == self._done or not n_layers:
            return
        self._refreshes.append((_step(curvatures), (done - self._done) / n_layers))
        # Rounded up, so that the first refresh has a look.
        every = self.every_n_refreshes * n_layers
        looks, self._done = -(-done // every) > -(-self._done // every), done
        if looks:
            self._look(trainer, curvatures)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._is_looking:
            return
        curvatures = curvatures_of(trainer)
        if self._refreshes and curvatures:  # none where another optimizer came after the Thor
            self._look(trainer, curvatures)
        if self.path is None or not self.path.exists():
            return
        takers = [logger for logger in trainer.loggers if takes_pictures(logger)]
        try:
            if takers:
                log_pictures(takers, pictures_of(self.path.parent), trainer.global_step)
        except Exception as error:  # of matplotlib, or of any logger
            rank_zero_warn(
                f"ThorMonitor's pictures did not get to the loggers ({type(error).__name__}: {error}). What it saw is "
                f"in {self.path}: lightning-thor plot {self.path.parent} draws it."
            )
        if trainer.progress_bar_callback is not None:
            rank_zero_info(f"What ThorMonitor saw is in {self.path}: lightning-thor plot {self.path.parent} draws it.")

    def _look(self, trainer: pl.Trainer, curvatures: list[Curvature]) -> None:
        layers = {name: figures for one in curvatures for name, figures in one.figures().items()}
        step, refreshes, self._refreshes = _step(curvatures), self._refreshes, []
        look = {"step": step, "refreshes": refreshes, "seconds": seconds_of(curvatures), "layers": layers}
        if self.path is not None:
            try:
                _write(look, self.path)
            except OSError as error:
                rank_zero_warn(f"ThorMonitor cannot write {self.path} ({error}) and looks no more in this fit.")
                self.path, self._is_looking = None, False
        figures = {
            f"thor/{figure}/{name}.{side}": layer[side][figure]
            for name, layer in layers.items()
            for side in ("A", "G")
            for figure in LOGGED
            if side in layer and layer[side][figure] is not None
        }
        figures |= {f"thor/age/{name}": layer["step"] - 1 - layer["inverted_at"] for name, layer in layers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _write(look: Look, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        line = json.dumps(look, allow_nan=False).encode() + b"\n"
        # A run that was killed may have left a line without an end.
        is_cut = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" + line if is_cut else line)


def _move_away(path: Path) -> None:
    """Number a file: ``name-1.suffix``, or the next number that is free."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
    path.rename(next(name for name in names if not name.exists()))


def curvatures_of(trainer: pl.Trainer) -> list[Curvature]:
    """The curvatures of the trainer's `Thor` optimizers, during fit."""
    found = (getattr(optimizer, "preconditioner", None) for optimizer in trainer.optimizers)
    own = (getattr(one, "curvature", one) for one in found)  # of sharded parameters
    return [one for one in own if isinstance(one, Curvature)]


def _step(curvatures: list[Curvature]) -> int:
    return max((one.step for one in curvatures), default=0)
