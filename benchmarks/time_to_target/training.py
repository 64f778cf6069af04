"""Trainings in a plain loop, one or several in turns: the same schedule, weight decay and clock for every optimizer."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.common.contenders import Contender, Stepper
from benchmarks.common.environment import synchronise
from benchmarks.common.workloads import Batch
from benchmarks.time_to_target.tasks import Data, Task

WARM_UP_SHARE = 0.05
EVALUATION_CHUNK_ROWS = 500


def lr_share(step: int, steps: int) -> float:
    """The learning rate at ``step`` of ``steps`` over its peak: a linear rise, then half a cosine down towards 0.

    >>> lr_share(0, 100), lr_share(4, 100), lr_share(99, 100) < 0.001
    (0.2, 1.0, True)
    """
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warm_up) / (steps - warm_up + 1)))


def check_steps(steps: int, checks: int) -> list[int]:
    """The steps after which the metric is taken: ``checks`` of ``steps``, evenly spaced, the last one included.

    >>> check_steps(10, 3)
    [3, 7, 10]
    """
    return sorted({round(steps * (i + 1) / checks) for i in range(checks)} - {0})


def train(
    task: Task, data: Data, contender: Contender, lr: float, *, seed: int, tuning: bool, device: torch.device
) -> dict[str, Any]:
    """Train one contender at peak rate ``lr``; other arguments and the record are those of `train_in_turns`."""
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
    """Train several contenders, each in turn from one check to the next, so a slow machine slows all of them.

    Each contender has its own clock. It starts before the optimizer is built, so it counts all costs of an optimizer,
    and stands still while the metric is taken. A training ends early, with a last value of None, if its loss is not
    finite at a check or its optimizer raises an error of linear algebra.

    Args:
        task: what to train.
        data: from ``task.data``, on ``device``.
        contenders: each optimizer with its peak learning rate.
        seed: decides the initial weights and the batches, the same for all.
        tuning: a shorter training, judged by the validation split instead of the test split.
        device: on which to train; bfloat16 autocast on a GPU.

    Returns:
        By contender: ``"values"``, the metric, and ``"seconds"`` of training so far, at each check.
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
    """Train one contender; yields the metric (None if it is not finite) and the seconds so far at each check."""
    steps = task.tuning_steps if tuning else task.steps
    checks = check_steps(steps, 1 if tuning else task.checks)
    held_out = data.validation if tuning else data.test
    torch.manual_seed(seed)
    model = task.model().to(device).train()
    generator = torch.Generator(device).manual_seed(seed)
    seconds, started = 0.0, time.perf_counter()
    optimizer = contender.build(model, lr, contender.options, task.per_position)
    peaks = [group["lr"] for group in optimizer.param_groups]
    decayed: list[torch.Tensor] = [p for p in model.parameters() if p.dim() >= 2]
    for step in range(steps):
        share = lr_share(step, steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        try:
            take_step(model, optimizer, task, data.draw(generator))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not declare it
            yield None, seconds
            return
        if task.decay:
            with torch.no_grad():
                torch._foreach_mul_(decayed, 1 - task.decay * share)
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
    """Run forward, backward and the optimizer on one batch."""
    inputs, targets = batch
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=inputs.device.type == "cuda"):
        loss = task.loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: torch.nn.Module, task: Task, held_out: Batch) -> float:
    """The metric's mean over all rows of ``held_out``, in evaluation mode."""
    model.eval()
    chunks = list(zip(*(part.split(EVALUATION_CHUNK_ROWS) for part in held_out), strict=True))
    scores = torch.stack([task.score(model(inputs), targets).double() for inputs, targets in chunks])
    n_rows = torch.tensor([len(inputs) for inputs, _ in chunks], device=scores.device)
    model.train()
    return float((scores * n_rows).sum() / n_rows.sum())
