"""Whole training steps, timed in rounds in which each optimizer takes one step on the same batch, or one interval."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.environment import seconds_of
from benchmarks.common.workloads import Batch, Workload
from benchmarks.step_cost.workloads import MEASURED_INTERVAL, STAGGERED_INTERVAL, Runner, make_runner

BATCHES = 8
OPTIMIZERS = ("sgd", "adamw", "thor", "thor_staggered")
PEERS = ("singd",)
OF_TWO_KINDS = ("thor", *PEERS)
"""The optimizers with plain steps and refresh steps."""


def make_batches(workload: Workload, device: torch.device) -> list[Batch]:
    """Make the batches that all optimizers take in turn."""
    torch.manual_seed(0)
    made = [workload.batch() for _ in range(BATCHES)]
    return [(inputs.to(device), targets.to(device)) for inputs, targets in made]


def measure(workload: Workload, rounds: int, device: torch.device, names: Sequence[str] = OPTIMIZERS) -> dict[str, Any]:
    """Time ``rounds`` rounds of steps of the optimizers ``names``, after some that warm up.

    Returns:
        By optimizer: ``"seconds"`` of each round, ``"refreshes"``, which steps of the two kinds refreshed, and
        ``"state_bytes"``; and ``"parameter_bytes"`` of the model.
    """
    batches = make_batches(workload, device)
    runners = {name: make_runner(name, workload, device) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    refreshes: dict[str, list[bool]] = {name: [] for name in names if name in OF_TWO_KINDS}
    warm_up = 2 * MEASURED_INTERVAL
    for number, order in enumerate(rotations(names, warm_up + rounds)):
        inputs, targets = batches[number % BATCHES]
        due = {name: runners[name].is_due() for name in refreshes}
        taken = {name: seconds_of(partial(runners[name].step, inputs, targets), device) for name in order}
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


def measure_intervals(
    workload: Workload, rounds: int, device: torch.device, names: Sequence[str] = OPTIMIZERS
) -> dict[str, list[float]]:
    """Time whole intervals of ``STAGGERED_INTERVAL`` steps, in which nothing waits for the device, as in training: what
    the host does meanwhile costs nothing where the device has more to do.

    Returns:
        By optimizer: seconds of each of ``rounds`` intervals, after one that warms up.
    """
    batches = make_batches(workload, device)
    runners = {name: make_runner(name, workload, device, STAGGERED_INTERVAL) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def interval(name: str) -> None:
        for number in range(STAGGERED_INTERVAL):
            runners[name].step(*batches[number % BATCHES])

    for number, order in enumerate(rotations(names, 1 + rounds)):
        for name in order:
            taken = seconds_of(partial(interval, name), device)
            if number:
                seconds[name].append(taken)
    return seconds


def rotations(names: Sequence[str], count: int) -> Iterator[Sequence[str]]:
    """Yield ``names`` in a rotated order, ``count`` times.

    >>> list(rotations("abc", 3))
    ['abc', 'bca', 'cab']
    """
    for number in range(count):
        shift = number % len(names)
        yield names[shift:] + names[:shift]  # type: ignore[operator]  # a str or a tuple: both add


def state_bytes(one: Runner) -> int:
    """Bytes of all tensors in a checkpoint of the optimizer, and of its curvature if there is one."""
    assert isinstance(one.optimizer, torch.optim.Optimizer)
    states: list[Any] = [one.optimizer.state_dict()["state"]]
    if one.curvature is not None:
        states.append(one.curvature.state_dict())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(states))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        yield from (tensor for part in value for tensor in tensors_in(part))
