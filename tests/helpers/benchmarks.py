"""The commands of the benchmarks, and made-up figures of a made-up machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.step_cost import figures, parts

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
ENVIRONMENT = {"device": "cpu", "cpu": "A processor", "threads": 2, "torch": "9.9", "malloc": "", "date": "2026-01-02"}


def step_seconds() -> dict[str, Any]:
    """What `benchmarks.step_cost.rounds.measure` gives, on a machine that is ten times slower in its second half."""
    slow, kinds = [1.0, 1.0, 10.0, 10.0], [True, False, True, False]
    thor = [(4.0 if is_refresh else 2.0) * s for is_refresh, s in zip(kinds, slow, strict=True)]
    seconds = {"adamw": [1.5 * s for s in slow], "thor": thor, "thor_staggered": [2.5 * s for s in slow]}
    return {
        "seconds": {"sgd": slow, **seconds},
        "refreshes": {"thor": kinds},
        "state_bytes": {"sgd": 10, "adamw": 20, "thor": 35},
        "parameter_bytes": 10,
    }


def step_cost() -> dict[str, Any]:
    """What ``python -m benchmarks.step_cost`` writes of one workload."""
    shares, floor = (dict.fromkeys(parts.PARTS, share) for share in (0.2, 0.1))
    return {
        "words": "a made-up \\g<0> network",
        "environment": ENVIRONMENT,
        "summary": figures.summarise(step_seconds()),
        "parts": {"parts": shares, "floor": floor, "gflops": 10.0},
        "memory": {"adamw": 20, "thor": 30},
    }
