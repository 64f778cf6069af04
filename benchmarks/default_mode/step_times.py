"""Times of a step of several optimizers on one task, in turns within one process: noise of the machine meets all."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from benchmarks.default_mode.problem import Problem, StudyTask
from benchmarks.default_mode.settings import SETTINGS

STEPS_PER_TURN = 10
N_TURNS = 20


def step_times(task: StudyTask, problem: Problem, rates: Mapping[str, float]) -> dict[str, float]:
    """Train each optimizer from its beginning, in turns of 10 steps, for 200 steps.

    THOR refreshes most often there, so in a longer training its steps take less.

    Args:
        task: what to train.
        problem: of ``task.make``.
        rates: peak learning rate by name of a setting.

    Returns:
        The processor's milliseconds per step, by setting.
    """
    torch.set_num_threads(1)
    trained = {}
    for name, lr in rates.items():
        torch.manual_seed(0)
        model = problem.model().train()
        trained[name] = model, SETTINGS[name].build(model, 0.1 * lr, task.per_position)
    spent = dict.fromkeys(rates, 0.0)
    for turn in range(N_TURNS):
        order = list(trained)[turn % len(trained) :] + list(trained)[: turn % len(trained)]
        for name in order:
            model, optimizer = trained[name]
            generator = torch.Generator().manual_seed(turn)
            begin = time.process_time()
            for _ in range(STEPS_PER_TURN):
                problem.loss(model, generator).backward()
                optimizer.step()
                optimizer.zero_grad()
            spent[name] += time.process_time() - begin
    return {name: round(1000 * seconds / (N_TURNS * STEPS_PER_TURN), 3) for name, seconds in spent.items()}
