"""Epochs and seconds to a target on the three examples: THOR, momentum SGD and AdamW, tuned alike.

The trainings are the files ``examples/*.yaml``, run by LightningCLI; only the optimizer, its learning rate and what
draws on the screen are replaced. For each optimizer the same number of learning rates is tried in a shorter training
with a seed (and, on the digits, a split) that is not reported; the winner then trains in full on ``--seeds`` seeds.
The seeds are the outer loop, so a machine that is slower for a while is slower for all three. Seconds are those of
``fit`` with everything that an optimizer costs, validation left out.

Finished trainings are kept in the JSON file and not repeated: a run that was stopped goes on where it was.

    python -m benchmarks.examples --data DIR      # DIR holds cifar10/*.parquet and tinyshakespeare/input.txt
"""

import argparse
import copy
import hashlib
import json
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.table import Table

import lightning_thor  # noqa: F401  # registers the strategies that the YAML files name
from benchmarks.environment import RESULTS, environment, synchronise

CONFIGS = Path(__file__).parents[1] / "examples"
TUNING_SEED = 1000
THOR_CALLBACK = "lightning_thor.ThorCallback"
# Half decades, five for each; the range is where each optimizer's learning rates usually lie.
GRIDS = {
    "thor": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "sgd": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
NAMES = {"thor": "THOR", "sgd": "momentum SGD", "adamw": "AdamW"}

HEADS = ("task and target", "optimizer", "lr", "epochs", "seconds", "seconds per epoch", "final, median (range)")

Config = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One example, the validation metric that counts, and the value of it that is to be reached."""

    words: str
    config: str
    metric: str
    target: float
    higher_is_better: bool
    tuning_epochs: int
    data: str | None = None  # below --data; None: the example brings its own
    seed_key: str | None = None  # of the data module: what decides its random batches, if the global seed does not
    tuning_data: Config = field(default_factory=dict)  # what else of the data module differs in tuning

    def reached(self, value: float | None) -> bool:
        """Whether ``value`` is as good as the target; None is a value that was not finite."""
        if value is None:
            return False
        return value >= self.target if self.higher_is_better else value <= self.target

    def goodness(self, value: float | None) -> float:
        """``value`` on a scale where more is better; the worst for one that was not finite."""
        if value is None:
            return -math.inf
        return value if self.higher_is_better else -value


TASKS = {
    "digits": Task("digits, small CNN", "digits.yaml", "val_acc", 0.97, True, 5, tuning_data={"split_seed": 1}),
    "cifar10_resnet18": Task(
        "CIFAR-10 subset, ResNet-18", "cifar10_resnet18.yaml", "val_acc", 0.55, True, 3, data="cifar10"
    ),
    "char_gpt": Task(
        "tiny Shakespeare, GPT", "char_gpt.yaml", "val_loss", 1.80, False, 1, data="tinyshakespeare", seed_key="seed"
    ),
}


class Recorder(L.Callback):
    """The validation metric and the training seconds after every epoch.

    The clock starts in ``setup``, so it sees all that an optimizer prepares, and stands still in validation.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.values: list[float | None] = []
        self.seconds: list[float] = []
        self.started = 0.0
        self.so_far = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.started = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        synchronise(pl_module.device)
        self.so_far += time.perf_counter() - self.started
        self.seconds.append(round(self.so_far, 3))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = float(trainer.callback_metrics[self.metric])
        self.values.append(round(value, 5) if math.isfinite(value) else None)
        synchronise(pl_module.device)
        self.started = time.perf_counter()


@dataclass(frozen=True)
class Options:
    """What the command line says; None leaves a YAML file's value as it is."""

    data: Path | None
    device: str
    epochs: int | None
    tuning_epochs: int | None
    limit_train_batches: int | None


def without_screen(config: Config) -> Config:
    """``config`` without logger, checkpoints and callbacks that draw; THOR's callback stays, without its summary."""
    config = copy.deepcopy(config)
    trainer = config["trainer"]
    trainer["callbacks"] = [one for one in trainer["callbacks"] if one["class_path"] == THOR_CALLBACK]
    for one in trainer["callbacks"]:
        one.setdefault("init_args", {})["summary"] = False
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return config | {"trainer": trainer | dict.fromkeys(quiet, False) | {"num_sanity_val_steps": 0}}


def with_optimizer(config: Config, optimizer: str, lr: float) -> Config:
    """``config`` (THOR's) with ``optimizer``, one of ``GRIDS``, at ``lr``.

    THOR keeps all else that the YAML file says. AdamW decays weights by THOR's value, which is decoupled too. SGD's is
    coupled, another quantity: the customary 5e-4 where the others decay at all.
    """
    config = copy.deepcopy(config)
    decay = config["optimizer"]["init_args"].get("weight_decay", 0.0)
    if optimizer == "thor":
        config["optimizer"]["init_args"]["lr"] = lr
        return config
    config["trainer"]["callbacks"] = [c for c in config["trainer"]["callbacks"] if c["class_path"] != THOR_CALLBACK]
    config["optimizer"] = {
        "sgd": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9, "weight_decay": 5e-4 if decay else 0}},
        "adamw": {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": decay}},
    }[optimizer]
    config["optimizer"]["init_args"]["lr"] = lr
    return config


