"""Pictures of one workload: the metric against steps and seconds, and against the learning rate."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.contenders import CONTENDERS
from benchmarks.common.pictures import axes_in_a_row, clipped, save


def save_curves(summary: Mapping[str, Any], path: Path) -> None:
    """Draw a summary of `tuning.measure`: the metric by step and by seconds of training, mean and range over seeds."""
    figure, (by_step, by_second) = axes_in_a_row(2)
    for name, one in summary["optimizers"].items():
        style = {"color": CONTENDERS[name].colour, "label": CONTENDERS[name].label}
        # A seed that ended early ends the line: a mean of the others would flatter it.
        curves = [[math.nan if value is None else value for value in run] for run in one["curve"]]
        columns = list(zip(*curves, strict=False))
        mean, low, high = ([pick(column) for column in columns] for pick in (statistics.fmean, min, max))
        seconds = [statistics.fmean(column) for column in zip(*one["seconds"], strict=False)]
        for axes, x in ((by_step, summary["steps"][: len(mean)]), (by_second, seconds)):
            axes.plot(x, mean, linewidth=1.3, **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    for axes, label in ((by_step, "steps"), (by_second, "seconds of training")):
        axes.axhline(summary["target"], color="black", linestyle=":", linewidth=1)
        axes.set_xlabel(label)
        axes.set_ylim(*limits(summary))
    by_step.set_ylabel(summary["metric"])
    figure.legend(*by_second.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    save(figure, path, summary["words"])


def limits(summary: Mapping[str, Any]) -> tuple[float, float]:
    """The shown range of the metric: diverged trainings leave the picture at its edge."""
    values = [v for one in summary["optimizers"].values() for run in one["curve"] for v in run if v is not None]
    ordered = sorted([*values, summary["target"]])
    low, high = ordered[0], ordered[-1]
    if not summary["higher_is_better"]:
        # From the best to some way above what most checks show.
        high = min(high, ordered[int(0.9 * (len(ordered) - 1))] * 1.2)
    margin = 0.03 * (high - low) or 1.0
    return low - margin, high + margin


def save_robustness(summary: Mapping[str, Any], path: Path) -> None:
    """Draw a summary of `tuning.measure`: the metric at the end of the tuning trainings against their learning rate."""
    figure, (axes,) = axes_in_a_row(1)
    values = [v for rates in summary["tuning"].values() for v in rates.values() if v is not None]
    worst = (min if summary["higher_is_better"] else max)(sorted(values)[: max(1, int(0.8 * len(values)))], default=0.0)
    for name, rates in summary["tuning"].items():
        if rates:
            # Diverged trainings stand at the edge, so that the picture shows them.
            y = [clipped(value, worst, summary["higher_is_better"]) for value in rates.values()]
            contender = CONTENDERS[name]
            axes.plot([float(lr) for lr in rates], y, marker=".", color=contender.colour, label=contender.label)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate of a tuning training")
    axes.set_ylabel(f"{summary['metric']} (at the edge: or worse)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    save(figure, path, summary["words"])
