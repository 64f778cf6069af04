"""The cost of one training step (forward, backward, optimizer), as a ratio to momentum SGD.

One process holds a copy of the model for each optimizer. In every round each takes one step on the same batch, in a
rotated order, so a machine that slows down slows all of them. Ratios are taken within a round, then the median over
rounds. THOR has two kinds of steps, told apart by ``Curvature.is_due()`` before the step: *plain* ones only
precondition, *refresh* ones also observe and invert. Staggered THOR refreshes some layers at each step of its interval.
Separate steps measure the parts of a refresh and their floor (``parts.py``), and memory (``memory.py``).

    python -m benchmarks.step_cost --workload gpt --rounds 60 --peers --memory

On a GPU whole intervals are timed too, in which nothing waits for it, and networks that are compiled:

    python -m benchmarks.step_cost --scale gpu --workload gpt resnet50 gpt_compiled resnet50_compiled --memory --picture
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common.environment import RESULTS, environment, prepare_device
from benchmarks.common.tables import rich_table
from benchmarks.step_cost.figures import HEADS, PARTS_HEADS, cells, parts_cells, rounded, summarise
from benchmarks.step_cost.memory import median_growth
from benchmarks.step_cost.parts import measure_parts
from benchmarks.step_cost.rounds import OPTIMIZERS, PEERS, make_batches, measure, measure_intervals
from benchmarks.step_cost.timeline import draw, trace
from benchmarks.step_cost.workloads import WORKLOADS

OF_MEMORY = ("adamw", "thor")
TITLE = "Cost of a step, ratio to momentum SGD: median (first to third quartile)"
PARTS_TITLE = "Parts of a refresh step beyond SGD's step, as shares of it, and the time of their arithmetic alone (≥)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, merge the measured workloads into the JSON file, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS["gpu"], nargs="+", default=list(WORKLOADS["cpu"]))
    parser.add_argument("--scale", choices=WORKLOADS, default="cpu", help="sizes for two cores, or for a GPU")
    parser.add_argument("--rounds", type=int, default=60, help="timed rounds per workload; half of them are refreshes")
    parser.add_argument("--peers", action="store_true", help="time SINGD (a K-FAC, of the package index) as well")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, in processes of their own")
    parser.add_argument("--picture", action="store_true", help="draw what host and GPU do in each kind of step")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="singd")
    device = prepare_device(args.scale)
    out = args.out or RESULTS / ("step_cost.json" if args.scale == "cpu" else f"step_cost_{args.scale}.json")
    results = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    console = Console()
    for name in args.workload:
        workload = WORKLOADS[args.scale].get(name)
        if workload is None:
            parser.error(f"{name} is not measured with --scale {args.scale}")
        with console.status(f"{name}: {args.rounds} rounds"):
            measured = measure(workload, args.rounds, device, OPTIMIZERS + (PEERS if args.peers else ()))
            if args.scale == "gpu":
                measured["intervals"] = measure_intervals(workload, max(3, args.rounds // 4), device)
            batches, parts = make_batches(workload, device), {}
            if "compiled" not in name:  # of a compiled network Python's profiler would see the compiler
                parts = measure_parts(workload, batches, max(2, args.rounds // 4), device)
            if args.picture:
                draw(trace(workload, batches, device), workload.words, out.with_name(f"{out.stem}_{name}.png"))
            memory = {one: median_growth(name, one, args.scale, args.threads) for one in OF_MEMORY if args.memory}
        result = {"summary": summarise(measured), "parts": parts, "memory": memory}
        results[name] = {"words": workload.words, "environment": environment(device), **rounded(result)}
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = (f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in results.items())
        out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    console.print(rich_table(TITLE, HEADS, cells(results)))
    console.print(rich_table(PARTS_TITLE, PARTS_HEADS, parts_cells(results)))


if __name__ == "__main__":
    main()
