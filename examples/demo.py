"""THOR, momentum SGD, AdamW and Muon side by side: ``make demo``, or ``python -m examples.demo``.

On handwritten digits all train the same network from the same initial weights on the same batches, each through a
Lightning Trainer, for the same number of epochs, under the same one-cycle schedule; on Burgers' equation they train a
physics-informed network for equally many seconds (`examples.pinn`). It prints tables, whoever wins, and writes
``curves.png``, ``pinn.png`` and ``figures.json``.

How the peak learning rates in ``RECIPES`` were chosen: ``--tune`` tries six per optimizer, each twice the one before,
on the same two seeds, and scores a rate by the validation accuracy averaged over the whole training (being good early
counts, and so does being good in the end). Tuning uses seeds and a train/validation split that the demo does not use.
Muon's rate is AdamW's, whose steps have the same size, and was not tuned yet. All else stays at each optimizer's
defaults; the momentum of SGD, which has none by default, is 0.9 like THOR's. The rates for Burgers' equation are those
of `examples.pinn`: THOR's default; for the others the best of four of AdamW's on a similar task, 0.01.
"""

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from examples.classifier import ImageClassifier
from examples.digits import DigitsData, DigitsNet
from lightning_thor import ThorCallback, configure_thor

TARGET = 0.97  # validation accuracy
BATCH_SIZE = 128  # 9 steps per epoch, the last one with 53 images
CHECKS_PER_EPOCH = 3  # validations, after every third step; epochs are too coarse a measure here
WARMUP_SHARE = 0.1  # of all steps
TUNING_SEEDS = (100, 101)
TUNING_SPLIT_SEED = 1
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One contender: how to build its optimizer at a peak learning rate, that rate, and the rates that were tried."""

    build: Callable[[nn.Module, float], Optimizer]
    lr: float
    lr_grid: tuple[float, ...]
    callbacks: Callable[[], list[L.Callback]] = list


class MuonAndAdamW(torch.optim.AdamW):
    """`torch.optim.Muon` for hidden matrices and kernels, and AdamW at the same rate for the head and for vectors."""

    def __init__(self, module: nn.Module, lr: float) -> None:
        from benchmarks.common.contenders import FlatMuon, others  # it needs torch 2.9

        hidden: list[Any] = [m.weight for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)][:-1]
        super().__init__(others(module, hidden), lr=lr, weight_decay=0.0)
        self.muon = FlatMuon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]  # schedulers set that one
        self.muon.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.muon.zero_grad()


RECIPES = {
    "THOR": Recipe(
        build=lambda module, lr: configure_thor(module, lr=lr),
        lr=0.04,
        lr_grid=(0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
        callbacks=lambda: [ThorCallback(summary=False)],
    ),
    "momentum SGD": Recipe(
        build=lambda module, lr: torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9),
        lr=0.2,
        lr_grid=(0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
    ),
    "AdamW": Recipe(
        build=lambda module, lr: torch.optim.AdamW(module.parameters(), lr=lr),
        lr=0.02,
        lr_grid=(0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
    ),
    "Muon": Recipe(
        build=lambda module, lr: MuonAndAdamW(module, lr=lr),
        lr=0.02,
        lr_grid=(0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
    ),
}
PINN_NAMES = {"thor": "THOR", "sgd": "momentum SGD", "adamw": "AdamW", "muon": "Muon", "soap": "SOAP"}
PINN_TARGET = 0.1  # relative error


@dataclass
class Curve:
    """What one training measured: epochs, seconds of training and validation accuracy (0..1) at every validation."""

    epochs: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)  # of every training step

    def epochs_to(self, target: float) -> float | None:
        """Epochs until the validation accuracy was first seen to be at least ``target``; None if it never was."""
        return next((e for e, accuracy in zip(self.epochs, self.accuracy, strict=True) if accuracy >= target), None)

    def seconds_to(self, target: float) -> float | None:
        """Seconds of training until then."""
        return next((s for s, accuracy in zip(self.seconds, self.accuracy, strict=True) if accuracy >= target), None)


class Stopwatch(L.Callback):
    """Fills a ``Curve``. Its clock starts in ``setup``, before THOR prepares anything, and stops in validation."""

    def __init__(self) -> None:
        self.curve = Curve()
        self.seconds = 0.0
        self.started = 0.0
        self.step_started = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.step_started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.curve.step_seconds.append(time.perf_counter() - self.step_started)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.perf_counter() - self.started
        self.curve.seconds.append(self.seconds)
        self.curve.epochs.append(trainer.global_step / trainer.num_training_batches)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.curve.accuracy.append(float(trainer.callback_metrics["val_acc"]))
        self.started = time.perf_counter()


class Contender(ImageClassifier):
    """The digits classifier with the optimizer of a ``Recipe`` and a one-cycle schedule, stepped at every batch."""

    def __init__(self, recipe: Recipe, lr: float) -> None:
        super().__init__(DigitsNet())
        self.recipe = recipe
        self.lr = lr

    def configure_optimizers(self) -> Any:
        optimizer = self.recipe.build(self, self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        # The momentum stays where it is: a cycle of it would be one more thing that treats them differently.
        scheduler = OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=steps, pct_start=WARMUP_SHARE, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(recipe: Recipe, lr: float, seed: int, epochs: int, split_seed: int = 0, progress: bool = True) -> Curve:
    """One training of the digits network; ``seed`` decides the initial weights and the order of the batches."""
    L.seed_everything(seed, verbose=False)
    module = Contender(recipe, lr)
    stopwatch = Stopwatch()
    bars: list[L.Callback] = [RichProgressBar(leave=False)] if progress else []
    trainer = L.Trainer(
        max_epochs=epochs,
        val_check_interval=1 / CHECKS_PER_EPOCH,
        callbacks=[stopwatch, *recipe.callbacks(), *bars],
        enable_progress_bar=progress,
        num_sanity_val_steps=0,
        **QUIET,
    )
    data = DigitsData(batch_size=BATCH_SIZE, split_seed=split_seed)
    # Reading the data set is not training, so it is done before the clock starts.
    data.setup()
    trainer.fit(module, train_dataloaders=data.train_dataloader(), val_dataloaders=data.val_dataloader())
    return stopwatch.curve


def warm_up() -> None:
    """Let torch make its one-off choices before anything is timed, or the first contender would pay for all."""
    module = DigitsNet()
    for batch_size in (BATCH_SIZE, BATCH_SIZE, 1077 % BATCH_SIZE):
        module(torch.randn(batch_size, 1, 8, 8)).sum().backward()


def keep_lightning_quiet() -> None:
    """Leave the screen to the progress bars: Lightning's tips and warnings are about settings that are meant here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def tune(epochs: int, console: Console) -> None:
    """Try every learning rate of every recipe's grid on the tuning seeds, and print the scores."""
    for name, recipe in RECIPES.items():
        scores, finals = {}, {}
        for lr in recipe.lr_grid:
            curves = [train(recipe, lr, seed, epochs, TUNING_SPLIT_SEED, progress=False) for seed in TUNING_SEEDS]
            scores[lr] = statistics.mean(statistics.mean(curve.accuracy) for curve in curves)
            finals[lr] = statistics.mean(curve.accuracy[-1] for curve in curves)
        best = max(scores, key=scores.__getitem__)
        table = Table("peak lr", "accuracy, mean over the training", "final accuracy", title=name, box=box.SIMPLE_HEAD)
        for lr, score in scores.items():
            table.add_row(f"{lr:g}", f"{score:.2%}", f"{finals[lr]:.2%}", style="bold" if lr == best else "")
        console.print(table)