def training(task: Task, optimizer: str, lr: float, seed: int, tuning: bool, options: Options) -> Config:
    """The whole configuration of one training."""
    config = without_screen(yaml.safe_load((CONFIGS / task.config).read_text(encoding="utf-8")))
    config = with_optimizer(config, optimizer, lr)
    epochs = (options.tuning_epochs or task.tuning_epochs) if tuning else options.epochs
    if epochs is not None:
        config["trainer"]["max_epochs"] = epochs
    if options.limit_train_batches is not None:
        config["trainer"]["limit_train_batches"] = options.limit_train_batches
    # The schedule ends where the training ends, in a shortened one too.
    config["lr_scheduler"]["init_args"]["T_max"] = config["trainer"]["max_epochs"]
    config["trainer"]["accelerator"] = options.device
    config["seed_everything"] = seed
    data = config["data"]["init_args"]
    if task.data is not None:
        if options.data is None:
            raise SystemExit(f"{task.words}: say --data DIR, a folder that holds {task.data}/, or leave the task out.")
        data["root"] = str(options.data / task.data)
    if task.seed_key is not None:
        data[task.seed_key] = seed
    return config | {"data": config["data"] | {"init_args": data | (task.tuning_data if tuning else {})}}


def train(config: Config, metric: str) -> dict[str, list[Any]]:
    """Run one training; ``metric`` (None where it was not finite) and the training seconds after every epoch."""
    cli = LightningCLI(args=config, run=False, save_config_callback=None)
    recorder = Recorder(metric)
    cli.trainer.callbacks.insert(0, recorder)  # type: ignore[attr-defined]  # Lightning sets it without declaring it
    # Reading the data is not training, so it is done before the clock starts.
    cli.datamodule.setup("fit")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return {"values": recorder.values, "seconds": recorder.seconds}


