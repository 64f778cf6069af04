"""Trainings in a plain loop, one or several in turns: the same schedule, weight decay and clock for every optimizer."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.common.contenders import Contender, Stepper, decayed
from benchmarks.common.environment import synchronise
from benchmarks.time_to_target.tasks import Batch, Data, Task

WARM_UP_SHARE = 0.05
ROWS_AT_ONCE = 500


def shape(step: int, steps: int) -> float:
    """The learning rate at ``step`` of ``steps`` over its peak: a linear rise, then half a cosine down towards 0.

    >>> shape(0, 100), shape(4, 100), shape(99, 100) < 0.001
    (0.2, 1.0, True)
    """
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warm_up) / (steps - warm_up + 1)))


def check_steps(steps: int, checks: int) -> list[int]:
    """After which steps the metric is taken: ``checks`` of them, evenly spaced, the last one included.

    >>> check_steps(10, 3)
    [3, 7, 10]
    """
    return sorted({round(steps * (i + 1) / checks) for i in range(checks)} - {0})


def train(
    task: Task, data: Data, contender: Contender, lr: float, *, seed: int, tuning: bool, device: torch.device
) -> dict[str, Any]:
    """One training, see `train_in_turns`."""
    alone = {"": (contender, lr)}
    return train_in_turns(task, data, alone, seed=seed, tuning=tuning, device=device)[""]


def train_in_turns(
    task: Task,
    data: Data,
    contenders: Mapping[str, tuple[Contender, float]],
    *,
    seed: int,
    tuning: bool,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """The metric and the seconds of training at each check, of each contender.

    They take turns, each from one check to the next, so that a machine that is slower for a while is slower for all.
    Each has a clock of its own, which runs from before the optimizer is built, so that it sees all that an optimizer
    costs, and stands still while the metric is taken. A training whose loss is not finite at a check, or whose
    optimizer gives up in linear algebra, ends there: its last value is None.

    Args:
        task: what to train.
        data: from ``task.data``, on ``device``.
        contenders: each optimizer with its peak learning rate.
        seed: decides the initial weights and the batches, the same for all.
        tuning: a shorter training, judged by the validation split instead of the test split.
        device: on which to train; bfloat16 autocast on a GPU.
    """
    turns = {name: _checks(task, data, *own, seed, tuning, device) for name, own in contenders.items()}
    records: dict[str, dict[str, Any]] = {name: {"values": [], "seconds": []} for name in contenders}
    while turns:
        for name, turn in list(turns.items()):
            check = next(turn, None)
            if check is None:
                del turns[name]
                continue
            records[name]["values"].append(check[0])
            records[name]["seconds"].append(round(check[1], 3))
    return records


def _checks(
    task: Task, data: Data, contender: Contender, lr: float, seed: int, tuning: bool, device: torch.device
) -> Iterator[tuple[float | None, float]]:
    """Of one training: the metric, None where it is not finite, and the seconds so far, at each check."""
    steps = task.tuning_steps if tuning else task.steps
    checks = check_steps(steps, 1 if tuning else task.checks)
    held_out = data.validation if tuning else data.test
    torch.manual_seed(seed)
    model = task.model().to(device).train()
    generator = torch.Generator(device).manual_seed(seed)
    seconds, started = 0.0, time.perf_counter()
    optimizer = contender.build(model, lr, contender.options, task.per_position)
    peaks = [group["lr"] for group in optimizer.param_groups]
    weights = decayed(model)
    for step in range(steps):
        now = shape(step, steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * now
        try:
            take_step(model, optimizer, task, data.draw(generator))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not declare it
            yield None, seconds
            return
        if task.decay:
            with torch.no_grad():
                torch._foreach_mul_(weights, 1 - task.decay * now)
        if step + 1 in checks:
            synchronise(device)
            seconds += time.perf_counter() - started
            value = evaluate(model, task, held_out)
            finite = math.isfinite(value)
            yield round(value, 5) if finite else None, seconds
            if not finite:
                return
            synchronise(device)
            started = time.perf_counter()


def take_step(model: torch.nn.Module, optimizer: Stepper, task: Task, batch: Batch) -> None:
    """Forward, backward, optimizer."""
    inputs, targets = batch
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=inputs.device.type == "cuda"):
        loss = task.loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: torch.nn.Module, task: Task, held_out: Batch) -> float:
    """The metric over all rows of ``held_out``; the model is in training mode before and after."""
    model.eval()
    parts = list(zip(*(part.split(ROWS_AT_ONCE) for part in held_out), strict=True))
    scores = torch.stack([task.score(model(inputs), targets).double() for inputs, targets in parts])
    rows: Sequence[int] = [len(inputs) for inputs, _ in parts]
    model.train()
    return float((scores * torch.tensor(rows, device=scores.device)).sum() / sum(rows))
