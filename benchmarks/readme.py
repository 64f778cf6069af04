"""Write measured figures into README.md and docs, between ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    python -m benchmarks.readme           # writes all pages
    python -m benchmarks.readme --check   # writes nothing; exit status 1 if a page is out of date

``docs/demo.json`` is a copy of the ``figures.json`` that ``python -m examples.demo`` writes.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import compiled_step, history, launches, models
from benchmarks.common.tables import markdown_table
from benchmarks.communication import figures as communication
from benchmarks.default_mode import figures as default_mode
from benchmarks.step_cost import figures as step_figures
from benchmarks.studies import ablations, trace_rule, width_transfer
from benchmarks.time_to_target import race
from examples.demo.tables import median_and_range

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/choosing.md",
    "docs/layers.md",
    "docs/measured.md",
    "docs/performance.md",
    "docs/tutorials/fsdp2.md",
)


def measured_on(environment: dict[str, Any]) -> str:
    """Machine, versions and date of a measurement, in one line."""
    device = "" if environment["device"] == "cpu" else f"{environment['device']}, "
    malloc = f", {environment['malloc']}" if environment["malloc"] else ""
    return (
        f"{device}{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}{malloc}, "
        f"{environment['date']}"
    )


def measured_in(parts: Iterable[dict[str, Any]]) -> str:
    """`measured_on` of all ``parts``, each line once."""
    return "; ".join(dict.fromkeys(measured_on(part["environment"]) for part in parts))


def product_rates(results: dict[str, Any]) -> str:
    """The range of the rates of a large matrix product, measured beside each workload."""
    rates = [result["parts"]["gflops"] for result in results.values() if result["parts"]]
    return f"{min(rates):.0f} to {max(rates):.0f} · 10⁹ multiplications and additions a second"


def whole_intervals(results: dict[str, Any]) -> str:
    """What the columns of the interval 10 are where they were measured."""
    if not any("intervals" in result["summary"] for result in results.values()):
        return ""
    return "Every 10: whole intervals of 10 steps, in which nothing waits for the device. "


def step_cost_block(results: dict[str, Any]) -> str:
    """The cost of a step, from ``benchmarks/results/step_cost.json``."""
    rounds = sorted({result["summary"]["rounds"] for result in results.values()})
    return (
        f"{markdown_table(step_figures.HEADS, step_figures.cells(results))}\n\n"
        "Times of whole steps (forward, backward, optimizer) as ratios to momentum SGD, in one process, in rounds: "
        f"median (first to third quartile) of {' and '.join(map(str, rounds))} rounds. p99 / p50: SGD / THOR / "
        "staggered THOR, at the interval 10. State: bytes of the optimizer's checkpoint over bytes of the parameters, "
        "SGD / AdamW / THOR. Memory: growth of the process's peak over AdamW's, on a CPU medians of 5. "
        f"{whole_intervals(results)}Measured on: {measured_in(results.values())}."
    )


def compiled_step_block(results: dict[str, Any]) -> str:
    """What THOR costs a compiled model in plain steps, from ``benchmarks/results/compiled_step.json``."""
    return (
        f"{markdown_table(compiled_step.HEADS, compiled_step.cells(results))}\n\n"
        f"Measured on: {measured_in(results.values())}."
    )


def step_parts_block(results: dict[str, Any]) -> str:
    """The parts of a refresh, from the same file."""
    return (
        f"{markdown_table(step_figures.PARTS_HEADS, step_figures.parts_cells(results))}\n\n"
        "Parts of a refresh step beyond SGD's step, as shares of it, and (≥) the time of their arithmetic alone at the "
        f"rate of a large matrix product ({product_rates(results)}). Measured on: {measured_in(results.values())}."
    )


def step_cost_elsewhere_block(results: dict[str, Any]) -> str:
    """The same steps on another processor, from the file that ``step_cost --out`` wrote there."""
    n = len(step_figures.HEADS_OF_TIMES)
    return (
        f"{markdown_table(step_figures.HEADS_OF_TIMES, (row[:n] for row in step_figures.cells(results)))}\n\n"
        f"A large matrix product: {product_rates(results)}. Measured on: {measured_in(results.values())}."
    )


def time_to_target_block(results: dict[str, Any]) -> str:
    """Steps and seconds to a target, from ``benchmarks/results/time_to_target.json``."""
    summary = {name: task for name, task in results["summary"].items() if task["optimizers"]}
    tried = max(len(rates) for task in summary.values() for rates in task["tuning"].values())
    return (
        f"{markdown_table(race.HEADS, race.cells(summary), words=2)}\n\n"
        f"Means over seeds with 95 % intervals, after {tried} learning rates for each optimizer (but the untuned one) "
        "in a shorter training on another seed and other held-out data. Seconds count training, with all costs "
        "of an optimizer and without validation; on each seed all optimizers took turns of a few steps in one process. "
        f"Measured on: {measured_in(summary.values())}."
    )


def race_block(results: dict[str, Any]) -> str:
    """Seconds to the target alone, from the same file."""
    summary = {name: task for name, task in results["summary"].items() if task["optimizers"]}
    words = "; ".join(
        f"{name}: {task['words']} ({max(one['seeds'] for one in task['optimizers'].values())} seeds)"
        for name, task in summary.items()
    )
    return (
        f"{markdown_table(race.short_heads(summary), race.short_cells(summary))}\n\n"
        f"Seconds of training to the target: mean and 95 % interval over seeds. {words}. Measured on: "
        f"{measured_in(summary.values())}."
    )


def trace_rule_block(results: dict[str, Any]) -> str:
    """The refreshes that the trace rule saves, from ``benchmarks/results/trace_rule.json``."""
    return (
        f"{markdown_table(trace_rule.HEADS, trace_rule.cells(results), words=2)}\n\n"
        f"{results['words']}, {results['steps']} steps at a learning rate of {results['lr']:g}; means over seeds with "
        f"95 % intervals. Measured on: {measured_on(results['environment'])}."
    )


def ablations_block(results: dict[str, Any]) -> str:
    """The effect of one setting at a time, from ``benchmarks/results/ablations.json``."""
    summary = results["summary"]
    words = "; ".join(
        f"{name}: {one['words']}, {one['steps']} steps, lr "
        + " and ".join(f"{lr:g} ({mode})" for mode, lr in one["rates"].items())
        for name, one in summary.items()
    )
    return (
        f"{markdown_table(ablations.heads(), ablations.cells(results))}\n\n"
        "Final loss on the validation split less that of the defaults on the same seed, below 0 is better: mean "
        f"(range) over seeds, where there are several. {words}. Measured on: {measured_in(summary.values())}."
    )


def communication_block(results: dict[str, Any]) -> str:
    """Hidden messages and shared inversions of several processes, from ``benchmarks/results/communication.json``."""
    timed = {name: result for name, result in results.items() if "times" in result}
    words = "; ".join(f"{name}: {result['words']} a rank" for name, result in timed.items())
    return (
        f"{markdown_table(communication.SHARE_HEADS, communication.share_cells(timed))}\n\n"
        f"{words}. Processes of one thread each over gloo, all on one machine; steps are timed where each process has "
        "a core. Sums hidden: the share of the wait for sums at once that buckets, sent from backward, save. "
        "Inverting: the busiest rank's share, each share on its own core. THOR's over SGD's step, in turns, at the "
        "interval 10, and the part of its refreshes, network included, with whole models (DDP); both sharded: the same "
        f"with the weights of both sharded by `fully_shard`. Measured on: {measured_in(timed.values())}."
    )


def width_transfer_block(results: dict[str, Any]) -> str:
    """The best learning rate at each width, from ``benchmarks/results/width_transfer.json``."""
    widths = results["summary"]["widths"]
    return (
        f"{markdown_table(width_transfer.HEADS, width_transfer.cells(results))}\n\n"
        f"{widths['words']}; one seed, loss on the validation split at the end, half decades of learning rates. "
        f"Measured on: {measured_on(widths['environment'])}."
    )


def default_mode_block(results: dict[str, Any], *, confirmation: bool = True) -> str:
    """What each optimizer makes of the study's tasks, from ``benchmarks/results/default_mode.json``."""
    summary = results["summary"]
    tasks = [task for task in summary.values() if task["is_confirmation"] == confirmation]
    return (
        f"{markdown_table(default_mode.HEADS, default_mode.cells(summary, confirmation=confirmation), words=2)}\n\n"
        "Final: the mean over three seeds and its standard error, less is better. The target is tuned AdamW's final "
        "score; time is steps times the time of a step, which all optimizers took in turns in one process. Each "
        "optimizer had three rates on another seed and other data; THOR untuned is its default rate, where that was "
        f"not the best. {study_environments(tasks)}"
    )


