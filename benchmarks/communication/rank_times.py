"""Real processes over gloo, one thread each: times of a refresh on several ranks, and of steps beside momentum SGD's,
with whole models (DDP) and with sharded ones (FSDP2).

Each rank is a process of this machine: with more ranks than cores they also wait for each other's cores. So inversions,
which do not communicate, are timed by the processor time of their own process, everything else by the wall clock.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.workloads import Workload
from benchmarks.communication.inversion_times import inversion_rate
from benchmarks.communication.messages import WAYS, Messages, Way
from benchmarks.communication.workloads import WORKLOADS
from lightning_thor import Curvature, ShardedCurvature, Thor
from lightning_thor.distributed.communicator import Work
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.distributed.shared_inversions import SharedInversions
from lightning_thor.linalg.decompositions import INVERSE, damped_inverses

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard  # type: ignore[attr-defined]

INTERVAL = 10
SMALL_NUMEL, LARGE_NUMEL = 2**8, 2**20
"""Messages from which latency and bandwidth follow."""


class TimedCommunicator(ProcessGroupCommunicator):
    """The ranks of a new process group, with a clock.

    Attributes:
        events: ``(event, start, stop)`` in seconds.
        messages: see `Messages`.
        inverting: seconds of processor time spent in `invert`.
    """

    def __init__(self) -> None:
        super().__init__(dist.new_group())
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.events: list[tuple[str, float, float]] = []
        self.messages: Messages = []
        self.inverting = 0.0

    @contextmanager
    def clock(self, event: str) -> Iterator[None]:
        """Note the time of this context."""
        start = time.perf_counter()
        yield
        self.events.append((event, start, time.perf_counter()))

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
        self.messages.append(("all_reduce", flat.nbytes))

        def wait() -> None:
            with self.clock("wait"):
                work.wait()
            self.events.append(("sum", began, time.perf_counter()))

        return SimpleNamespace(wait=wait)

    def all_gather(self, own: Tensor) -> Tensor:
        self.messages.append(("all_gather", own.nbytes))
        with self.clock("gather"):
            return super().all_gather(own)


def run_rank(rank: int, n_ranks: int, name: str, rounds: int, folder: str) -> None:
    """Run the trainings of one of ``n_ranks`` processes, which meet in ``folder``, and write ``<rank>.json`` there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n_ranks)
    workload = WORKLOADS[name]
    # With fewer cores than ranks a step is mostly waiting for a core.
    has_cores = n_ranks <= (os.cpu_count() or 1)
    result = {
        "ways": {way: time_refreshes(workload, one, rank, rounds) for way, one in WAYS.items()},
        "steps": time_steps(workload, rank, rounds) if has_cores else None,
        "sharded_steps": time_steps(workload, rank, rounds, sharded=True) if has_cores and n_ranks > 1 else None,
        "messages": message_seconds(10 * rounds) if n_ranks > 1 else {},
        "inversion": inversion_rate(),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


def time_refreshes(workload: Workload, way: Way, rank: int, rounds: int) -> dict[str, Any]:
    """Refresh in every step, on a model and a batch that ``rank`` seeds.

    Returns:
        ``"events"`` and ``"inverting"`` of each round, and the ``"messages"`` of the last, see `TimedCommunicator`.
    """
    gc.collect()
    torch.manual_seed(rank)
    model = DistributedDataParallel(workload.model().train())
    curvature = Curvature(model.module, update_every_n_steps=1)
    communicator = TimedCommunicator()
    curvature.connect(communicator, bucket_fn=way.bucket_fn, is_sync_step=(lambda: True) if way.from_backward else None)
    # The curvature offers no place for a timed inversion but this one.
    curvature.solve = SharedInversions(communicator, INVERSE._replace(make=communicator.invert))
    inputs, targets = workload.batch()
    events, inverting = [], []
    for _ in range(2 + rounds):  # the first refresh sends nothing from backward, the second one warms up
        model.zero_grad()
        communicator.reset()
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        dist.barrier()
        with communicator.clock("backward"):
            loss.backward()
        with communicator.clock("update"):
            curvature.update()
        events.append(communicator.events)
        inverting.append(communicator.inverting)
    return {"events": events[2:], "inverting": inverting[2:], "messages": communicator.messages}


def time_steps(workload: Workload, rank: int, rounds: int, *, sharded: bool = False) -> dict[str, list[float]]:
    """Time steps of momentum SGD and of THOR, which take turns, in ``rounds`` intervals between refreshes.

    Returns:
        Seconds of each step, by ``"sgd"`` and ``"thor"``; of models sharded by ``fully_shard`` if ``sharded``.
    """
    # A curvature and its hooks refer to each other, and large models fit into memory twice, but not thrice.
    gc.collect()
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
            curvature = Curvature(module, update_every_n_steps=INTERVAL)
            communicator = ProcessGroupCommunicator(dist.new_group())
            curvature.connect(communicator, bucket_fn=WAYS["buckets"].bucket_fn, is_sync_step=lambda: True)
            preconditioner = ShardedCurvature(curvature, communicator) if sharded else curvature
            optimizers[name] = Thor(models[name].parameters(), lr=1e-4, preconditioner=preconditioner)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(INTERVAL * (1 + rounds)):
        # The second one may use memory that the first one has just freed.
        for name in list(models) if (number + number // INTERVAL) % 2 else reversed(models):
            dist.barrier()
            began = time.perf_counter()
            optimizers[name].zero_grad()
            F.cross_entropy(models[name](inputs).flatten(0, -2), targets.flatten()).backward()
            optimizers[name].step()
            # A step takes as long as it takes the slowest rank.
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
    return {name: every[INTERVAL:] for name, every in seconds.items()}


def shard(model: nn.Module) -> nn.Module:
    """Shard ``model`` over all ranks: layers and blocks without shared weights are units of their own. Weights stay
    whole from forward to backward, so that a step sends as much as under DDP. Returns ``model``."""
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
    """Median seconds of an all-reduce, of ``SMALL_NUMEL`` and of ``LARGE_NUMEL`` numbers."""
    group = dist.new_group()
    medians = {}
    for name, numel in (("small", SMALL_NUMEL), ("large", LARGE_NUMEL)):
        numbers, seconds = torch.zeros(numel), []
        for _ in range(times):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(numbers, group=group)
            seconds.append(time.perf_counter() - began)
        medians[name] = statistics.median(seconds)
    return medians


def measure(name: str, n_ranks: int, rounds: int) -> dict[str, Any]:
    """Run ``n_ranks`` processes; returns summaries of each way and of the steps, and the machine's own rates."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMP_NUM_THREADS"] = "1"
        spawn(run_rank, (n_ranks, name, rounds, folder), nprocs=n_ranks)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(n_ranks)]
    first = ranks[0]
    return {
        "ways": {way: summarise([rank["ways"][way] for rank in ranks]) for way in WAYS},
        **{kind: None if first[kind] is None else compare(first[kind]) for kind in ("steps", "sharded_steps")},
        "message_ms": {size: round(1e3 * seconds, 4) for size, seconds in first["messages"].items()},
        "inversion": round(statistics.median(rank["inversion"] for rank in ranks), 3),
    }


def summarise(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One way's figures from `time_refreshes` of each rank: medians over rounds in ms, each of the rank that waits
    least, and ``inverting`` by rank."""

    def sums(rank: dict[str, Any], event: str) -> list[float]:
        return [sum(float(stop - start) for name, start, stop in one if name == event) for one in rank["events"]]

    def least(event: str) -> float:
        # The last rank waits for the network alone, the others for that rank too.
        rounds = zip(*(sums(rank, event) for rank in ranks), strict=True)
        return float(round(1e3 * statistics.median(min(one) for one in rounds), 3))

    last = ranks[0]["events"][-1]
    origin = min(start for _, start, _ in last)
    return {
        **{event: least(event) for event in ("backward", "update", "wait", "gather")},
        "inverting": [round(1e3 * statistics.median(rank["inverting"]), 3) for rank in ranks],
        "messages": ranks[0]["messages"],
        "timeline": [(event, round(start - origin, 6), round(stop - origin, 6)) for event, start, stop in last],
        "rounds": len(ranks[0]["events"]),
    }


def compare(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Compare the steps of `time_steps`; each interval begins with a refresh.

    Returns:
        ``"sgd_ms"``: of SGD's step; the others are ratios to it. ``"plain"``: steps without a refresh, the median of
        the ratios of steps that follow each other; ``"refreshing"``: the extra time of a refresh, per step of its
        interval; ``"every_10"``: both together.

    >>> times = {"sgd": [1.0] * 10, "thor": [2.0] + [1.1] * 9}
    >>> compare(times)
    {'sgd_ms': 1000.0, 'every_10': 1.19, 'plain': 1.1, 'refreshing': 0.09}
    """
    sgd, thor = (
        [seconds[name][start : start + INTERVAL] for start in range(0, len(seconds[name]), INTERVAL)]
        for name in ("sgd", "thor")
    )
    base = [statistics.median(steps) for steps in sgd]
    plain = [statistics.median(steps[1:]) for steps in thor]
    ratios = [b / a for theirs, ours in zip(sgd, thor, strict=True) for a, b in zip(theirs[1:], ours[1:], strict=True)]
    extra = [(ours[0] - rest) / INTERVAL / one for ours, rest, one in zip(thor, plain, base, strict=True)]
    without, refreshing = statistics.median(ratios), statistics.median(extra)
    return {
        "sgd_ms": round(1e3 * statistics.median(base), 3),
        "every_10": round(without + refreshing, 4),
        "plain": round(without, 4),
        "refreshing": round(refreshing, 4),
    }