def median_and_range(values: Iterable[float | None], form: str) -> str:
    """``median (smallest–largest)``; a run that never got there is said, not hidden."""
    listed = list(values)
    known = sorted(value for value in listed if value is not None)
    if len(known) < len(listed):
        return f"not reached by {len(listed) - len(known)} of {len(listed)}"
    middle, low, high = (format(value, form) for value in (statistics.median(known), known[0], known[-1]))
    return middle if low == high else f"{middle} ({low}–{high})"


def result_table(curves: dict[str, list[Curve]], epochs: int) -> Table:
    """The figures of all contenders: the median over the seeds, and the range."""
    seeds = len(next(iter(curves.values())))
    table = Table(
        title=f"Digits, {epochs} epochs: median over {seeds} seeds (smallest–largest)",
        caption="Seconds of training with all that the optimizer costs, validation left out.\n"
        "* median, mean: the mean has THOR's refreshes of the curvature in it.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("optimizer")
    for column in (f"epochs to {TARGET:.0%}", f"seconds to {TARGET:.0%}", "accuracy, %", "ms per step*"):
        table.add_column(column, justify="right")
    for name, runs in curves.items():
        steps = [seconds for run in runs for seconds in run.step_seconds]
        table.add_row(
            name,
            median_and_range((run.epochs_to(TARGET) for run in runs), ".1f"),
            median_and_range((run.seconds_to(TARGET) for run in runs), ".2f"),
            median_and_range((100 * run.accuracy[-1] for run in runs), ".1f"),
            f"{1e3 * statistics.median(steps):.1f}, {1e3 * statistics.mean(steps):.1f}",
        )
    return table


def pinn_table(runs: dict[str, dict[str, Any]], title: str, seconds: float) -> Table:
    """The figures of one training by each optimizer, see `pinn_figures`."""
    table = Table(
        title=f"A physics-informed network for {title}, {seconds:g} s of training",
        caption="Relative L2 error on a grid of the known solution.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("optimizer")
    for column in ("final error, %", f"seconds to {PINN_TARGET:.0%}", "steps", "ms per step"):
        table.add_column(column, justify="right")
    for name, run in runs.items():
        reached = run["seconds_to_target"]
        table.add_row(
            name,
            f"{100 * run['error'][-1]:.2g}",
            "not reached" if reached is None else f"{reached:.1f}",
            f"{run['steps']:,}",
            f"{1e3 * run['seconds'][-1] / run['steps']:.1f}",
        )
    return table


def pinn_figures(networks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What trainings of `examples.pinn` measured, in plain types."""
    runs = {}
    for name, network in networks.items():
        seconds, errors = zip(*network.curve, strict=True)
        runs[PINN_NAMES[name]] = {
            "seconds": list(seconds),
            "error": list(errors),
            "seconds_to_target": next((s for s, error in network.curve if error <= PINN_TARGET), None),
            "steps": network.trainer.global_step,
        }
    return runs


def figures(curves: dict[str, list[Curve]], epochs: int) -> dict[str, Any]:
    """All that was measured, in plain types."""
    return {
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "target": TARGET,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "optimizers": {
            name: {
                "lr": RECIPES[name].lr,
                "runs": [
                    asdict(run)
                    | {"epochs_to_target": run.epochs_to(TARGET), "seconds_to_target": run.seconds_to(TARGET)}
                    for run in runs
                ],
            }
            for name, runs in curves.items()
        },
    }


def pyplot() -> Any:
    """``matplotlib.pyplot``, drawing to files."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: pip install 'lightning-thor[examples]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(curves: dict[str, list[Curve]], path: Path) -> None:
    """Validation accuracy against epochs and against seconds: every run thin, their median bold."""
    plots = pyplot()
    figure, (left, right) = plots.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for colour, (name, runs) in zip(("tab:blue", "tab:orange", "tab:green", "tab:red"), curves.items(), strict=True):
        for run in runs:
            percent = [100 * accuracy for accuracy in run.accuracy]
            left.plot(run.epochs, percent, color=colour, alpha=0.3, linewidth=0.7)
            right.plot(run.seconds, percent, color=colour, alpha=0.3, linewidth=0.7)
        # All runs validate after the same steps, so the median is taken at each of them.
        percent = [100 * statistics.median(at_one) for at_one in zip(*(run.accuracy for run in runs), strict=True)]
        seconds = [statistics.median(at_one) for at_one in zip(*(run.seconds for run in runs), strict=True)]
        left.plot(runs[0].epochs, percent, color=colour, label=name, linewidth=2)
        right.plot(seconds, percent, color=colour, label=name, linewidth=2)
    for axes, x in ((left, "epochs"), (right, "seconds of training")):
        axes.axhline(100 * TARGET, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel=x)
        axes.grid(alpha=0.3)
    left.set(ylabel="validation accuracy, %", ylim=(80, 100.5))
    left.legend()
    figure.savefig(path, dpi=150)
    plots.close(figure)


def save_fields(path: Path, title: str, exact: Callable[[Tensor], Tensor], networks: Mapping[str, Any]) -> None:
    """Draw a function of two coordinates, what networks miss of it, and how that fell in their training.

    Args:
        path: of the picture.
        title: what the function is.
        exact: the function, of points ``[n, 2]``.
        networks: by name; `examples.pinn.PINN`, all of one equation.
    """
    plots, panels = pyplot(), ["exact", *networks]
    figure, axes = plots.subplot_mosaic(
        [panels, ["curves"] * len(panels)], layout="constrained", figsize=(3 * len(panels) + 0.5, 6.4)
    )
    grid = next(iter(networks.values())).grid
    u, side = exact(grid), math.isqrt(len(grid))
    (left, low), (right, high) = grid.amin(0).tolist(), grid.amax(0).tolist()

    def show(panel: str, values: Tensor, words: str, **style: Any) -> Any:
        axes[panel].set_title(words, fontsize=10)
        picture = values.view(side, side).T
        return axes[panel].imshow(picture, origin="lower", extent=(left, right, low, high), aspect="auto", **style)

    figure.colorbar(show("exact", u, title, cmap="RdBu_r"), ax=axes["exact"])
    for name, network in networks.items():
        with torch.no_grad():
            missed = (network.network(grid)[:, 0] - u).abs()
        image = show(
            name, missed, f"|error| of {PINN_NAMES[name]}, {network.error():.1e} in all", cmap="magma", norm="log"
        )
        image.set_clim(1e-5, 1e-1)
        axes["curves"].semilogy(*zip(*network.curve, strict=True), label=PINN_NAMES[name], linewidth=2)
    figure.colorbar(image, ax=axes[panels[-1]])
    axes["curves"].set(xlabel="seconds of training", ylabel="relative error")
    axes["curves"].grid(alpha=0.3)
    axes["curves"].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plots.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the demo, or the tuning; returns the figures that it also wrote (empty after tuning)."""
    parser = argparse.ArgumentParser(description="THOR, momentum SGD, AdamW and Muon, on digits and Burgers' equation.")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings per optimizer (default: %(default)s)")
    parser.add_argument(
        "--pinn-seconds", type=float, default=15, help="for Burgers' equation, per optimizer (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder to write into (default: %(default)s)"
    )
    parser.add_argument("--tune", action="store_true", help="rerun the search for the learning rates instead")
    options = parser.parse_args(arguments)

    keep_lightning_quiet()
    # So small a network gains nothing from more threads, and loses much when other programs want the cores.
    torch.set_num_threads(1)
    console = Console()
    if options.tune:
        tune(options.epochs, console)
        return {}

    warm_up()
    curves: dict[str, list[Curve]] = {name: [] for name in RECIPES}
    # Seed by seed rather than optimizer by optimizer: a machine that is slower for a while is slower for all.
    for seed in range(options.seeds):
        for name, recipe in RECIPES.items():
            console.print(f"seed {seed}: [bold]{name}[/bold], peak learning rate {recipe.lr:g}")
            curves[name].append(train(recipe, recipe.lr, seed, options.epochs))

    from examples import pinn  # which imports this module

    console.print("a physics-informed network")
    limits = (f"--seconds={options.pinn_seconds}", f"--out={options.out}")
    networks = pinn.main(["--equation=burgers", *limits, "--optimizers", "thor", "sgd", "adamw", "muon"])
    measured = figures(curves, options.epochs) | {"pinn": pinn_figures(networks)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "figures.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    save_picture(curves, options.out / "curves.png")
    console.print(result_table(curves, options.epochs))
    console.print(pinn_table(measured["pinn"], "Burgers' equation", options.pinn_seconds))
    console.print(f"Written into {options.out}: curves.png, pinn.png, figures.json")
    return measured


if __name__ == "__main__":
    main()
