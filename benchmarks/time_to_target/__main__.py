"""How soon each optimizer of ``contenders.py`` reaches a target, tuned alike, on the workloads of ``tasks.py``.

Each optimizer first tries the same number of learning rates in a shorter training, with a seed and held-out data that
no reported figure uses. The winners then run heats, one for each seed: all optimizers train in full in one process, in
turns of a few steps, so a machine that slows down slows all of them, and the seconds of a heat can be compared. Seconds
count training with all costs of an optimizer, without validation. Finished trainings are stored in the JSON file and
not repeated: a stopped benchmark continues where it was. A new optimizer, or a new rate, runs in heats with all others.
(The file cannot know that an optimizer's code has changed: ``--forget NAME`` tunes it anew and repeats the heats.)

    python -m benchmarks.time_to_target --workload gpt --data DIR                # DIR holds cifar10/, tinyshakespeare/
    python -m benchmarks.time_to_target --workload gpt --data DIR --robustness   # tuning only
"""

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common.contenders import CONTENDERS, Contender
from benchmarks.common.environment import RESULTS, environment, prepare_device
from benchmarks.common.results import Results
from benchmarks.common.tables import rich_table
from benchmarks.time_to_target import race
from benchmarks.time_to_target.pictures import save_curves, save_robustness
from benchmarks.time_to_target.tasks import TASKS, Data, Task
from benchmarks.time_to_target.training import train_in_turns
from benchmarks.time_to_target.tuning import HEAT, Measurement, measure

TITLE = "To the target: means over seeds with 95 % intervals; seconds count all costs of an optimizer"


def warm_up(task: Task, data: Data, contenders: Mapping[str, Contender], device: torch.device) -> None:
    """Take two steps with each contender: otherwise the first training pays for imports and torch's one-off choices."""
    short = replace(task, steps=2, tuning_steps=2, checks=1)
    each = {name: (contender, contender.rates[0]) for name, contender in contenders.items()}
    train_in_turns(short, data, each, seed=0, tuning=True, device=device)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/ and tinyshakespeare/")
    parser.add_argument("--workload", choices=TASKS["cpu"], nargs="+", default=list(TASKS["cpu"]))
    parser.add_argument("--optimizer", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    parser.add_argument("--scale", choices=TASKS, default="cpu", help="sizes for two cores, or for a GPU")
    parser.add_argument("--seeds", type=int, help="full trainings of each optimizer (default: see tasks.py)")
    parser.add_argument("--robustness", action="store_true", help="only tune, and draw the metric over learning rates")
    parser.add_argument(
        "--forget", choices=CONTENDERS, nargs="+", default=[], help="tune these anew, and repeat the heats"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--steps", type=int, help="of full and tuning trainings, to try this file out")
    parser.add_argument("--out", type=Path, help="JSON file; pictures go beside it (default: benchmarks/results)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not yet in the JSON file, then write it, the pictures, and the table."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # peers warn about their own defaults
    device = prepare_device(args.scale)
    suffix = "" if args.scale == "cpu" else f"_{args.scale}"
    path = args.out or RESULTS / f"time_to_target{suffix}.json"
    results = Results(path, environment(device))
    console = Console()
    contenders = {name: CONTENDERS[name] for name in args.optimizer}
    for name in args.workload:
        task = TASKS[args.scale][name]
        if args.steps is not None:
            task = replace(task, steps=args.steps, tuning_steps=args.steps)
        if args.forget:
            results.forget(name, *args.forget, HEAT)
        data = task.data(args.data, task.batch_size, device)
        warm_up(task, data, contenders, device)
        one = Measurement(name, args.scale, task, data, device, results, console.print)
        seeds = task.seeds if args.seeds is None else args.seeds
        summary = measure(one, contenders, 0 if args.robustness else seeds)
        results.put("summary", name, summary)
        save_robustness(summary, path.with_name(f"{path.stem}_{name}_rates.png"))
        if summary["optimizers"]:
            save_curves(summary, path.with_name(f"{path.stem}_{name}.png"))
    rows = race.cells({name: results.content["summary"][name] for name in args.workload})
    console.print(rich_table(TITLE, race.HEADS, rows, words=2))


if __name__ == "__main__":
    main()
