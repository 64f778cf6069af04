"""What a refresh says to other ranks: collectives, bytes, what backward hides of them, and inversions shared out.

Collectives and bytes follow from the shapes of a model, so they are counted without other processes and hold on any
machine. Times are measured on real processes over gloo, all on this machine: each rank is one process with one thread.

    python -m benchmarks.communication                      # counts alone
    python -m benchmarks.communication --measure 1 2 4      # and times with 1, 2 and 4 ranks
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.environment import RESULTS, environment
from benchmarks.messages import WAYS, Way, counts, moved
from examples.char_gpt import CharGPT
from examples.resnet import ResNet18, ResNet50
from lightning_thor import Curvature
from lightning_thor.collectives import Ranks
from lightning_thor.exchange import Wait
from lightning_thor.inverse import damped_inverses
from lightning_thor.shares import SharedInversions

COUNTED_RANKS = (2, 4, 8, 64)
COUNT_HEADS = ("workload", "way", "ranks", "collectives", "factors, MB", "of whole blocks", "moved per rank, MB")
TIME_HEADS = (
    "workload",
    "way",
    "ranks",
    "backward, ms",
    "update, ms",
    "waiting for sums, ms",
    "hidden",
    "inverting, ms",
)


@dataclass
class Workload:
    """A model, and a rank's batch ``(inputs, targets)``; the model gives logits with the classes last."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    words: str


WORKLOADS = {
    "resnet18": Workload(
        ResNet18, lambda: (torch.randn(32, 3, 32, 32), torch.randint(10, (32,))), "ResNet-18, 32 images of 32×32"
    ),
    "resnet50": Workload(
        ResNet50, lambda: (torch.randn(32, 3, 64, 64), torch.randint(1000, (32,))), "ResNet-50, 32 images of 64×64"
    ),
    "gpt": Workload(
        CharGPT, lambda: (torch.randint(65, (16, 128)), torch.randint(65, (16, 128))), "GPT, 4 layers, 2,048 tokens"
    ),
    "tiny": Workload(
        lambda: nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 10)),
        lambda: (torch.randn(8, 40), torch.randint(10, (8,))),
        "MLP 40-300-10, to try this program",
    ),
}
# ── times ──


