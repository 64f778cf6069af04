"""The cost of one training step (forward, backward, optimizer), as a ratio to momentum SGD.

One process holds one copy of the model for each optimizer. In every round each takes one step on the same batch, in an
order that is rotated, so a machine that slows down slows all of them. Ratios are taken within a round, then the median
over rounds. THOR's steps are of two kinds, told apart by ``Curvature.is_due()`` before the step: *plain* ones only
precondition, *refresh* ones also observe and invert. Staggered THOR refreshes some layers at each step of its interval.
Afterwards, apart from these steps: what a refresh goes into and its floor (``step_parts.py``), and memory
(``memory.py``).

    python -m benchmarks.step_cost --workload gpt --rounds 60 --peers --memory
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common.environment import RESULTS, environment, use
from benchmarks.step_cost.figures import HEADS, PARTS_HEADS, cells, parts_cells, rounded, summarise, table
from benchmarks.step_cost.memory import growth
from benchmarks.step_cost.parts import measure_parts
from benchmarks.step_cost.workloads import MEASURED_INTERVAL, WORKLOADS, Runner, Workload, runner

BATCHES = 8
OPTIMIZERS = ("sgd", "adamw", "thor", "thor_staggered")
PEERS = ("singd",)
OF_MEMORY = ("adamw", "thor")
TRIES = 5
OF_TWO_KINDS = ("thor", *PEERS)


def usual_growth(workload: str, optimizer: str, scale: str, threads: int | None) -> float | None:
    """`growth`, of a CPU the median of `TRIES`: what its allocator keeps for later differs from process to process."""
    tries = [growth(workload, optimizer, scale, threads) for _ in range(TRIES if scale == "cpu" else 1)]
    found = [n_bytes for n_bytes in tries if n_bytes is not None]
    return statistics.median(found) if found else None


def make_batches(workload: Workload, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The batches that all optimizers take in turn."""
    torch.manual_seed(0)
    made = [workload.batch() for _ in range(BATCHES)]
    return [(inputs.to(device), targets.to(device)) for inputs, targets in made]


def measure(workload: Workload, rounds: int, device: torch.device, names: Sequence[str] = OPTIMIZERS) -> dict[str, Any]:
    """Time ``rounds`` rounds: per round the seconds of each optimizer, and which steps of the two kinds refreshed."""
    batches = make_batches(workload, device)
    runners = {name: runner(name, workload, device) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    refreshes: dict[str, list[bool]] = {name: [] for name in names if name in OF_TWO_KINDS}
    warm_up = 2 * MEASURED_INTERVAL
    for number, order in enumerate(rotations(names, warm_up + rounds)):
        inputs, targets = batches[number % BATCHES]
        due = {name: runners[name].is_due() for name in refreshes}
        taken = {name: runners[name].step(inputs, targets) for name in order}
        if number < warm_up:
            continue
        for name in names:
            seconds[name].append(taken[name])
        for name, is_refresh in due.items():
            refreshes[name].append(is_refresh)
    return {
        "seconds": seconds,
        "refreshes": refreshes,
        "state_bytes": {name: state_bytes(one) for name, one in runners.items() if name not in PEERS},
        "parameter_bytes": sum(p.numel() * p.element_size() for p in runners["sgd"].model.parameters()),
    }


def rotations(names: Sequence[str], count: int) -> Iterator[Sequence[str]]:
    """``names`` in a rotated order, ``count`` times.

    >>> list(rotations("abc", 3))
    ['abc', 'bca', 'cab']
    """
    for number in range(count):
        shift = number % len(names)
        yield names[shift:] + names[:shift]  # type: ignore[operator]  # a str or a tuple: both add


def state_bytes(one: Runner) -> int:
    """Bytes of all tensors that a checkpoint of the optimizer, and of the curvature if there is one, holds."""
    assert isinstance(one.optimizer, torch.optim.Optimizer)
    kept: list[Any] = [one.optimizer.state_dict()["state"]]
    if one.curvature is not None:
        kept.append(one.curvature.state_dict())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(kept))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for part in value.values() for tensor in tensors_in(part))
    elif isinstance(value, list | tuple):
        yield from (tensor for part in value for tensor in tensors_in(part))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, merge the workloads measured now into the JSON file, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS["cpu"], nargs="+", default=list(WORKLOADS["cpu"]))
    parser.add_argument("--scale", choices=WORKLOADS, default="cpu", help="sizes for two cores, or for a GPU")
    parser.add_argument("--rounds", type=int, default=60, help="timed rounds per workload; half of them are refreshes")
    parser.add_argument("--peers", action="store_true", help="time SINGD (a K-FAC, of the package index) as well")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, in processes of their own")
    parser.add_argument("--threads", type=int, help="torch threads (default: as torch has it)")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    said = parser.parse_args(arguments)
    if said.threads is not None:
        torch.set_num_threads(said.threads)
    warnings.filterwarnings("ignore", module="singd")
    device = use(said.scale)
    out = said.out or RESULTS / ("step_cost.json" if said.scale == "cpu" else f"step_cost_{said.scale}.json")
    results = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    console = Console()
    for name in said.workload:
        workload = WORKLOADS[said.scale][name]
        with console.status(f"{name}: {said.rounds} rounds"):
            measured = measure(workload, said.rounds, device, OPTIMIZERS + (PEERS if said.peers else ()))
            parts = measure_parts(workload, make_batches(workload, device), max(2, said.rounds // 4), device)
            memory = {one: usual_growth(name, one, said.scale, said.threads) for one in OF_MEMORY if said.memory}
        result = {"summary": summarise(measured), "parts": parts, "memory": memory}
        results[name] = {"words": workload.words, "environment": environment(device), **rounded(result)}
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = (f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in results.items())
        out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    title = "Cost of a step, ratio to momentum SGD: median (first to third quartile)"
    console.print(table(title, HEADS, cells(results)))
    title = "What a refresh step adds to SGD's, as shares of it, and what its arithmetic alone would take (≥)"
    console.print(table(title, PARTS_HEADS, parts_cells(results)))


if __name__ == "__main__":
    main()