def study_environments(tasks: Iterable[dict[str, Any]]) -> str:
    """Where tasks of the study were trained, and where the time of a step was measured."""
    tasks = list(tasks)
    runs = [run for task in tasks for run in task["runs"].values()]
    times = measured_in({"environment": task["times_environment"]} for task in tasks)
    return f"Trained on: {measured_in(runs)}. Times: {times}."


def default_ratios_block(results: dict[str, Any]) -> str:
    """Time to AdamW's final score on each task of the study, over AdamW's, from the same file."""
    summary = results["summary"]
    table = markdown_table(default_mode.ratio_heads(summary), default_mode.ratio_cells(summary))
    tasks = "; ".join(f"{name}: {task['words']}" for name, task in summary.items())
    return (
        f"{table}\n\nTime to the final held-out score of tuned AdamW, over the time of its whole training, at whose "
        "end it has that score in the mean: steps (means over three seeds, – where no seed got there) times the "
        "time of a step (of the processor; all optimizers took turns in one process, refreshes included). "
        f"{tasks}. {study_environments(summary.values())}"
    )


def default_short_block(results: dict[str, Any]) -> str:
    """Of the same ratios the columns of untuned THOR, Muon and SOAP, on the tasks that no setting was chosen on."""
    summary = {name: task for name, task in results["summary"].items() if task["is_confirmation"]}
    heads = default_mode.ratio_heads(summary)
    shown = [heads.index(head) for head in (heads[1], "Muon", "SOAP")]
    rows = []
    for name, *cells in default_mode.ratio_cells(summary):
        words = summary[name]["words"]
        rows.append([f"{name}: {words.rpartition(', batch')[0] or words}", *(cells[i - 1] for i in shown)])
    return markdown_table(["task", *(heads[i] for i in shown)], rows)