class Results:
    """The JSON file: finished trainings by key, written after each one."""

    def __init__(self, path: Path, here: dict[str, str | int]) -> None:
        self.path = path
        self.here = here
        self.content: dict[str, dict[str, Any]] = {"summary": {}, "runs": {}}
        # A training belongs to what it ran on; the date alone makes no difference.
        self.machine = {key: value for key, value in here.items() if key != "date"}
        if path.is_file():
            self.content |= json.loads(path.read_text(encoding="utf-8"))

    def get_or_train(self, label: str, config: Config, metric: str) -> dict[str, list[Any]]:
        """The record of this very configuration on this machine: stored, or trained now and then stored."""
        facts = {key: value for key, value in config.items() if key != "data"} | {"machine": self.machine}
        data = {key: value for key, value in config["data"]["init_args"].items() if key != "root"}
        fingerprint = hashlib.sha256(json.dumps([facts, data], sort_keys=True).encode()).hexdigest()[:10]
        key = f"{label} {fingerprint}"
        runs: dict[str, dict[str, list[Any]]] = self.content["runs"]
        if key not in runs:
            runs[key] = train(config, metric)
            self.save()
        return runs[key]

    def save(self) -> None:
        """Write the file in one move, so that a stopped benchmark never leaves half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json_in_lines(self.content), encoding="utf-8")
        os.replace(beside, self.path)


def json_in_lines(content: dict[str, dict[str, Any]]) -> str:
    """JSON with one line for each entry of each part: short to scroll, and a difference shows what changed."""
    parts = []
    for name, part in content.items():
        lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in part.items())
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def summarise(task: Task, runs: list[dict[str, list[Any]]], lr: float, grid: Sequence[float]) -> dict[str, Any]:
    """The figures of one optimizer on one task; the runs are those of its seeds.

    Epochs and seconds to the target are medians over the seeds, or None if half of them or more never got there;
    ``reached`` says how many did. ``curve`` and ``seconds`` are the runs themselves, for the picture.
    """
    first = [next((e for e, value in enumerate(run["values"]) if task.reached(value)), None) for run in runs]
    got = [(e + 1, run["seconds"][e]) for e, run in zip(first, runs, strict=True) if e is not None]
    finals = [run["values"][-1] for run in runs]
    return {
        "lr": lr,
        "lr_is_at_an_end_of_its_grid": lr in (min(grid), max(grid)),
        "seeds": len(runs),
        "reached": len(got),
        "epochs_to_target": statistics.median(e for e, _ in got) if 2 * len(got) > len(runs) else None,
        "seconds_to_target": statistics.median(s for _, s in got) if 2 * len(got) > len(runs) else None,
        "final": None if None in finals else [min(finals), statistics.median(finals), max(finals)],
        "seconds_per_epoch": statistics.median(run["seconds"][-1] / len(run["seconds"]) for run in runs),
        "curve": [run["values"] for run in runs],
        "seconds": [run["seconds"] for run in runs],
    }


def measure(name: str, seeds: int, options: Options, results: Results, say: Callable[[str], None]) -> dict[str, Any]:
    """Tune and train all optimizers on the task ``name``; its summary."""
    task = TASKS[name]
    first = training(task, "sgd", GRIDS["sgd"][0], TUNING_SEED, True, options)
    say(f"{name}: warming up")  # or the first training would pay for torch's one-off choices
    train(first | {"trainer": first["trainer"] | {"max_epochs": 1, "limit_train_batches": 2}}, task.metric)
    best: dict[str, float] = {}
    tuning: dict[str, dict[str, float | None]] = {}
    for optimizer, grid in GRIDS.items():
        final: dict[float, float | None] = {}
        for lr in grid:
            say(f"{name}: tuning {NAMES[optimizer]}, lr {lr:g}")
            config = training(task, optimizer, lr, TUNING_SEED, True, options)
            final[lr] = results.get_or_train(f"{name} {optimizer} lr={lr:g} tuning", config, task.metric)["values"][-1]
        best[optimizer] = max(final, key=lambda lr: task.goodness(final[lr]))
        tuning[optimizer] = {f"{lr:g}": value for lr, value in final.items()}
    runs: dict[str, list[dict[str, list[Any]]]] = {optimizer: [] for optimizer in GRIDS}
    for seed in range(seeds):
        for optimizer, lr in best.items():
            say(f"{name}: {NAMES[optimizer]}, lr {lr:g}, seed {seed}")
            config = training(task, optimizer, lr, seed, False, options)
            runs[optimizer].append(
                results.get_or_train(f"{name} {optimizer} lr={lr:g} seed={seed}", config, task.metric)
            )
    return {
        "words": task.words,
        "environment": results.here,
        "metric": task.metric,
        "target": task.target,
        "higher_is_better": task.higher_is_better,
        "tuning": tuning,
        "optimizers": {o: summarise(task, runs[o], best[o], GRIDS[o]) for o in GRIDS},
    }


def cells(summary: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row of ``HEADS`` for each task and optimizer, in words; the terminal and the README show the same."""
    for task in summary.values():
        words = f"{task['words']}: {task['metric']} {'≥' if task['higher_is_better'] else '≤'} {task['target']:g}"
        for i, (optimizer, one) in enumerate(task["optimizers"].items()):
            epochs, seconds, final = one["epochs_to_target"], one["seconds_to_target"], one["final"]
            missed = f" ({one['reached']} of {one['seeds']})" if one["reached"] < one["seeds"] else ""
            yield (
                words if i == 0 else "",
                NAMES[optimizer],
                f"{one['lr']:g}" + (" (end of its grid)" if one["lr_is_at_an_end_of_its_grid"] else ""),
                ("never" if epochs is None else f"{epochs:g}") + missed,
                "–" if seconds is None else f"{seconds:.1f}",
                f"{one['seconds_per_epoch']:.2f}",
                "not finite" if final is None else f"{final[1]:.3f} ({final[0]:.3f}–{final[2]:.3f})",
            )