class Traced(Ranks):
    """The ranks, with a clock: ``events`` are ``(what, start, stop)`` in seconds, ``messages`` as of `Counting`."""

    def __init__(self, bf16: bool) -> None:
        super().__init__(dist.new_group(), bf16)
        self.events: list[tuple[str, float, float]] = []
        self.messages: list[tuple[str, int]] = []

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Note how long the context takes."""
        start = time.perf_counter()
        yield
        self.events.append((what, start, time.perf_counter()))

    def start_sum(self, flat: Tensor, n_exact: int = 0) -> Wait:
        began = time.perf_counter()
        wait = super().start_sum(flat, n_exact)
        rounded = self._bf16 and n_exact < len(flat)
        if not rounded:
            self.messages.append(("all_reduce", flat.numel() * flat.element_size()))
        else:
            part = 2 * -(-(len(flat) - n_exact) // self.n_shares)
            self.messages.append(("all_to_all", self.n_shares * (part + n_exact * flat.element_size())))

        def timed() -> None:
            with self.clock("wait"):
                wait()
            self.events.append(("sum", began, time.perf_counter()))

        return timed

    def gather(self, own: Tensor) -> Tensor:
        self.messages.append(("all_gather", own.numel() * own.element_size()))
        with self.clock("gather"):
            return super().gather(own)


def run_rank(rank: int, n_ranks: int, name: str, rounds: int, folder: str) -> None:
    """One rank's trainings; writes ``<rank>.json`` into ``folder``: by way the events of each round, and messages."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n_ranks)
    result = {way: train(WORKLOADS[name], one, rank, rounds) for way, one in WAYS.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


def train(workload: Workload, way: Way, rank: int, rounds: int) -> dict[str, Any]:
    """Refresh in every step; the events of each round, and the messages of the last."""
    torch.manual_seed(rank)
    model = DistributedDataParallel(workload.model().train())
    curvature = Curvature(model.module, update_every_n_steps=1)
    exchange = Traced(way.bf16)
    curvature.connect(exchange, cut=way.cut, may_start=(lambda: True) if way.from_backward else None)

    def invert(blocks: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        with exchange.clock("invert"):
            return damped_inverses(blocks, damping)

    curvature.solve = SharedInversions(exchange, invert)
    inputs, targets = workload.batch()
    events = []
    for _ in range(2 + rounds):  # the first refresh sends nothing from backward, the second one warms up
        model.zero_grad()
        exchange.events, exchange.messages = [], []
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        dist.barrier()
        with exchange.clock("backward"):
            loss.backward()
        with exchange.clock("update"):
            curvature.update()
        events.append(exchange.events)
    return {"events": events[2:], "messages": exchange.messages}


def measure(name: str, n_ranks: int, rounds: int) -> dict[str, dict[str, Any]]:
    """By way: medians over rounds in ms, of rank 0 but for ``invert``, which is of each; messages; a timeline."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMP_NUM_THREADS"] = "1"
        spawn(run_rank, (n_ranks, name, rounds, folder), nprocs=n_ranks)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(n_ranks)]
    return {way: summarise([rank[way] for rank in ranks]) for way in WAYS}


def summarise(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One way's figures from what each rank noted."""

    def median(rank: dict[str, Any], what: str) -> float:
        sums = [sum(float(stop - start) for name, start, stop in one if name == what) for one in rank["events"]]
        return round(1e3 * statistics.median(sums), 3)

    last = ranks[0]["events"][-1]
    origin = min(start for _, start, _ in last)
    return {
        **{what: median(ranks[0], what) for what in ("backward", "update", "wait", "gather")},
        "invert": [median(rank, "invert") for rank in ranks],
        "messages": ranks[0]["messages"],
        "timeline": [(what, round(start - origin, 6), round(stop - origin, 6)) for what, start, stop in last],
        "rounds": len(ranks[0]["events"]),
    }


# ── words and pictures ──


def count_cells(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows under ``COUNT_HEADS``."""
    for name, result in results.items():
        for way, by_ranks in result["counts"].items():
            for n_ranks, one in by_ranks.items():
                both = one["factors"] + one["inverses"]
                yield (
                    name,
                    way,
                    n_ranks,
                    f"{len(one['factors'])} + {len(one['inverses'])}",
                    f"{one['travelling_bytes'] / 2**20:.1f}",
                    f"{one['travelling_bytes'] / one['whole_bytes']:.3f}",
                    f"{moved(both, int(n_ranks)) / 2**20:.1f}",
                )


def time_cells(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows under ``TIME_HEADS``; hidden is what buckets save of the waiting that sums at once have."""
    for name, result in results.items():
        for way, by_ranks in result.get("times", {}).items():
            for n_ranks, one in by_ranks.items():
                at_once = result["times"].get("at once", {}).get(n_ranks)
                hidden = f"{1 - one['wait'] / at_once['wait']:.0%}" if at_once and at_once["wait"] else "–"
                figures = (f"{one[what]:.1f}" for what in ("backward", "update", "wait"))
                yield name, way, n_ranks, *figures, hidden, " ".join(f"{ms:.1f}" for ms in one["invert"])


def save_timeline(results: dict[str, Any], path: Path) -> None:
    """The last measured refresh of each way with the most ranks: what rank 0 did when."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [(name, way, *max(ranks.items(), key=lambda item: int(item[0]))) for name, result in results.items()
             for way, ranks in result.get("times", {}).items()]  # fmt: skip
    lanes = ("backward", "sum", "wait", "invert", "gather", "update")
    colours = ("tab:gray", "tab:blue", "tab:red", "tab:green", "tab:purple", "lightgray")
    figure, axes = pyplot.subplots(len(timed), 1, figsize=(9, 1.9 * len(timed)), squeeze=False, layout="constrained")
    for axis, (name, way, n_ranks, one) in zip(axes[:, 0], timed, strict=True):
        for what, start, stop in one["timeline"]:
            lane = lanes.index(what)
            axis.barh(
                lane, 1e3 * (stop - start), left=1e3 * start, color=colours[lane], edgecolor="black", linewidth=0.3
            )
        axis.set_yticks(range(len(lanes)), lanes)
        axis.invert_yaxis()
        axis.set_title(f"{name}, {way}, {n_ranks} ranks; milliseconds since backward began", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(title: str, heads: Sequence[str], rows: Iterator[tuple[str, ...]]) -> Table:
    """For a terminal."""
    out = Table(title=title)
    for index, head in enumerate(heads):
        out.add_column(head, justify="left" if index < 2 else "right")
    for row in rows:
        out.add_row(*row)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, measure if asked to, write the JSON file and the picture beside it, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=["resnet18", "resnet50", "gpt"])
    parser.add_argument("--measure", type=int, nargs="+", default=[], metavar="RANKS", help="time so many processes")
    parser.add_argument("--rounds", type=int, default=10, help="timed refreshes of each way")
    parser.add_argument("--out", type=Path, default=RESULTS / "communication.json")
    options = parser.parse_args(arguments)
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for name in options.workload:
        result: dict[str, Any] = results.setdefault(name, {})
        result["words"] = WORKLOADS[name].words
        model = WORKLOADS[name].model()
        result["counts"] = {way: {str(n): counts(model, one, n) for n in COUNTED_RANKS} for way, one in WAYS.items()}
        if options.measure:
            result["environment"] = environment(torch.device("cpu"))
            by_ranks = {str(n): measure(name, n, options.rounds) for n in options.measure}
            result["times"] = {way: {n: by_way[way] for n, by_way in by_ranks.items()} for way in WAYS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # By way of text, so that what is printed is what another reader of the file sees: lists for tuples.
    text = json.dumps(results, ensure_ascii=False)
    results = json.loads(text)
    options.out.write_text(text + "\n", encoding="utf-8")
    console = Console()
    console.print(table("A refresh of all layers: what each rank says", COUNT_HEADS, count_cells(results)))
    if any("times" in result for result in results.values()):
        console.print(table("A refresh of all layers: what it takes", TIME_HEADS, time_cells(results)))
        save_timeline(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
