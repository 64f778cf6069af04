"""The table and the picture of the study, from its file of results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.contenders import DEFAULT_RATE
from benchmarks.common.pictures import save, subplots
from benchmarks.default_mode.settings import SETTINGS

HEADS = (
    "task",
    "optimizer",
    "lr",
    "final",
    "steps to target",
    "time, of AdamW's training",
    "ms per step",
)


def label(run: Mapping[str, Any]) -> str:
    """The optimizer's name; THOR's run at its default rate, unless that is its best, is called untuned."""
    name = SETTINGS[run["setting"]].label
    return name if run["is_best"] else f"{name}, untuned"


def cells(summary: Mapping[str, Mapping[str, Any]], *, confirmation: bool) -> Iterator[tuple[str, ...]]:
    """Make the rows of the table under `HEADS`, of the confirmation or of the development tasks."""
    for task in (task for task in summary.values() if task["is_confirmation"] == confirmation):
        words = f"{task['words']}: {task['metric']}"
        for run in sorted(task["runs"].values(), key=lambda run: math.inf if run["final"] is None else run["final"]):
            yield words, label(run), f"{run['lr']:g}", *_figures(run, task)
            words = ""


def time_ratio(run: Mapping[str, Any], task: Mapping[str, Any]) -> float | None:
    """Time of a run to the target, None if a seed did not get there, over that of a whole training by AdamW, at whose
    end it has the target's score in the mean: steps times the time of a step."""
    if run["steps"] is None:
        return None
    adamw = next(run for run in task["runs"].values() if run["setting"] == "adamw")
    times = task["step_times"]
    return float(run["steps"] * times[run["setting"]] / (adamw["curve"]["steps"][-1] * times["adamw"]))


def _figures(run: Mapping[str, Any], task: Mapping[str, Any]) -> tuple[str, ...]:
    final = "not finite" if run["final"] is None else f"{run['final']:.4g} ± {run['error']:.1g}"
    step = f"{task['step_times'][run['setting']]:.1f}"
    ratio = time_ratio(run, task)
    if ratio is None:
        return final, f"{run['n_reached']} of 3 got there" if run["n_reached"] else "none got there", "–", step
    return final, f"{run['steps']:.0f}", f"{ratio:.2f}", step


def save_picture(summary: Mapping[str, Mapping[str, Any]], path: Path, *, confirmation: bool) -> None:
    """Draw each task's scores against seconds, a line for each optimizer at its best rate."""
    tasks = {name: task for name, task in summary.items() if task["is_confirmation"] == confirmation}
    if not tasks:
        return
    n_columns = min(5, len(tasks))
    n_rows = math.ceil(len(tasks) / n_columns)
    figure, axes = subplots(n_rows, n_columns, figsize=(3.4 * n_columns, 2.9 * n_rows))
    for place, (name, task) in zip(axes.flat, tasks.items(), strict=False):
        for run in (run for run in task["runs"].values() if run["is_best"]):
            setting = SETTINGS[run["setting"]]
            values = [math.nan if value is None else value for value in run["curve"]["values"]]
            width = 2.2 if run["setting"] == "thor" else 1.1
            seconds = [step * task["step_times"][run["setting"]] / 1000 for step in run["curve"]["steps"]]
            place.plot(seconds, values, color=setting.colour, label=setting.label, linewidth=width)
        place.set_yscale("log")
        place.set_title(name, fontsize="medium")
        place.set_xlabel("seconds (steps times a step's time)", fontsize="small")
        if task["target"] is not None:
            place.axhline(task["target"], color="black", linestyle=":", linewidth=1)
    for place in list(axes.flat)[len(tasks) :]:
        place.set_axis_off()
    handles = {text: handle for one in axes.flat for handle, text in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small")
    save(figure, path)


def ratio_heads(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Make the heads of the table of `ratio_cells`: the task, then each optimizer but AdamW."""
    present = {run["setting"] for task in summary.values() for run in task["runs"].values()}
    others = [setting.label for name, setting in SETTINGS.items() if name in present - {"adamw"}]
    return ["task", f"THOR, lr {DEFAULT_RATE:g} untuned", *others]


def ratio_cells(summary: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Make a row for each task: each optimizer's time to tuned AdamW's final score, over that of its training."""
    present = {run["setting"] for task in summary.values() for run in task["runs"].values()}
    for name, task in summary.items():
        runs = list(task["runs"].values())
        untuned = next((run for run in runs if run["setting"] == "thor" and run["lr"] == DEFAULT_RATE), None)
        best = {run["setting"]: run for run in runs if run["is_best"]}
        chosen = [untuned, *(best.get(setting) for setting in SETTINGS if setting in present - {"adamw"})]
        yield [name, *(_ratio(run, task) for run in chosen)]


def _ratio(run: Mapping[str, Any] | None, task: Mapping[str, Any]) -> str:
    if run is None:
        return ""
    ratio = time_ratio(run, task)
    if ratio is None:
        return f"{run['n_reached']} of 3 got there" if run["n_reached"] else "–"
    return f"{ratio:.2f}"


def rates_within(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """By task, the worst final score of THOR's three rates on the tuning seed over AdamW's best there: infinite where
    one diverged."""
    found = {}
    for name, task in summary.items():
        tuning = task["tuning"]
        if "adamw" in tuning and "thor" in tuning and f"{DEFAULT_RATE:g}" in tuning["thor"]:
            best = min(value for value in tuning["adamw"].values() if value is not None)
            worst = max(math.inf if value is None else value for value in tuning["thor"].values())
            found[name] = worst / best
    return found
