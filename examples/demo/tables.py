"""What the demo measured, as tables and in plain types."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.table import Table

from examples.demo.recipes import RECIPES
from examples.demo.training import BATCH_SIZE, Curve

TARGET = 0.97  # validation accuracy
PINN_NAMES = {"thor": "THOR", "sgd": "momentum SGD", "adamw": "AdamW", "muon": "Muon", "soap": "SOAP"}
PINN_TARGET = 0.1  # relative error


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
