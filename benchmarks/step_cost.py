"""The cost of one training step (forward, backward, optimizer), as a ratio to momentum SGD.

One process holds one copy of the model for each optimizer. In every round each takes one step on the same batch, in an
order that is rotated, so a machine that slows down slows all of them. Ratios are taken within a round, then the median
over rounds. THOR's steps are of two kinds, told apart by ``Curvature.is_due()`` before the step: *plain* ones only
precondition, *refresh* ones also observe and invert.

    python -m benchmarks.step_cost --workload gpt --rounds 60
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.environment import RESULTS, environment, synchronise
from examples.char_gpt import CharGPT
from examples.resnet import ResNet18
from lightning_thor import Curvature, Thor

# Between refreshes that are timed. The cost of either kind of step does not depend on it, so a short interval measures
# both equally often; the figures for REPORTED_INTERVAL weigh the two kinds as that interval mixes them.
MEASURED_INTERVAL = 2
REPORTED_INTERVAL = 10
BATCHES = 8
OPTIMIZERS = ("sgd", "adamw", "thor")
KINDS = ("adamw", "thor_plain", "thor_refresh")
HEADS = (
    "workload",
    "SGD, ms",
    "AdamW",
    "THOR, plain step",
    "THOR, refresh step",
    f"THOR, every {REPORTED_INTERVAL}",
    "p99 / p50",
    "state",
)


@dataclass
class Workload:
    """A model, and batches ``(inputs, targets)`` made once; the model gives logits with the classes last."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    words: str


def mlp() -> nn.Module:
    """784 inputs, three hidden layers of 512, 10 classes."""
    widths = (784, 512, 512, 512)
    hidden = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(512, 10))


WORKLOADS = {
    "mlp": Workload(
        mlp, lambda: (torch.randn(128, 784), torch.randint(10, (128,))), "MLP 784-512-512-512-10, batch 128"
    ),
    "resnet18": Workload(
        lambda: ResNet18(width=32),
        lambda: (torch.randn(64, 3, 32, 32), torch.randint(10, (64,))),
        "ResNet-18, width 32, batch 64 of 32×32",
    ),
    "gpt": Workload(
        CharGPT,
        lambda: (torch.randint(65, (16, 128)), torch.randint(65, (16, 128))),
        "GPT, 4 layers, width 128, 2,048 tokens",
    ),
}


@dataclass
class Runner:
    """One optimizer with its own copy of the model."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    curvature: Curvature | None = None

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One training step; its seconds."""
        synchronise(inputs.device)
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronise(inputs.device)
        return time.perf_counter() - start


