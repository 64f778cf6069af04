"""Real processes over gloo, one thread each: what a refresh takes on several ranks, and steps beside momentum SGD's,
with whole models (DDP) and with sharded ones (FSDP2).

Each rank is a process of this machine: with more ranks than cores they wait for each other's cores too. So inversions,
which talk to nobody, are timed by the processor time of their own process; all else by the clock on the wall.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.models import gpt2, imagenet_resnet18
from benchmarks.communication.inversion_times import inversion_rate
from benchmarks.communication.messages import WAYS, Way
from examples.char_gpt import CharGPT
from examples.resnet import ResNet18, ResNet50
from lightning_thor import Curvature, Thor
from lightning_thor.distributed.communicator import Work
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.distributed.shared_inversions import SharedInversions
from lightning_thor.fsdp.sharded_curvature import ShardedCurvature
from lightning_thor.linalg.decompositions import damped_inverses

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard  # type: ignore[attr-defined]

INTERVAL = 10
SMALL, LARGE = 2**8, 2**20
"""Numbers in the messages that latency and bandwidth are measured by."""


@dataclass
class Workload:
    """A model, and a rank's batch ``(inputs, targets)``; the model gives logits with the classes last."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    words: str


def images(size: int, classes: int) -> tuple[Tensor, Tensor]:
    """32 square images of ``size`` pixels, and their classes."""
    return torch.randn(32, 3, size, size), torch.randint(classes, (32,))


def tokens(windows: int, context: int, vocab_size: int = 65) -> tuple[Tensor, Tensor]:
    """Windows of a text, and the next tokens."""
    return torch.randint(vocab_size, (windows, context)), torch.randint(vocab_size, (windows, context))


WORKLOADS = {
    "resnet18": Workload(ResNet18, lambda: images(32, 10), "ResNet-18, 32 images of 32×32"),
    "resnet18_224": Workload(
        imagenet_resnet18, lambda: images(224, 1000), "ResNet-18 for ImageNet, 32 images of 224×224"
    ),
    "resnet50": Workload(ResNet50, lambda: images(64, 1000), "ResNet-50, 32 images of 64×64"),
    "resnet50_224": Workload(ResNet50, lambda: images(224, 1000), "ResNet-50, 32 images of 224×224"),
    "gpt": Workload(CharGPT, lambda: tokens(16, 128), "GPT, 4 layers of width 128, 2,048 tokens"),
    "gpt256": Workload(
        lambda: CharGPT(layers=4, width=256), lambda: tokens(16, 128), "GPT, 4 layers of width 256, 2,048 tokens"
    ),
    "gpt2": Workload(gpt2, lambda: tokens(2, 1024, 50257), "GPT-2 small, 2,048 tokens"),
    "tiny": Workload(
        lambda: nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 10)),
        lambda: (torch.randn(8, 40), torch.randint(10, (8,))),
        "MLP 40-300-10, to try this program",
    ),
}


