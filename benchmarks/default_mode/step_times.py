"""``python -m benchmarks.default_mode.step_times --data DIR``: what a step of each optimizer takes, on each task.

Trainings came under different loads, on different machines and with earlier code. Here all optimizers of a task take
turns in one process, step by step, on one thread; the clock is the processor's time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.common.environment import RESULTS, environment
from benchmarks.common.results import Results
from benchmarks.default_mode.__main__ import TASKS
from benchmarks.default_mode.problem import Problem, StudyTask
from benchmarks.default_mode.settings import SETTINGS
from benchmarks.default_mode.trial import take_step

BEGINNING = 60
"""Steps in which THOR refreshes more often than later."""
PERIOD = 10
"""Steps from one refresh to the next after them, THOR's and SOAP's."""
RATE = 1e-9
"""Of all optimizers, so that their networks stay alike."""


def step_times(task: StudyTask, problem: Problem, settings: list[str], periods: int = 10) -> dict[str, float]:
    """Measure the mean milliseconds of a step in a training of ``task.steps``.

    The beginning counts as it is; of the steps after it the mean is taken of some periods, whose medians over periods,
    place by place, leave out what disturbed one of them.

    Args:
        task: what is trained.
        problem: of ``task.make``.
        settings: names of optimizers.
        periods: how many, after the beginning.
    """
    models, optimizers, generators = {}, {}, {}
    for setting in settings:
        torch.manual_seed(0)
        models[setting] = problem.model().train()
        optimizers[setting] = SETTINGS[setting].build(models[setting], RATE, task.per_position)
        generators[setting] = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {setting: [] for setting in settings}
    for _ in range(BEGINNING + PERIOD * periods):
        for setting in settings:
            started = time.process_time()
            take_step(models[setting], optimizers[setting], problem, generators[setting])
            times[setting].append(1000 * (time.process_time() - started))
    return {setting: round(_mean(each, task.steps), 3) for setting, each in times.items()}


def _mean(times: list[float], steps: int) -> float:
    """The mean of ``steps`` steps from ``times`` of the first ones.

    >>> _mean([2.0] * 60 + ([1.0] * 9 + [3.0]) * 10, 160), _mean([2.0] * 60 + ([1.0] * 9 + [3.0]) * 10, 10_000)
    (1.5, 1.2048)
    """
    beginning, later = times[:BEGINNING], times[BEGINNING:]
    by_place = [statistics.median(later[place::PERIOD]) for place in range(PERIOD)]
    return (sum(beginning) + (steps - BEGINNING) * statistics.fmean(by_place)) / steps


def main(argv: list[str] | None = None) -> None:
    """Measure the optimizers that a file of results has, and store their times in its summaries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/ and tinyshakespeare/")
    parser.add_argument("--results", type=Path, default=RESULTS / "default_mode.json")
    parser.add_argument("--task", nargs="+", choices=TASKS, help="default: all in the file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(arguments.results, environment(torch.device("cpu")))
    for name in arguments.task or list(results.content["summary"]):
        task, summary = TASKS[name], results.content["summary"][name]
        settings = list(dict.fromkeys(run["setting"] for run in summary["runs"].values()))
        times = step_times(task, task.make(arguments.data), settings)
        print(name, times, flush=True)
        results.put("summary", name, summary | {"step_times": times, "times_environment": results.environment})


if __name__ == "__main__":
    main()
