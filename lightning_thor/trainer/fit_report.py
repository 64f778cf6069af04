"""What the curvature did in a fit, as it is printed at the end, with advice where a figure suggests one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from lightning_thor.curvature.part_timer import REST
from lightning_thor.layers.discovery import name_some
from lightning_thor.trainer.start_report import fold_names

FAST = 0.1
"""Weights that move by more than this share in one step are rarely wanted."""
FEW_REFRESHES = 3
"""With fewer refreshes of a layer in a fit, its inverses are those of the beginning."""
STALE = 0.5
"""Factors that change by more than this share of their norm at a refresh were hardly those of the steps before it."""
COSTLY, LEAST_STEPS = 0.3, 100
"""Where refreshes take more than this share of the time, a longer interval, or smaller blocks, are worth a try; a fit
with fewer steps does not tell, since the default interval is short at first."""


@dataclass(frozen=True)
class FitFigures:
    """Counts, and what else is known at the end of a fit."""

    n_steps: int = 0
    """Applied steps."""
    n_refreshes: int = 0
    """Of all layers together."""
    n_possible: int = 0
    """As many there would have been without a trace rule."""
    n_failed: int = 0
    """Blocks that could not be inverted."""
    n_rejected: int = 0
    """Layers' statistics that were left out for not being finite."""
    update_ratio: float | None = None
    """Mean of the update's norm over the weights' norm, of the steps that were looked at; None if none was."""
    factor_change: float | None = None
    """Geometric mean of ``‖F - F_old‖ / ‖F_old‖`` of the refreshes that were looked at; None if none was."""
    seconds: Mapping[str, float] | None = None
    """Time by part of a step (`lightning_thor.curvature.part_timer.PARTS`), if it was measured."""
    few_rows: tuple[str, ...] = ()
    """Layers with blocks that are larger than the number of rows which an average stands for."""
    idle: tuple[str, ...] = ()
    """Layers that were never observed."""


def fit_report(figures: FitFigures, n_layers: int) -> Group:
    """Say what the curvature of ``n_layers`` did in a fit: the figures, and a line for each advice, as a renderable of
    rich."""
    per_layer = figures.n_refreshes / max(n_layers, 1)
    saved = figures.n_possible - figures.n_refreshes
    line = (
        f"THOR after {_counted(figures.n_steps, 'step')}: each layer was refreshed {_counted(per_layer, 'time')}"
        + (f" ({saved} of {figures.n_possible} refreshes were not needed)" if saved else "")
        + f"; {figures.n_failed} inversions failed, {figures.n_rejected} statistics were not finite"
        + ("" if figures.update_ratio is None else f"; a step moved the weights by {figures.update_ratio:.1%}")
        + ("" if figures.factor_change is None else f", a refresh the factors by {figures.factor_change:.0%}")
        + "."
    )
    lines = [Text(line, style="bold"), *([Text(_time(figures.seconds))] if figures.seconds else [])]
    advice = [Text(f"→ {one}", style="yellow") for one in advice_on(figures, per_layer)]
    return Group(*lines, *advice)


def _counted(n: float, what: str) -> str:
    """>>> _counted(1, "step"), _counted(2.25, "time")
    ('1 step', '2.25 times')
    """
    number = f"{n:.3g}" if isinstance(n, float) else f"{n}"
    return f"{number} {what}" + ("" if number == "1" else "s")


def _time(seconds: Mapping[str, float]) -> str:
    """>>> _time({"rest": 6.0, "directions": 0.0, "statistics": 1.0, "inversion": 1.0, "communication": 0.0})
    'Of 8.0 s in its steps: 12.5% statistics, 12.5% inversion; 75.0% forward, backward and all else.'
    """
    total = max(sum(seconds.values()), 1e-9)
    own = [f"{time / total:.1%} {part}" for part, time in seconds.items() if part != REST and time]
    rest = f"{seconds[REST] / total:.1%} forward, backward and all else"
    return f"Of {total:.1f} s in its steps: {', '.join(own)}; {rest}."


def advice_on(figures: FitFigures, per_layer: float) -> list[str]:
    """What the figures of a fit, with so many refreshes ``per_layer``, suggest to change."""
    advice = []
    if figures.n_failed:
        advice.append(f"{figures.n_failed} inversions failed, and an older inverse was kept: raise damping.")
    if figures.n_rejected:
        advice.append(
            f"{figures.n_rejected} statistics were not finite and were left out: lower lr, or look for overflows in "
            "the loss."
        )
    has_rule = figures.n_possible > figures.n_refreshes
    if 0 < per_layer < FEW_REFRESHES <= figures.n_steps and not has_rule:
        advice.append(
            "Few refreshes: the inverses were mostly those of the first steps. Lower update_every_n_steps for a fit as "
            "short as this."
        )
    if figures.factor_change is not None and figures.factor_change > STALE:
        advice.append(
            f"Each refresh changed the factors by {figures.factor_change:.0%}: lower update_every_n_steps, or raise "
            "averaging or max_rows if the batches differ so much."
        )
    if figures.seconds is not None:
        refreshing = figures.seconds["statistics"] + figures.seconds["inversion"]
        share = refreshing / max(sum(figures.seconds.values()), 1e-9)
        if share > COSTLY and figures.n_steps >= LEAST_STEPS:
            advice.append(
                f"Refreshes took {share:.0%} of the time: raise update_every_n_steps, or lower block_size or max_rows."
            )
    if figures.few_rows:
        advice.append(
            f"Too few rows for their blocks: {name_some(fold_names(figures.few_rows), 3)}. Lower block_size, or raise "
            "the batch size, max_rows or averaging."
        )
    if figures.update_ratio is not None and figures.update_ratio > FAST:
        advice.append("The weights moved fast: if the loss is not steady, lower lr.")
    if figures.idle:
        advice.append(
            f"Never observed, and trained by plain gradients: {name_some(fold_names(figures.idle), 3)}. Call these "
            "modules in training_step, or freeze them."
        )
    return advice
