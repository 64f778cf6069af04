"""What a fit logs of its curvatures, warns of, and prints at its end, with advice where a figure suggests one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Group
from rich.text import Text

from lightning_thor.curvature.part_timer import REST
from lightning_thor.layers.discovery import name_some
from lightning_thor.optim.thor import Thor
from lightning_thor.trainer.console import show
from lightning_thor.trainer.figures import Sample, StepFigures, sample_weights, update_ratio
from lightning_thor.trainer.monitor import ON_BAR
from lightning_thor.trainer.served_thors import ServedThors
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


class FitLog:
    """Logs the figures of steps and epochs, from the start of training to the end of a fit; see `ThorCallback`.

    Args:
        served: the optimizers with their curvatures.
        has_trace_rule: whether there are refreshes that a trace rule left out.
    """

    def __init__(self, served: ServedThors, *, has_trace_rule: bool) -> None:
        self._served, self._has_trace_rule = served, has_trace_rule
        self._figures = StepFigures()
        self._begin = self._counts()
        self._told = sum(self._troubles())
        self._samples: dict[Thor, Sample] = {}
        """Of the weights before the step that is logged."""

    def start_batch(self, trainer: pl.Trainer) -> None:
        """Look at the weights, if the coming step is logged."""
        self._samples = {}
        if trainer._logger_connector.should_update_logs:
            self._samples = {one: sample_weights(one) for one in self._served.by_optimizer if one in trainer.optimizers}

    def end_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, applied: list[int]) -> None:
        """Log the steps that were taken; ``applied`` are the steps of each curvature before the batch."""
        for number, (optimizer, curvature) in enumerate(self._served.by_optimizer.items()):
            if not self._samples.get(optimizer) or curvature.step == applied[number]:
                continue
            prefix = f"thor-{number}" if number else "thor"
            figures = self._figures.of_step(curvature, update_ratio(self._samples[optimizer]), prefix)
            monitor = self._served.monitor
            if monitor is not None and monitor.progress_bar and not number:
                on_bar = {short: figures[name] for short, name in ON_BAR.items()}
                pl_module.log_dict(on_bar, prog_bar=True, logger=False, on_step=True, on_epoch=False)
            if trainer.logger is not None:
                pl_module.log_dict(figures, on_step=True, on_epoch=False)
        self._samples = {}

    def end_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what must stay 0, and warn where it does not. Waits for the device."""
        if not self._served.curvatures:
            return
        failed, rejected = self._troubles()
        if failed + rejected > self._told:
            rank_zero_warn(
                f"THOR kept old curvature {failed + rejected - self._told} times in epoch {trainer.current_epoch}: "
                f"so far {failed} blocks could not be inverted and {rejected} layers' statistics were not finite. If "
                "this goes on, raise damping, lower lr, or look for overflows in the loss."
            )
            self._told = failed + rejected
        if trainer.logger is not None:
            figures = {"failed_inversions": float(failed), "rejected_windows": float(rejected)}
            if self._has_trace_rule:
                counts = self._counts()
                figures["refreshed_share"] = counts["n_refreshes"] / max(counts["n_possible"], 1)
            # The same on all ranks, of which some may have no logger: no collective (rank_zero_only), and no warning of
            # Lightning's that they might differ (sync_dist).
            figures = {f"thor/{name}": figure for name, figure in figures.items()}
            pl_module.log_dict(figures, sync_dist=True, rank_zero_only=True)

    def print(self) -> None:
        """Print the report of the fit, if it took a step. Waits for the device."""
        counts = {name: n - self._begin[name] for name, n in self._counts().items()}
        if not counts["n_steps"]:
            return
        curvatures = self._served.curvatures
        layers = [layer for one in curvatures for layer in one.layers.values()]
        updates = [n for one in curvatures for n in one.factors.updates.tolist()]
        # One that was left out was observed, and told of.
        idle = tuple(layer.name for layer, n in zip(layers, updates, strict=True) if not n and not layer.is_left_out)
        figures = FitFigures(**counts, **self._figures.of_fit(curvatures), idle=idle)
        show(fit_report(figures, len(layers)))

    def _troubles(self) -> tuple[int, int]:
        """Blocks that could not be inverted, and layers' windows that were not finite, so far. Waits for the device."""
        factors = [curvature.factors for curvature in self._served.curvatures]
        return sum(int(one.failed_inversions) for one in factors), sum(int(one.rejected_windows) for one in factors)

    def _counts(self) -> dict[str, Any]:
        """The counts of `FitFigures`, so far. Waits for the device."""
        curvatures, (failed, rejected) = self._served.curvatures, self._troubles()
        done, turns = (sum(one.refreshes[i] for one in curvatures) for i in (0, 1))
        n_steps = max((one.step for one in curvatures), default=0)
        own = {"n_steps": n_steps, "n_refreshes": done, "n_possible": turns}
        return own | {"n_failed": failed, "n_rejected": rejected}


# ── the report at the end ──


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