def runner(name: str, workload: Workload, device: torch.device) -> Runner:
    """The optimizer called ``name`` (one of ``OPTIMIZERS``) at its defaults, on a fresh model from one seed."""
    torch.manual_seed(0)
    model = workload.model().to(device).train()
    if name == "sgd":
        return Runner(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
    if name == "adamw":
        return Runner(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    curvature = Curvature(model, update_every_n_steps=MEASURED_INTERVAL)
    return Runner(model, Thor(model.parameters(), lr=1e-3, preconditioner=curvature), curvature)


def measure(workload: Workload, rounds: int, device: torch.device) -> dict[str, Any]:
    """Time ``rounds`` rounds; per round the seconds of SGD, AdamW and THOR, and whether THOR's step was a refresh."""
    torch.manual_seed(0)
    batches = [tuple(part.to(device) for part in workload.batch()) for _ in range(BATCHES)]
    runners = {name: runner(name, workload, device) for name in OPTIMIZERS}
    thor = runners["thor"].curvature
    assert thor is not None
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    refreshes: list[bool] = []
    warm_up = 2 * MEASURED_INTERVAL
    for number, order in enumerate(rotations(OPTIMIZERS, warm_up + rounds)):
        inputs, targets = batches[number % BATCHES]
        is_refresh = thor.is_due()
        taken = {name: runners[name].step(inputs, targets) for name in order}
        if number < warm_up:
            continue
        refreshes.append(is_refresh)
        for name in OPTIMIZERS:
            seconds[name].append(taken[name])
    return {
        "seconds": {name: [round(s, 6) for s in values] for name, values in seconds.items()},
        "refreshes": refreshes,
        "state_bytes": {name: state_bytes(one) for name, one in runners.items()},
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


def summarise(measured: dict[str, Any], interval: int = REPORTED_INTERVAL) -> dict[str, Any]:
    """Ratios to momentum SGD: ``[first quartile, median, third quartile]`` for each of ``KINDS``, and THOR's mixture.

    ``amortised`` is the mean cost at ``interval``: ``((interval - 1) * plain + refresh) / interval`` of the medians.
    ``p99_over_p50`` is how uneven THOR's steps are at that interval: 1 for steps that all take the same time.
    """
    seconds, refreshes = measured["seconds"], measured["refreshes"]
    thor = list(zip(seconds["thor"], seconds["sgd"], refreshes, strict=True))
    ratios = {
        "adamw": [a / s for a, s in zip(seconds["adamw"], seconds["sgd"], strict=True)],
        "thor_plain": [t / s for t, s, is_refresh in thor if not is_refresh],
        "thor_refresh": [t / s for t, s, is_refresh in thor if is_refresh],
    }
    for kind, values in ratios.items():
        if not values:
            raise ValueError(f"No step of the kind {kind!r} was timed: take more rounds than {len(refreshes)}.")
    quartiles = {kind: quantiles(values, [1.0] * len(values), (0.25, 0.5, 0.75)) for kind, values in ratios.items()}
    plain, refresh = (quartiles[kind][1] for kind in ("thor_plain", "thor_refresh"))
    share = {False: (1 - 1 / interval) / refreshes.count(False), True: 1 / interval / refreshes.count(True)}
    p50, p99 = quantiles(seconds["thor"], [share[is_refresh] for is_refresh in refreshes], (0.5, 0.99))
    return {
        "interval": interval,
        "sgd_milliseconds": 1e3 * quantiles(seconds["sgd"], [1.0] * len(refreshes), (0.5,))[0],
        **quartiles,
        "amortised": ((interval - 1) * plain + refresh) / interval,
        "p99_over_p50": p99 / p50,
        "state_over_parameters": {k: v / measured["parameter_bytes"] for k, v in measured["state_bytes"].items()},
    }


def quantiles(values: list[float], weights: list[float], shares: Sequence[float]) -> list[float]:
    """Weighted quantiles: for each of ``shares`` the smallest value with at least that share of the weight up to it.

    >>> quantiles([3.0, 1.0, 2.0], [1.0, 1.0, 1.0], (0.25, 0.5, 1.0))
    [1.0, 2.0, 3.0]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    cumulated = torch.tensor([weights[i] for i in order], dtype=torch.float64).cumsum(0)
    places = torch.searchsorted(cumulated, torch.tensor(shares, dtype=torch.float64) * cumulated[-1]).tolist()
    return [values[order[place]] for place in places]


def cells(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row of ``HEADS`` for each workload, in words; the terminal and the README show the same."""
    for result in results.values():
        summary = result["summary"]
        yield (
            result["words"],
            f"{summary['sgd_milliseconds']:.1f}",
            *(f"{mid:.2f} ({low:.2f}–{high:.2f})" for low, mid, high in (summary[kind] for kind in KINDS)),
            f"{summary['amortised']:.2f}",
            f"{summary['p99_over_p50']:.2f}",
            " / ".join(f"{summary['state_over_parameters'][name]:.1f}" for name in OPTIMIZERS),
        )


def table(results: dict[str, Any]) -> Table:
    """The summaries of all measured workloads, for a terminal."""
    out = Table(title="Cost of a step, ratio to momentum SGD: median (first to third quartile)")
    for i, head in enumerate(HEADS):
        out.add_column(head, justify="left" if i == 0 else "right")
    for row in cells(results):
        out.add_row(*row)
    out.caption = "State: bytes that a checkpoint holds of it, over bytes of the parameters; SGD / AdamW / THOR."
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, merge the workloads measured now into the JSON file, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=60, help="timed rounds per workload; half of them are refreshes")
    parser.add_argument("--threads", type=int, help="torch threads (default: as torch has it)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_cost.json")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    console = Console()
    for name in options.workload:
        with console.status(f"{name}: {options.rounds} rounds"):
            measured = measure(WORKLOADS[name], options.rounds, device)
        results[name] = {
            "words": WORKLOADS[name].words,
            "environment": environment(device),
            "summary": summarise(measured),
            **measured,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        lines = (f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in results.items())
        options.out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    console.print(table(results))


if __name__ == "__main__":
    main()
