"""What is logged of a step and known at the end of a fit, as metrics of torchmetrics; nothing waits for the device."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.curvature.part_timer import OWN_PARTS


class Ratio(Metric):
    """A sum over another one: its call returns the ratio of what it is given, ``compute()`` that of all since the last
    ``reset()``. Each process has its own; nothing is looked at, so that no device is waited for.

    >>> mean = Ratio()
    >>> mean(1.0), mean(3.0), mean.compute()
    (tensor(1.), tensor(3.), tensor(2.))
    """

    full_state_update = False
    above: Tensor
    below: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        for name in ("above", "below"):
            self.add_state(name, default=torch.zeros(()), dist_reduce_fx="sum")

    def update(self, above: float | Tensor, below: float | Tensor = 1.0) -> None:
        """Add to both sums.

        Args:
            above: a number, or 0-dimensional.
            below: likewise.
        """
        self.above, self.below = self.above + above, self.below + below

    def compute(self) -> Tensor:
        """The ratio of the sums."""
        return self.above / self.below


class StepFigures:
    """The figures of the logged steps of one fit.

    Args:
        curvature: of the fit.

    Attributes:
        update_ratio: mean of the update's norm over the weights' norm.
        factor_change: mean of the logarithm of ``‖F - F_old‖ / ‖F_old‖`` over factors, and over the refreshes that
            measured it: few factors, of rare or of learnt samples, change by more than all others together.
    """

    def __init__(self, curvature: Curvature) -> None:
        self._curvature = curvature
        device = curvature.factors.device
        self.update_ratio, self.factor_change = Ratio().to(device), Ratio().to(device)
        self._changed_at: int | None = None
        self._seconds: dict[str, float] = {}
        curvature.measures_change = True

    def of_step(self, update_ratio: Tensor) -> dict[str, Any]:
        """The figures to log after a step, by their names.

        Args:
            update_ratio: the norm of the step over that of the weights, 0-dimensional.
        """
        curvature = self._curvature
        figures: dict[str, Any] = {
            "thor/refreshes": curvature.refreshes[0] / max(len(curvature.layers), 1),
            "thor/inverse_age": curvature.inverse_age,
            "thor/update_to_weights": self.update_ratio(update_ratio),
        }
        if curvature.last_damping is not None:
            figures["thor/damping"] = curvature.last_damping
        if curvature.changed_at != self._changed_at:
            changes = curvature.factor_change
            logarithms = changes.clamp_min(torch.finfo(changes.dtype).tiny).log()
            figures["thor/factor_change"] = self.factor_change(logarithms.nansum(), (~changes.isnan()).sum()).exp()
            self._changed_at = curvature.changed_at
        # Once for each step that is logged: it costs two passes over the factors.
        curvature.measures_change = True
        if curvature.timer is not None:
            before, self._seconds = self._seconds, curvature.timer.seconds()
            passed = {part: seconds - before.get(part, 0.0) for part, seconds in self._seconds.items()}
            total = sum(passed.values())
            if total > 0:
                figures |= {f"thor/time_in_{part}": passed[part] / total for part in OWN_PARTS}
        return figures

    def of_fit(self) -> dict[str, Any]:
        """Those of the `lightning_thor.trainer.fit_report.FitFigures` that are measured here. Waits for the device."""
        curvature, timer = self._curvature, self._curvature.timer
        rows = curvature.factors.rows.tolist()
        # An average is as exact as the mean of so many windows.
        n_windows = (1 + curvature.averaging) / (1 - curvature.averaging)
        sizes = [max(side.size for side in (layer.A, layer.G) if side) for layer in curvature.layers.values()]
        few = [0 < n * n_windows < size for n, size in zip(rows, sizes, strict=True)]
        return {
            "update_ratio": float(self.update_ratio.compute()) if self.update_ratio.update_called else None,
            "factor_change": float(self.factor_change.compute().exp()) if self.factor_change.update_called else None,
            "seconds": None if timer is None else timer.seconds(),
            "few_rows": tuple(compress(curvature.layers, few)),
        }
