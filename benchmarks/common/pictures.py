"""Figures of matplotlib that are written to files."""

from pathlib import Path
from typing import Any


def subplots(n_rows: int, n_columns: int, **options: Any) -> tuple[Any, Any]:
    """An empty figure and its axes, an array ``[n_rows, n_columns]``; ``options`` are those of ``pyplot.subplots``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(n_rows, n_columns, squeeze=False, layout="constrained", **options)
    return figure, axes


def axes_in_a_row(count: int) -> tuple[Any, list[Any]]:
    """Make a figure with ``count`` axes beside each other; returns both."""
    figure, axes = subplots(1, count, figsize=(4.6 * count + 2.2, 4))
    return figure, list(axes[0])


def save(figure: Any, path: Path, title: str | None = None) -> None:
    """Write the figure to ``path``, under a title if there is one, and close it."""
    from matplotlib import pyplot

    if title is not None:
        figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def clipped(value: float | None, worst: float, higher_is_better: bool) -> float:
    """``value``, or ``worst`` if it is None or worse.

    >>> clipped(None, 3.0, False), clipped(5.0, 3.0, False), clipped(2.0, 3.0, False), clipped(0.5, 0.1, True)
    (3.0, 3.0, 2.0, 0.5)
    """
    if value is None:
        return worst
    return max(value, worst) if higher_is_better else min(value, worst)