class TimedWork:
    """A collective under way, whose wait is timed."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


class Traced(ProcessGroupCommunicator):
    """The ranks, with a clock: ``events`` are ``(what, start, stop)`` in seconds, ``messages`` as of `Counting`."""

    def __init__(self) -> None:
        super().__init__(dist.new_group())
        self.events: list[tuple[str, float, float]] = []
        self.messages: list[tuple[str, int]] = []
        self.inverting = 0.0
        """Seconds of processor time, since it was last set to 0."""

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Note how long the context takes."""
        start = time.perf_counter()
        yield
        self.events.append((what, start, time.perf_counter()))

    def invert(self, blocks: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        """`damped_inverses`, timed."""
        began = time.thread_time()
        with self.clock("invert"):
            inverses = damped_inverses(blocks, damping)
        self.inverting += time.thread_time() - began
        return inverses

    def all_reduce(self, flat: Tensor) -> Work:
        began = time.perf_counter()
        work = super().all_reduce(flat)
        self.messages.append(("all_reduce", flat.numel() * flat.element_size()))

        def timed() -> None:
            with self.clock("wait"):
                work.wait()
            self.events.append(("sum", began, time.perf_counter()))

        return TimedWork(timed)

    def all_gather(self, own: Tensor) -> Tensor:
        self.messages.append(("all_gather", own.numel() * own.element_size()))
        with self.clock("gather"):
            return super().all_gather(own)


def run_rank(rank: int, n_ranks: int, name: str, rounds: int, folder: str) -> None:
    """One rank's trainings; writes ``<rank>.json`` into ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n_ranks)
    workload = WORKLOADS[name]
    result = {
        "ways": {way: train(workload, one, rank, rounds) for way, one in WAYS.items()},
        # With fewer cores than ranks a step is mostly waiting for a core.
        "steps": steps(workload, rank, rounds) if n_ranks <= (os.cpu_count() or 1) else None,
        "sharded_steps": (
            steps(workload, rank, rounds, sharded=True) if 1 < n_ranks <= (os.cpu_count() or 1) else None
        ),
        "messages": message_seconds(10 * rounds) if n_ranks > 1 else {},
        "inversion": inversion_rate(),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


def train(workload: Workload, way: Way, rank: int, rounds: int) -> dict[str, Any]:
    """Refresh in every step; the events of each round, and the messages of the last."""
    gc.collect()
    torch.manual_seed(rank)
    model = DistributedDataParallel(workload.model().train())
    curvature = Curvature(model.module, update_every_n_steps=1)
    communicator = Traced()
    curvature.connect(communicator, bucket_fn=way.bucket_fn, is_sync_step=(lambda: True) if way.from_backward else None)
    curvature.solve = SharedInversions(communicator, communicator.invert)
    inputs, targets = workload.batch()
    events, inverting = [], []
    for _ in range(2 + rounds):  # the first refresh sends nothing from backward, the second one warms up
        model.zero_grad()
        communicator.events, communicator.messages, communicator.inverting = [], [], 0.0
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        dist.barrier()
        with communicator.clock("backward"):
            loss.backward()
        with communicator.clock("update"):
            curvature.update()
        events.append(communicator.events)
        inverting.append(communicator.inverting)
    return {"events": events[2:], "inverting": inverting[2:], "messages": communicator.messages}


def steps(workload: Workload, rank: int, rounds: int, *, sharded: bool = False) -> dict[str, list[float]]:
    """Seconds of each step of momentum SGD and of THOR, which take turns, on whole models or both on sharded ones."""
    gc.collect()  # a curvature and its hooks know each other, and large models fit into memory twice, but not thrice
    torch.manual_seed(rank)
    inputs, targets = workload.batch()
    models: dict[str, nn.Module] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name in ("sgd", "thor"):
        torch.manual_seed(0)
        module = workload.model().train()
        models[name] = shard(module) if sharded else DistributedDataParallel(module)
        optimizers[name] = torch.optim.SGD(models[name].parameters(), lr=1e-4, momentum=0.9)
        if name == "thor":
            curvature, ranks = (
                Curvature(module, update_every_n_steps=INTERVAL),
                ProcessGroupCommunicator(dist.new_group()),
            )
            curvature.connect(ranks, bucket_fn=WAYS["buckets"].bucket_fn, is_sync_step=lambda: True)
            preconditioner = ShardedCurvature(curvature, ranks) if sharded else curvature
            optimizers[name] = Thor(models[name].parameters(), lr=1e-4, preconditioner=preconditioner)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(INTERVAL * (1 + rounds)):
        # Who comes second may find memory that the first one has just let go of.
        for name in list(models) if (number + number // INTERVAL) % 2 else reversed(models):
            dist.barrier()
            began = time.perf_counter()
            optimizers[name].zero_grad()
            F.cross_entropy(models[name](inputs).flatten(0, -2), targets.flatten()).backward()
            optimizers[name].step()
            # What the slowest rank takes is what a step takes.
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
    return {name: every[INTERVAL:] for name, every in seconds.items()}


def shard(model: nn.Module) -> nn.Module:
    """``model``, its layers and blocks sharded over all ranks, each a unit of its own but those that share a weight;
    whole from forward to backward, so that as much is sent in a step as under DDP."""
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    for child in model.children():
        units = child.children() if isinstance(child, nn.Sequential | nn.ModuleList) else (child,)
        for unit in units:
            own = list(unit.parameters())
            if own and all(owners[p] == 1 for p in own):
                fully_shard(unit, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    return model


def message_seconds(times: int) -> dict[str, float]:
    """Seconds of an all-reduce of few and of many numbers, medians."""
    group = dist.new_group()
    medians = {}
    for what, length in (("small", SMALL), ("large", LARGE)):
        numbers, seconds = torch.zeros(length), []
        for _ in range(times):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(numbers, group=group)
            seconds.append(time.perf_counter() - began)
        medians[what] = statistics.median(seconds)
    return medians


def measure(name: str, n_ranks: int, rounds: int) -> dict[str, Any]:
    """Summaries of every way, and of the steps, and the machine's own rates."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMP_NUM_THREADS"] = "1"
        spawn(run_rank, (n_ranks, name, rounds, folder), nprocs=n_ranks)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(n_ranks)]
    return {
        "ways": {way: summarise([rank["ways"][way] for rank in ranks]) for way in WAYS},
        **{
            name: compare(ranks[0][name]) if ranks[0][name] is not None else None for name in ("steps", "sharded_steps")
        },
        "message_ms": {what: round(1e3 * seconds, 4) for what, seconds in ranks[0]["messages"].items()},
        "inversion": round(statistics.median(rank["inversion"] for rank in ranks), 3),
    }


