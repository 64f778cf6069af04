"""Pictures of ``time_to_target``: the metric against steps and seconds, and against the learning rate."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.contenders import CONTENDERS


def save_curves(summary: Mapping[str, Any], path: Path) -> None:
    """One workload: the metric by step, and by seconds of training; mean over seeds, and the range."""
    figure, (by_step, by_second) = axes_in_a_row(2)
    for name, one in summary["optimizers"].items():
        style = {"color": CONTENDERS[name].colour, "label": CONTENDERS[name].words}
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
    handles, labels = by_second.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    finish(figure, summary["words"], path)


def limits(summary: Mapping[str, Any]) -> tuple[float, float]:
    """The part of the metric's axis that is worth seeing: diverged trainings leave the picture at its edge."""
    values = [v for one in summary["optimizers"].values() for run in one["curve"] for v in run if v is not None]
    ordered = sorted([*values, summary["target"]])
    low, high = ordered[0], ordered[-1]
    if not summary["higher_is_better"]:
        # From the best to some way above what most checks show.
        high = min(high, ordered[int(0.9 * (len(ordered) - 1))] * 1.2)
    margin = 0.03 * (high - low) or 1.0
    return low - margin, high + margin


def save_robustness(summary: Mapping[str, Any], path: Path) -> None:
    """One workload: the metric at the end of the tuning trainings against their learning rate."""
    figure, (axes,) = axes_in_a_row(1)
    values = [v for rates in summary["tuning"].values() for v in rates.values() if v is not None]
    worst = (min if summary["higher_is_better"] else max)(sorted(values)[: max(1, int(0.8 * len(values)))], default=0.0)
    for name, rates in summary["tuning"].items():
        if rates:
            x = [float(lr) for lr in rates]
            # What diverged is drawn at the edge, so that it is seen to be lost.
            y = [clipped(value, worst, summary["higher_is_better"]) for value in rates.values()]
            axes.plot(x, y, marker=".", color=CONTENDERS[name].colour, label=CONTENDERS[name].words)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate of a tuning training")
    axes.set_ylabel(f"{summary['metric']} (at the edge: or worse)")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    finish(figure, summary["words"], path)


def clipped(value: float | None, worst: float, higher_is_better: bool) -> float:
    """``value``, or ``worst`` if it is None or worse.

    >>> clipped(None, 3.0, False), clipped(5.0, 3.0, False), clipped(2.0, 3.0, False), clipped(0.5, 0.1, True)
    (3.0, 3.0, 2.0, 0.5)
    """
    if value is None:
        return worst
    return max(value, worst) if higher_is_better else min(value, worst)


def axes_in_a_row(count: int) -> tuple[Any, Sequence[Any]]:
    """An empty figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(4.6 * count + 2.2, 4), squeeze=False, layout="constrained")
    return figure, list(axes[0])


def finish(figure: Any, title: str, path: Path) -> None:
    """Write and close it."""
    from matplotlib import pyplot

    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
