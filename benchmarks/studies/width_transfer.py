"""Whether a narrow network's best learning rate suits a wide one: the GPT of ``time_to_target`` at three widths.

Each optimizer trains at each width with each of its learning rates, as ``time_to_target`` tunes it: one seed, and the
final loss on held-out data. Trainings that are in the JSON file already are not repeated.

    python -m benchmarks.studies.width_transfer --data DIR      # DIR holds tinyshakespeare/
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.contenders import CONTENDERS
from benchmarks.common.environment import RESULTS, environment
from benchmarks.common.pictures import axes_in_a_row, clipped, save
from benchmarks.common.results import Results
from benchmarks.common.tables import rich_table
from benchmarks.time_to_target.tasks import TASKS, Task
from benchmarks.time_to_target.tuning import Measurement, tune
from examples.char_gpt import CharGPT

WIDTHS = (64, 128, 256)
COMPARED = ("thor", "thor_adam", "thor_polar", "adamw", "muon")
HEADS = ("optimizer", "width", "best lr", "loss", "at its best lr of the narrowest")


def task_of(width: int, steps: int | None) -> Task:
    """The GPT's task at another width; ``steps`` of a training, None for those of the task."""
    task = TASKS["cpu"]["gpt"]
    return replace(
        task,
        words=f"tiny Shakespeare, GPT, 3 layers, width {width}, 16 windows of 64",
        tuning_steps=task.tuning_steps if steps is None else steps,
        model=lambda: CharGPT(layers=3, width=width, context=64),
    )


def best_of(losses: Mapping[str, float | None]) -> str:
    """The learning rate with the smallest loss that is finite.

    >>> best_of({"0.1": 2.0, "0.3": 1.5, "1": None})
    '0.3'
    """
    return min((lr for lr, loss in losses.items() if loss is not None), key=lambda lr: losses[lr] or 0.0)


def cells(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row under ``HEADS`` for each optimizer and width."""
    tuning: Mapping[str, Mapping[str, Mapping[str, float | None]]] = results["summary"]["widths"]["tuning"]
    for name, by_width in tuning.items():
        first = best_of(next(iter(by_width.values())))
        for width, losses in by_width.items():
            best, transferred = best_of(losses), losses[first]
            yield (
                CONTENDERS[name].label,
                width,
                best,
                f"{losses[best]:.3f}",
                "not finite" if transferred is None else f"{transferred:.3f}",
            )


def save_picture(results: Mapping[str, Any], path: Path) -> None:
    """Draw the loss against the learning rate: a line for each width, axes for each optimizer."""
    tuning = results["summary"]["widths"]["tuning"]
    figure, axes = axes_in_a_row(len(tuning))
    values = sorted(v for one in tuning.values() for losses in one.values() for v in losses.values() if v is not None)
    worst = values[int(0.8 * (len(values) - 1))]
    for axis, (name, by_width) in zip(axes, tuning.items(), strict=True):
        for width, losses in by_width.items():
            y = [clipped(loss, worst, higher_is_better=False) for loss in losses.values()]
            axis.plot([float(lr) for lr in losses], y, marker=".", label=f"width {width}")
        axis.set_xscale("log")
        axis.set_xlabel("learning rate")
        axis.set_ylim(values[0] - 0.03 * (worst - values[0]), worst)
        axis.set_title(CONTENDERS[name].label, fontsize="small")
    axes[0].set_ylabel("loss (at the edge: or worse)")
    axes[-1].legend(fontsize="small")
    save(figure, path, results["summary"]["widths"]["words"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not in the JSON file yet, then write it, the picture and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds tinyshakespeare/")
    parser.add_argument("--optimizer", choices=CONTENDERS, nargs="+", default=list(COMPARED))
    parser.add_argument("--width", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "width_transfer.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device, console = torch.device("cpu"), Console()
    results = Results(args.out, environment(device))
    contenders = {name: CONTENDERS[name] for name in args.optimizer}
    tuning: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in contenders}
    for width in args.width:
        task = task_of(width, args.steps)
        data = task.data(args.data, task.batch_size, device)
        one = Measurement(f"width{width}", "cpu", task, data, device, results, console.print)
        for name, losses in tune(one, contenders).items():
            tuning[name][str(width)] = {f"{lr:g}": loss for lr, loss in losses.items()}
    words = f"tiny Shakespeare, GPT, 3 layers, {task.tuning_steps} steps of 16 windows of 64"
    results.put("summary", "widths", {"words": words, "environment": results.environment, "tuning": tuning})
    save_picture(results.content, args.out.with_suffix(".png"))
    console.print(rich_table("The best learning rate at each width", HEADS, cells(results.content)))


if __name__ == "__main__":
    main()