def summarise(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One way's figures: medians over rounds in ms of the rank that waits least, ``inverting`` of each rank."""

    def sums(rank: dict[str, Any], what: str) -> list[float]:
        return [sum(float(stop - start) for name, start, stop in one if name == what) for one in rank["events"]]

    def least(what: str) -> float:
        # Who comes last waits for the network alone, the others for it too.
        rounds = zip(*(sums(rank, what) for rank in ranks), strict=True)
        return float(round(1e3 * statistics.median(min(one) for one in rounds), 3))

    last = ranks[0]["events"][-1]
    origin = min(start for _, start, _ in last)
    return {
        **{what: least(what) for what in ("backward", "update", "wait", "gather")},
        "inverting": [round(1e3 * statistics.median(rank["inverting"]), 3) for rank in ranks],
        "messages": ranks[0]["messages"],
        "timeline": [(what, round(start - origin, 6), round(stop - origin, 6)) for what, start, stop in last],
        "rounds": len(ranks[0]["events"]),
    }


def compare(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Steps of momentum SGD in ms, and what THOR's take over them: those without a refresh (the median of the ratios of
    steps that follow each other), what a refresh adds to each of its interval, and both.

    >>> times = {"sgd": [1.0] * 10, "thor": [2.0] + [1.1] * 9}
    >>> compare(times)
    {'sgd_ms': 1000.0, 'every_10': 1.19, 'plain': 1.1, 'refreshing': 0.09}
    """
    sgd, thor = (
        [seconds[name][start : start + INTERVAL] for start in range(0, len(seconds[name]), INTERVAL)]
        for name in ("sgd", "thor")
    )
    one = [statistics.median(step) for step in sgd]
    plain = [statistics.median(step[1:]) for step in thor]
    ratios = [b / a for theirs, ours in zip(sgd, thor, strict=True) for a, b in zip(theirs[1:], ours[1:], strict=True)]
    adds = [(ours[0] - rest) / INTERVAL / base for ours, rest, base in zip(thor, plain, one, strict=True)]
    without, refreshing = statistics.median(ratios), statistics.median(adds)
    return {
        "sgd_ms": round(1e3 * statistics.median(one), 3),
        "every_10": round(without + refreshing, 4),
        "plain": round(without, 4),
        "refreshing": round(refreshing, 4),
    }
