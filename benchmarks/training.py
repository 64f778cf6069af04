"""One training in a plain loop: the same schedule, weight decay and clock for every optimizer."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.contenders import Contender, Stepper, decayed
from benchmarks.environment import synchronise
from benchmarks.tasks import Batch, Data, Task

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
    """The metric and the seconds of training at each check.

    The clock runs from before the optimizer is built, so it sees all that an optimizer costs, and stands still while
    the metric is taken. A training whose loss is not finite at a check, or whose optimizer gives up in linear algebra,
    ends there: its last value is None.

    Args:
        task: what to train.
        data: from ``task.data``, on ``device``.
        contender: the optimizer.
        lr: its peak learning rate.
        seed: decides the initial weights and the batches, and nothing about the optimizer.
        tuning: a shorter training, judged by the validation split instead of the test split.
        device: on which to train; bfloat16 autocast on a GPU.
    """
    steps = task.tuning_steps if tuning else task.steps
    checks = check_steps(steps, 1 if tuning else task.checks)
    held_out = data.validation if tuning else data.test
    torch.manual_seed(seed)
    model = task.model().to(device).train()
    generator = torch.Generator(device).manual_seed(seed)
    values: list[float | None] = []
    seconds: list[float] = []
    started, so_far = time.perf_counter(), 0.0
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
            return {"values": [*values, None], "seconds": [*seconds, round(so_far, 3)]}
        if task.decay:
            with torch.no_grad():
                torch._foreach_mul_(weights, 1 - task.decay * now)
        if step + 1 in checks:
            synchronise(device)
            so_far += time.perf_counter() - started
            value = evaluate(model, task, held_out)
            values.append(round(value, 5) if math.isfinite(value) else None)
            seconds.append(round(so_far, 3))
            if values[-1] is None:
                break
            synchronise(device)
            started = time.perf_counter()
    return {"values": values, "seconds": seconds}


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
