"""Pictures of trainings."""

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.demo.tables import PINN_NAMES, TARGET
from examples.demo.training import Curve


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
