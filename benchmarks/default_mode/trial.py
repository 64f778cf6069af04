"""One training of one task by one optimizer."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn

from benchmarks.common.contenders import Stepper
from benchmarks.default_mode.problem import Problem, StudyTask
from benchmarks.default_mode.settings import Setting
from benchmarks.time_to_target.training import check_steps, lr_share


def train(task: StudyTask, problem: Problem, setting: Setting, lr: float, seed: int, *, tuning: bool) -> dict[str, Any]:
    """Train with peak rate ``lr`` on one thread.

    The clock is the processor's time of this process, so that other programs do not count. It counts building the
    optimizer, drawing batches and all steps, and stands still while scores are taken. A training whose loss is not
    finite at a check, or whose optimizer raises an error of linear algebra, ends there, with a last score of None.

    Args:
        task: what to train.
        problem: of ``task.make``.
        setting: which optimizer.
        lr: peak learning rate.
        seed: decides the initial weights and the batches.
        tuning: whether scores are of the validation split; else of the test split.

    Returns:
        ``"steps"`` of the checks, ``"values"``, the scores, and ``"seconds"`` so far.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = problem.model().train()
    generator = torch.Generator().manual_seed(seed)
    score = problem.validation if tuning else problem.test
    checks = check_steps(task.steps, task.checks)
    decayed: list[torch.Tensor] = [p for p in model.parameters() if p.dim() >= 2]
    record: dict[str, Any] = {"steps": [], "values": [], "seconds": []}
    seconds, started = 0.0, time.process_time()
    optimizer = setting.build(model, lr, task.per_position)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(task.steps):
        share = lr_share(step, task.steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        is_finite = take_step(model, optimizer, problem, generator)
        if task.decay:
            with torch.no_grad():
                torch._foreach_mul_(decayed, 1 - task.decay * share)
        if step + 1 in checks or not is_finite:
            seconds += time.process_time() - started
            value = score(model.eval()) if is_finite else math.nan
            model.train()
            record["steps"].append(step + 1)
            record["values"].append(round(value, 6) if math.isfinite(value) else None)
            record["seconds"].append(round(seconds, 3))
            if not math.isfinite(value):
                break
            started = time.process_time()
    return record


def take_step(model: nn.Module, optimizer: Stepper, problem: Problem, generator: torch.Generator) -> bool:
    """Take one step; returns whether the optimizer could take it."""
    loss = problem.loss(model, generator)
    loss.backward()
    try:
        optimizer.step()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch does not declare it
        return False
    optimizer.zero_grad()
    return True
