"""Operations that a training step sends to a GPU, counted on any machine.

    python -m benchmarks.launches          # prints tables
    python -m benchmarks.launches --write  # and writes benchmarks/results/launches.json, the limits that a test holds

A network on the CPU takes the ways that the package chooses on a GPU. Counted is each operator that would launch at
least one kernel there; not views, metadata and allocations. A foreach operation counts once, although a GPU may need
several kernels for a long list; one that torch takes apart, since its pairs differ in form, once for each pair. What
THOR adds is split where it adds it: in forward and backward, by its hooks, and in the step. A staggered step is the
mean over one interval.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.contenders import Stepper, muon
from benchmarks.common.environment import RESULTS
from benchmarks.common.models import ViT, resnet50
from benchmarks.common.tables import markdown_table, rich_table
from benchmarks.common.workloads import Workload, images, tokens
from examples.char_gpt import CharGPT
from lightning_thor import Curvature, Thor
from lightning_thor.layers import norm
from lightning_thor.linalg import block_diagonal, memory
from lightning_thor.preconditioning import directions, grouping

INTERVAL = 10
WORKLOADS = {
    "gpt": Workload(lambda: CharGPT(layers=12, width=128, heads=4, context=16), tokens(2, 16), "GPT, 12 layers", True),
    "vit": Workload(lambda: ViT(12, 128, 4), images(2), "ViT, 12 layers"),
    "resnet50": Workload(lambda: resnet50(64), images(2), "ResNet-50"),
}
MODES = ("natural", "polar", "adam")
OTHERS: Mapping[str, Callable[[nn.Module], Stepper]] = {
    "SGD, foreach": lambda model: torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, foreach=True
    ),
    "AdamW, foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
    "Muon": lambda model: muon(model, 1e-3, {}, per_position=True),
}
RESULT = RESULTS / "launches.json"
HEADS = ("per step", "parameters refreshed", "forward and backward", "step")

WITHOUT_KERNELS = {
    "_local_scalar_dense",
    "_record_function_enter_new",
    "_record_function_exit",
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
}
"""Operators that launch nothing though their schema does not say that they are views. (Reading a number waits, but
launches nothing; AdamW reads its steps, which are on the CPU.)"""


def n_kernels(lists: Sequence[Any]) -> int:
    """The least number of kernels of a foreach operation: torch fuses it where the tensors of each pair are alike."""
    pairs = [each for each in lists if isinstance(each, list) and isinstance(each[0], torch.Tensor)]
    forms = [[(x.shape, x.dtype) for x in each] for each in pairs]
    return 1 if forms.count(forms[0]) == len(forms) else len(forms[0])


class Launches(TorchDispatchMode):
    """Counts the operators that launch kernels.

    Attributes:
        called: how often, by name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.called: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in WITHOUT_KERNELS:
            self.called[name] += n_kernels(args) if name.startswith("_foreach") else 1
        return func(*args, **(kwargs or {}))


class Counts(NamedTuple):
    """Launches of one kind of step."""

    refreshed: float
    """Parameters whose factors are inverted."""
    passes: float
    """In forward and backward."""
    step: float
    """In ``optimizer.step()``."""


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """A context in which tensors on the CPU take the ways of those on a GPU."""
    of_the_cpu: Sequence[Any] = (
        memory.HOST, memory.UNMERGED_DEVICES, block_diagonal.UNBATCHED_DEVICES, norm.UNFUSED_DEVICES
    )  # fmt: skip
    chunks: Sequence[Any] = (grouping.ROW_CHUNK_NUMEL, directions.DIRECTION_CHUNK_NUMEL)
    lengths = [each.pop("cpu") for each in chunks]
    for devices in of_the_cpu:
        devices.remove("cpu")
    try:
        yield
    finally:
        for each, length in zip(chunks, lengths, strict=True):
            each["cpu"] = length
        for devices in of_the_cpu:
            devices.add("cpu")


