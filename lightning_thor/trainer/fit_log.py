"""What a fit logs of its curvatures, warns of, and prints at its end."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_thor.optim.thor import Thor
from lightning_thor.trainer.console import show
from lightning_thor.trainer.figures import Sample, StepFigures, sample_weights, update_ratio
from lightning_thor.trainer.fit_report import FitFigures, fit_report
from lightning_thor.trainer.monitor import ON_BAR
from lightning_thor.trainer.served_thors import ServedThors


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
