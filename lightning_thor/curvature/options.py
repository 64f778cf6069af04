"""What the options of a curvature may be, for the two places that take them: `Curvature` and `ThorCallback`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_thor.curvature.callables import StepFn
from lightning_thor.curvature.refresh_schedule import Interval
from lightning_thor.factors.damping import RULES
from lightning_thor.factors.trace_rule import trace_rule_of
from lightning_thor.layers.registry import STATISTICS, KfacApprox
from lightning_thor.preconditioning.modes import MODES

Schedule = float | StepFn


def check_options(
    *,
    mode: str = "natural",
    damping: Schedule,
    damping_rule: str,
    block_size: int | str | None,
    update_every_n_steps: Interval,
    trace_rule: Any,
    averaging: float,
    max_rows: int | None,
    statistics: str | KfacApprox,
    loss_reduction: str,
    fused: Mapping[str, int] | None = None,
) -> None:
    """Refuse options of `Curvature` that cannot mean anything.

    Raises:
        ValueError: what was given, what is allowed.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if not callable(damping) and not (_is_number(damping) and math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping must be greater than 0 (or a function of the step), got {damping!r}.")
    if damping_rule not in RULES:
        raise ValueError(f"damping_rule must be one of {', '.join(RULES)}, got {damping_rule!r}.")
    if block_size == "auto":
        raise ValueError(
            'block_size="auto" needs a batch of data to measure with: under a Trainer give it to ThorCallback; '
            "outside, call lightning_thor.split.choose_block_size(model, loss_of_a_batch) and give its block_size here."
        )
    if block_size is not None and not _is_count(block_size):
        raise ValueError(f"block_size must be an int of at least 1, or None for whole factors, got {block_size!r}.")
    if not callable(update_every_n_steps) and not _is_count(update_every_n_steps):
        raise ValueError(
            "update_every_n_steps must be an int of at least 1 (or a function of the step), "
            f"got {update_every_n_steps!r}."
        )
    trace_rule_of(trace_rule)
    if not _is_number(averaging) or not 0.0 <= averaging < 1.0:
        raise ValueError(f"averaging must lie in [0, 1); 0 uses the last batch alone. Got {averaging!r}.")
    if max_rows is not None and not _is_count(max_rows):
        raise ValueError(f"max_rows must be an int of at least 1, or None for all rows, got {max_rows!r}.")
    if not isinstance(statistics, KfacApprox) and statistics not in STATISTICS:
        raise ValueError(f"statistics must be one of {', '.join(STATISTICS)}, got {statistics!r}.")
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}.")
    are_parts = isinstance(fused, Mapping) and all(isinstance(key, str) and _is_count(n) for key, n in fused.items())
    if fused is not None and not are_parts:
        raise ValueError(
            f"fused must map patterns of layer names to numbers of parts, such as {{'*.qkv': 3}}, got {fused!r}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