def launches_of(run: Callable[[], Any]) -> int:
    """The launches of a function."""
    with Launches() as launches:
        run()
    return sum(launches.called.values())


def steps(
    model: nn.Module, workload: Workload, optimizer: Stepper, curvature: Curvature | None = None
) -> Iterator[Counts]:
    """Train on random batches for ever.

    Args:
        model: of the workload.
        workload: has the batches.
        optimizer: of the model.
        curvature: the optimizer's, if it has one.

    Yields:
        The counts of each step.
    """
    while True:
        inputs, targets = workload.batch()

        def passes(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> None:
            F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()

        refreshed = 0 if curvature is None else len(curvature.due_parameters())
        yield Counts(refreshed, launches_of(passes), launches_of(optimizer.step))
        optimizer.zero_grad()


def count(workload: Workload, modes: Sequence[str] = MODES, *, staggered: bool = True) -> dict[str, Counts]:
    """Count the launches of all kinds of steps.

    Args:
        workload: a network and its batches.
        modes: of THOR.
        staggered: count staggered steps too, which takes most of the time.

    Returns:
        By kind of step; of forward and backward what is more than SGD's.
    """
    counts: dict[str, Counts] = {}

    def of(build: Callable[[nn.Module], tuple[Stepper, Curvature | None]], n: int) -> list[Counts]:
        torch.manual_seed(0)
        model = workload.model()
        # The first step makes momenta and checks pairs.
        found = list(islice(steps(model, workload, *build(model)), n + 1))[1:]
        base = next(iter(counts.values())).passes if counts else 0.0
        return [one._replace(passes=one.passes - base) for one in found]

    def alone(build: Callable[[nn.Module], Stepper]) -> Callable[[nn.Module], tuple[Stepper, None]]:
        return lambda model: (build(model), None)

    def thor(mode: str, every: int, stagger: bool) -> Callable[[nn.Module], tuple[Stepper, Curvature]]:
        def build(model: nn.Module) -> tuple[Stepper, Curvature]:
            curvature = Curvature(model, mode=mode, update_every_n_steps=every, stagger=stagger)
            return Thor(model.parameters(), mode=mode, preconditioner=curvature), curvature

        return build

    with as_on_a_gpu():
        for name, build in OTHERS.items():
            (counts[name],) = of(alone(build), 1)
        for mode in modes:
            counts[f"{mode}, plain"], counts[f"{mode}, refresh"] = of(thor(mode, 2, False), 2)
            if staggered:
                each = of(thor(mode, INTERVAL, True), INTERVAL)
                counts[f"{mode}, staggered"] = Counts(*(fmean(numbers) for numbers in zip(*each, strict=True)))
    return counts


def cells(counts: Mapping[str, Counts]) -> Iterator[tuple[str, ...]]:
    """One row under ``HEADS`` for each kind of step."""
    for name, one in counts.items():
        of_passes = f"{one.passes:.0f}" if name == next(iter(counts)) else f"{one.passes:+.0f}"
        yield name, f"{one.refreshed:.0f}", of_passes, f"{one.step:.0f}"


def block(results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The table of docs/performance.md, from ``benchmarks/results/launches.json``."""
    heads = ("per step", *(WORKLOADS[name].words for name in results))
    kinds = next(iter(results.values()))
    rows = []
    for kind in kinds:
        each = [Counts(*results[name][kind]) for name in results]
        rows.append([kind, *(f"{one.passes:.0f} + {one.step:.0f}" for one in each)])
    return markdown_table(heads, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--write", action="store_true", help="write the counts of these networks into the file")
    args = parser.parse_args(arguments)
    console, stored = Console(), json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    for name in args.workload:
        with console.status(name):
            counts = count(WORKLOADS[name])
        console.print(rich_table(f"{WORKLOADS[name].words}: launches", HEADS, cells(counts)))
        stored[name] = counts
    if args.write:
        RESULT.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
