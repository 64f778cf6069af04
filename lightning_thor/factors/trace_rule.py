"""The trace rule: a layer whose curvature hardly moved keeps its old one (THOR: Chen et al., AAAI 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEEP, UPDATE, STOP = DECISIONS = 0, 1, 2


class TraceRule(NamedTuple):
    """Two thresholds of the relative change Δ of tr(F + λI), per layer and refresh.

    Δ above ``update_above`` (the paper's ω1): update. Δ below ``stop_below`` (ω2): stop updating this layer for good.
    Between them: keep the old curvature this time.
    """

    update_above: float
    stop_below: float


NAMED: Mapping[str, TraceRule] = {
    "THOR": TraceRule(0.01, 0.0),
    "THOR_stop": TraceRule(0.01, 0.001),
    "THOR_NT": TraceRule(0.0, 0.0),
}


def trace_rule_of(choice: Any) -> TraceRule | None:
    """The rule that an option names.

    Args:
        choice: None, one of the paper's three names, or two thresholds. "THOR_NT" is the paper's name for updating
            whatever the trace says.

    Returns:
        The thresholds; None where there is nothing to decide.

    Raises:
        ValueError: another name, or thresholds that are not ``(ω1, ω2)`` with ω1 >= ω2 >= 0.

    >>> trace_rule_of("THOR_stop")
    TraceRule(update_above=0.01, stop_below=0.001)
    >>> trace_rule_of("THOR_NT") is trace_rule_of((0, 0)) is trace_rule_of(None)
    True
    """
    if choice is None:
        return None
    thresholds: Any = NAMED.get(choice) if isinstance(choice, str) else choice
    numbers = isinstance(thresholds, tuple | list) and len(thresholds) == 2
    numbers = numbers and all(isinstance(x, int | float) and not isinstance(x, bool) for x in thresholds)
    if not numbers or not float("inf") > thresholds[0] >= thresholds[1] >= 0:
        raise ValueError(
            f"trace_rule must be one of {', '.join(NAMED)}, two thresholds (update above, stop below) with the first "
            f"no smaller than the second and neither below 0, or None to refresh every layer that is due. "
            f"Got {choice!r}."
        )
    rule = TraceRule(float(thresholds[0]), float(thresholds[1]))
    return None if rule.update_above == 0 else rule


def decide(rule: TraceRule, old: Tensor, new: Tensor) -> Tensor:
    """Compare traces; no device sync.

    Args:
        rule: the thresholds.
        old: tr(F + λI) of the curvature in use, ``[layers]``; 0 for a layer that has none yet.
        new: of the curvature that would follow it, ``[layers]``; a number that is not finite keeps the old one.

    Returns:
        ``KEEP``, ``UPDATE`` or ``STOP`` for each layer, ``[layers]``, int8.

    >>> decide(TraceRule(0.1, 0.01), torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.2, 1.05, 1.001]))
    tensor([1, 1, 0, 2], dtype=torch.int8)
    """
    change = (new - old).abs() / old
    decision = torch.where(change < rule.stop_below, STOP, KEEP)
    decision = torch.where(change > rule.update_above, UPDATE, decision)
    return torch.where(torch.isfinite(new), decision, KEEP).to(torch.int8)