def sharded_updates_block(results: dict[str, Any]) -> str:
    """Bytes that a step of thor_fsdp2 sends, from ``benchmarks/results/sharded_updates.json``."""
    natural, polar = (results["GPT-2 small"][mode]["8"] for mode in ("natural", "polar"))
    return (
        f"(Of a GPT-2 small on 8 ranks each sends {natural['sent'] / 1e6:.0f} MB a step for that, "
        f"{polar['sent'] / 1e6:.0f} MB in polar mode; gathering all gradients would send "
        f"{natural['gathered'] / 1e6:.0f}.)"
    )


def demo_block(figures: dict[str, Any]) -> str:
    """The figures that ``make demo`` prints, from ``docs/demo.json``."""
    target = figures["target"]
    rows = []
    for name, contender in figures["optimizers"].items():
        runs = contender["runs"]
        rows.append(
            (
                f"{name}, lr {contender['lr']:g}",
                median_and_range((run["epochs_to_target"] for run in runs), ".2f"),
                median_and_range((run["seconds_to_target"] for run in runs), ".2f"),
                median_and_range((run["accuracy"][-1] for run in runs), ".1%"),
                median_and_range((1e3 * statistics.median(run["step_seconds"]) for run in runs), ".1f"),
            )
        )
    heads = ("optimizer", f"epochs to {target:.0%}", f"seconds to {target:.0%}", "final accuracy", "ms per step")
    seeds = len(next(iter(figures["optimizers"].values()))["runs"])
    return (
        f"{markdown_table(heads, rows)}\n\n"
        f"Median over {seeds} seeds (smallest to largest) after {figures['epochs']} epochs; torch {figures['torch']}, "
        f"{figures['threads']} threads."
    )


BLOCKS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "step_cost": ("benchmarks/results/step_cost.json", step_cost_block),
    "step_cost_epyc": ("benchmarks/results/step_cost_epyc.json", step_cost_elsewhere_block),
    "step_cost_gpu": ("benchmarks/results/step_cost_gpu.json", step_cost_block),
    "step_parts": ("benchmarks/results/step_cost.json", step_parts_block),
    "step_parts_gpu": ("benchmarks/results/step_cost_gpu.json", step_parts_block),
    "race": ("benchmarks/results/time_to_target.json", race_block),
    "time_to_target": ("benchmarks/results/time_to_target.json", time_to_target_block),
    "trace_rule": ("benchmarks/results/trace_rule.json", trace_rule_block),
    "ablations": ("benchmarks/results/ablations.json", ablations_block),
    "default_ratios": ("benchmarks/results/default_mode.json", default_ratios_block),
    "default_short": ("benchmarks/results/default_mode.json", default_short_block),
    "default_mode": ("benchmarks/results/default_mode.json", default_mode_block),
    "default_mode_development": (
        "benchmarks/results/default_mode.json",
        partial(default_mode_block, confirmation=False),
    ),
    "launches": ("benchmarks/results/launches.json", launches.block),
    "compiled_step": ("benchmarks/results/compiled_step.json", compiled_step_block),
    "history": ("benchmarks/results/history.json", history.block),
    "models": ("benchmarks/results/models.json", models.block),
    "width_transfer": ("benchmarks/results/width_transfer.json", width_transfer_block),
    "communication": ("benchmarks/results/communication.json", communication_block),
    "sharded_updates": ("benchmarks/results/sharded_updates.json", sharded_updates_block),
    "demo": ("docs/demo.json", demo_block),
}


def filled(text: str, root: Path, page: str) -> str:
    """Fill every block between markers in ``text``, the page ``page``, from the JSON files under ``root``.

    Raises:
        ValueError: a begin marker has no end marker.
        FileNotFoundError: the figures of a block are missing.
    """
    for name, (file, block) in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text:
            continue
        if not (root / file).is_file():
            raise FileNotFoundError(f"{page} has the marker {begin}, but there is no {file}: measure it first.")
        content = block(json.loads((root / file).read_text(encoding="utf-8")))
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        # A function, since a string would have its backslashes read as groups.
        text, count = pattern.subn(lambda _, new=f"{begin}\n{content}\n{end}": new, text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{page} has {begin}, and {count} times {end} after it: one of each is needed.")
    return text


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write the pages under ``root``, or with ``--check`` only compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a page differs")
    args = parser.parse_args(arguments)
    stale = False
    for page in PAGES:
        path = root / page
        old = path.read_text(encoding="utf-8")
        new = filled(old, root, page)
        if args.check and new != old:
            print(f"{page} does not hold the measured figures. Run: python -m benchmarks.readme")
            stale = True
        if not args.check:
            path.write_text(new, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
