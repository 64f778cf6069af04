"""What THOR costs a compiled model where no layer is due: forward and backward beside the same model without it.

    python -m benchmarks.compiled_step          # prints a table
    python -m benchmarks.compiled_step --write  # and writes benchmarks/results/compiled_step.json

In every round each of two copies of a compiled network, one with a `Curvature` that has refreshed, takes the same batch
forward and backward, in alternating order. Figures are ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common.environment import RESULTS, environment, prepare_device, seconds_of
from benchmarks.common.tables import rich_table
from benchmarks.step_cost.workloads import CPU
from lightning_thor import Curvature

RESULT = RESULTS / "compiled_step.json"
HEADS = ("network", "without, ms", "with / without (quartiles)")
ROUNDS = {"mlp": 1000, "vit": 60, "gpt": 30}
NEVER = 10**9


def passes(model: Any, inputs: Tensor, targets: Tensor) -> None:
    """Run forward and backward."""
    F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()


def ratios(name: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Time one workload.

    Args:
        name: of a workload of ``benchmarks.step_cost``.
        rounds: after the first three, in which both models are compiled.
        device: to compute on.

    Returns:
        Milliseconds without THOR, and the quartiles of the ratio.
    """
    workload = CPU[name]
    torch.manual_seed(0)
    bare = workload.model().to(device)
    observed = copy.deepcopy(bare)
    curvature = Curvature(observed, update_every_n_steps=NEVER)
    compiled = [torch.compile(model) for model in (bare, observed)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(3 + rounds):
        inputs, targets = (one.to(device) for one in workload.batch())
        for place in (0, 1) if number % 2 else (1, 0):
            taken = seconds_of(partial(passes, compiled[place], inputs, targets), device)
            if number >= 3:
                seconds[place].append(taken)
        if number == 0:
            curvature.update()  # refreshes every layer, and none again
        for model in (bare, observed):
            model.zero_grad()
    own = [mine / other for other, mine in zip(*seconds, strict=True)]
    return {"ms": 1000 * statistics.median(seconds[0]), "ratio": statistics.quantiles(own, n=4), "rounds": rounds}


def cells(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row under ``HEADS`` for each network."""
    return [
        (CPU[name].words, f"{one['ms']:.1f}", "{1:.3f} ({0:.2f} to {2:.2f})".format(*one["ratio"]))
        for name, one in results.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=ROUNDS, nargs="+", default=list(ROUNDS))
    parser.add_argument("--rounds", type=int, help="timed rounds (default: by workload)")
    parser.add_argument("--write", action="store_true", help="write the figures of these networks into the file")
    args = parser.parse_args(arguments)
    console, device = Console(), prepare_device("cpu")
    stored: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    found: dict[str, Any] = {}
    for name in args.workload:
        with console.status(name):
            found[name] = {**ratios(name, args.rounds or ROUNDS[name], device), "environment": environment(device)}
    console.print(rich_table("Compiled forward and backward, no layer due", HEADS, cells(found)))
    if args.write:
        RESULT.write_text(json.dumps(stored | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
