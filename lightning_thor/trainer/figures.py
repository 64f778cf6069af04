"""What is logged of a step and known at the end of a fit, as metrics of torchmetrics; nothing waits for the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.curvature.part_timer import OWN_PARTS, REST
from lightning_thor.distributed.dtensor import local_parts
from lightning_thor.optim.thor import Thor
from lightning_thor.trainer.thors import parameters_of

N_SAMPLED = 4096
"""About so many entries of each tensor are looked at."""

Sample = dict[nn.Parameter, Tensor]


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
        """Add to both sums; each is a number, or 0-dimensional."""
        self.above, self.below = self.above + above, self.below + below

    def compute(self) -> Tensor:
        """The ratio of the sums."""
        return self.above / self.below


class StepFigures:
    """The figures of the logged steps of one fit.

    Attributes:
        update_ratio: mean of the update's norm over the weights' norm.
        factor_change: mean of the logarithm of ``‖F - F_old‖ / ‖F_old‖`` over factors that were not 0, and over the
            refreshes that measured it: few factors, of rare or of learnt samples, change by more than all others
            together.
    """

    def __init__(self) -> None:
        self.update_ratio, self.factor_change = Ratio(), Ratio()
        self._changed_at: dict[Curvature, int | None] = {}
        self._seconds: dict[Curvature, dict[str, float]] = {}

    def of_step(self, curvature: Curvature, update_ratio: Tensor, prefix: str = "thor") -> dict[str, Any]:
        """The figures to log after a step of the optimizer of ``curvature``, by their names, which begin with
        ``prefix``; ``update_ratio`` is the norm of the step over that of the weights, 0-dimensional."""
        for ratio in (self.update_ratio, self.factor_change):
            ratio.to(curvature.factors.device)
        figures: dict[str, Any] = {
            "refreshes": curvature.refreshes[0] / max(len(curvature.layers), 1),
            "inverse_age": curvature.inverse_age,
            "update_to_weights": self.update_ratio(update_ratio),
        }
        if curvature.last_damping is not None:
            figures["damping"] = curvature.last_damping
        if curvature.changed_at != self._changed_at.get(curvature):
            changes = curvature.factor_change
            # A factor that was 0 before, behind a layer that starts at 0, changes by infinitely more than its value.
            is_known = changes.isfinite()
            logarithms = changes.clamp_min(torch.finfo(changes.dtype).tiny).log().where(is_known, 0.0)
            # 0 if no average took a window, as where a trace rule kept all layers.
            mean = self.factor_change(logarithms.sum(), is_known.sum())
            figures["factor_change"] = mean.exp().nan_to_num(0.0)
            self._changed_at[curvature] = curvature.changed_at
        # Once for each step that is logged: it costs two passes over the factors.
        curvature.measures_change = True
        if curvature.timer is not None:
            before, now = self._seconds.get(curvature, {}), curvature.timer.seconds()
            self._seconds[curvature] = now
            passed = {part: seconds - before.get(part, 0.0) for part, seconds in now.items()}
            total = sum(passed.values())
            if total > 0:
                figures |= {f"time_in_{part}": passed[part] / total for part in OWN_PARTS}
        return {f"{prefix}/{name}": figure for name, figure in figures.items()}

    def of_fit(self, curvatures: Sequence[Curvature]) -> dict[str, Any]:
        """Those of the `lightning_thor.trainer.fit_log.FitFigures` that are measured here. Waits for the device."""
        ratio, change = (
            float(one.compute()) if one.update_called else None for one in (self.update_ratio, self.factor_change)
        )
        return {
            "update_ratio": ratio,
            "factor_change": None if change is None or math.isnan(change) else math.exp(change),
            "seconds": seconds_of(curvatures),
            "few_rows": tuple(name for one in curvatures for name in _layers_with_few_rows(one)),
        }


def seconds_of(curvatures: Sequence[Curvature]) -> dict[str, float] | None:
    """Time by part of a step, so far in this fit, None if nothing measured it; each timer saw all steps, and its own
    curvature in them."""
    each = [one.timer.seconds() for one in curvatures if one.timer is not None]
    if not each:
        return None
    own = {part: sum(one[part] for one in each) for part in OWN_PARTS}
    return {REST: sum(each[0].values()) - sum(own.values()), **own}


def _layers_with_few_rows(curvature: Curvature) -> Iterator[str]:
    rows = curvature.factors.rows.tolist()
    # An average is as exact as the mean of so many windows.
    n_windows = (1 + curvature.averaging) / (1 - curvature.averaging)
    sizes = [max(side.size for side in (layer.A, layer.G) if side) for layer in curvature.layers.values()]
    return compress(curvature.layers, [0 < n * n_windows < size for n, size in zip(rows, sizes, strict=True)])


def sample_weights(optimizer: Thor) -> Sample:
    """Copy evenly spread entries of each parameter of ``optimizer``, of sharded ones of this rank's shard: ``[n]``, in
    float32, by parameter of which there are entries here."""
    params = [p for p in parameters_of(optimizer) if not is_lazy(p) and p.requires_grad and p.is_floating_point()]
    local = local_parts([p.detach() for p in params])
    return {p: _some(own) for p, own in zip(params, local, strict=True) if own.numel()}


def update_ratio(before: Sample) -> Tensor:
    """Norm of what changed since ``before`` over the norm of the weights, of all its parameters together, of which
    there is one or more; 0-dimensional."""
    params = list(before)
    local = local_parts([p.detach() for p in params])
    # An entry of the sample stands for so many.
    roots = [(p.numel() / before[own].numel()) ** 0.5 for own, p in zip(params, local, strict=True)]
    pairs = [(_some(now), before[own]) for own, now in zip(params, local, strict=True)]
    moved: Tensor = torch.stack(
        [(now - was).norm() * root for (now, was), root in zip(pairs, roots, strict=True)]
    ).norm()
    norm: Tensor = torch.stack([was.norm() * root for (_, was), root in zip(pairs, roots, strict=True)]).norm()
    return moved / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _some(p: Tensor) -> Tensor:
    return p.flatten()[:: max(p.numel() // N_SAMPLED, 1)].to(torch.float32, copy=True)