def table(summary: dict[str, Any]) -> Table:
    """The summary of all measured tasks, for a terminal."""
    out = Table(title="To the target: medians over seeds; all that an optimizer costs is in the seconds")
    for i, head in enumerate(HEADS):
        out.add_column(head, justify="left" if i < 2 else "right")
    for row in cells(summary):
        out.add_row(*row)
    return out


def save_picture(summary: dict[str, Any], path: Path) -> None:
    """A row for each task: the metric by epoch, and by seconds of training; median over seeds, and the range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"thor": "tab:red", "sgd": "tab:gray", "adamw": "tab:blue"}
    figure, rows = pyplot.subplots(
        len(summary), 2, figsize=(10, 3.2 * len(summary)), squeeze=False, layout="constrained"
    )
    for (by_epoch, by_second), task in zip(rows, summary.values(), strict=True):
        for optimizer, one in task["optimizers"].items():
            curves = [[math.nan if value is None else value for value in run] for run in one["curve"]]
            middle, low, high = (
                [pick(values) for values in zip(*curves, strict=True)] for pick in (statistics.median, min, max)
            )
            seconds = [statistics.median(values) for values in zip(*one["seconds"], strict=True)]
            for axes, x in ((by_epoch, list(range(1, len(middle) + 1))), (by_second, seconds)):
                axes.plot(x, middle, color=colours[optimizer], label=NAMES[optimizer], marker=".")
                axes.fill_between(x, low, high, color=colours[optimizer], alpha=0.15, linewidth=0)
        for axes, label in ((by_epoch, "epochs"), (by_second, "seconds of training")):
            axes.axhline(task["target"], color="black", linestyle=":", linewidth=1)
            axes.set_xlabel(label)
            axes.set_title(task["words"])
        by_epoch.xaxis.get_major_locator().set_params(integer=True)
        by_epoch.set_ylabel(task["metric"])
        by_epoch.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not yet in the JSON file, then write it, the picture, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/ and tinyshakespeare/")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch threads (default: as torch has it)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--epochs", type=int, help="of the full trainings (default: as the YAML files say)")
    parser.add_argument("--tuning-epochs", type=int, help="of the trainings that tune (default: about half)")
    parser.add_argument("--limit-train-batches", type=int, help="per epoch, to try this file out")
    parser.add_argument("--out", type=Path, default=RESULTS / "examples.json", help="the picture goes beside it")
    said = parser.parse_args(arguments)
    if said.threads is not None:
        torch.set_num_threads(said.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    options = Options(said.data, said.device, said.epochs, said.tuning_epochs, said.limit_train_batches)
    results = Results(said.out, environment(torch.device(said.device)))
    console = Console()
    for name in said.task:
        results.content["summary"][name] = measure(name, said.seeds, options, results, console.print)
        results.save()
        save_picture(results.content["summary"], said.out.with_suffix(".png"))
    console.print(table(results.content["summary"]))


if __name__ == "__main__":
    main()
