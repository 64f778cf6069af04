"""What THOR's extra time in a refresh step goes into, and the least that it could take.

The floor of a part is the multiplications and additions that it must do over the rate of a large matrix product,
measured in the same run. Statistics: 2 rows b for each coordinate of a factor that is cut into blocks of b (half of it
would do by symmetry, which no batched product uses). Inversion: b³ for each block, a third of it Cholesky's.
Preconditioning: 2 (b_A + b_G) for each weight. The update does little arithmetic, so its floor is taken as 0.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.environment import synchronise
from benchmarks.step_cost.workloads import Runner, Workload, runner
from lightning_thor import Curvature, Thor
from lightning_thor.preconditioning.grouping import Directions, Tensors

PARTS = ("statistics", "inversion", "preconditioning", "update")
SIDES = {"cpu": 1024, "cuda": 4096}
"""Of matrices whose product shows what a device can do."""


class TimedCurvature(Curvature):
    """A `Curvature` that knows how long its parts took since `reset`, and what they had to multiply."""

    def reset(self) -> None:
        """Start anew; before it nothing is timed."""
        self.seconds = dict.fromkeys(("statistics", "inversion", "preconditioning"), 0.0)
        self.flops = dict.fromkeys(("statistics", "inversion", "preconditioning"), 0.0)

    def observe(self, name: str, a: Tensor, g: Tensor) -> None:
        """As `Curvature.observe`: the statistics."""
        with self.timed("statistics", g.device):
            super().observe(name, a, g)
        self.flops["statistics"] += self.statistics_flops(name, g)

    def update(self) -> None:
        """As `Curvature.update`: averages and inverses."""
        blocks = [cut for layer in self.layers.values() for cut in (layer.A, layer.G) if cut is not None]
        self.flops["inversion"] += sum(cut.groups * cut.n_blocks * cut.size**3 for cut in blocks if cut.size > 1)
        with self.timed("inversion", self.factors.device):
            super().update()

    def directions(self, tensors: Tensors, mode: str = "natural") -> Iterator[Directions]:
        """As `Curvature.directions`."""
        for layer in self.layers.values():
            sizes = [cut.size for cut in (layer.A, layer.G) if cut is not None and cut.size > 1]
            self.flops["preconditioning"] += 2.0 * layer.parameters[0].numel() * sum(sizes)
        parts = super().directions(tensors, mode)
        while True:
            with self.timed("preconditioning", self.factors.device):
                part = next(parts, None)
            if part is None:
                return
            yield part

    def statistics_flops(self, name: str, g: Tensor) -> float:
        """Of the covariances of one layer's rows."""
        layer = self.layers[name]
        out = g.shape[-1] if isinstance(layer.module, nn.Linear | nn.Embedding) else g.shape[1]
        n_rows = g.numel() // out
        if self.max_rows is not None and not isinstance(layer.module, nn.Embedding):
            n_rows = min(n_rows, self.max_rows)
        cuts = [cut for cut in (layer.A, layer.G) if cut is not None and cut.size > 1]
        return 2.0 * n_rows * sum(cut.groups * cut.width * cut.size for cut in cuts)

    @contextmanager
    def timed(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the time of this context to ``part``, the device's work included."""
        synchronise(device)
        start = time.perf_counter()
        yield
        synchronise(device)
        self.seconds[part] += time.perf_counter() - start


class TimedStep:
    """An optimizer that knows how long its last step took."""

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self.optimizer, self.device, self.seconds = optimizer, device, 0.0
        self.param_groups = optimizer.param_groups
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        """As the optimizer's."""
        synchronise(self.device)
        start = time.perf_counter()
        self.optimizer.step()
        synchronise(self.device)
        self.seconds = time.perf_counter() - start


def measure_parts(
    workload: Workload, batches: list[tuple[Tensor, Tensor]], rounds: int, device: torch.device
) -> dict[str, Any]:
    """Medians over ``rounds`` refresh steps, each beside a step of SGD, as shares of that step's time.

    These steps are not those whose whole time is reported, so the clocks in them disturb nothing.

    Returns:
        ``parts``: ``statistics``, ``inversion``, ``preconditioning`` and ``update``, the last without what SGD's own
        update takes; ``floor``: the same of the floor; ``gflops``: the rate of a matrix product.
    """
    sgd, thor = runner("sgd", workload, device), timed_runner(workload, device)
    sgd.optimizer, curvature = TimedStep(sgd.optimizer, device), thor.curvature
    assert isinstance(curvature, TimedCurvature)
    shares: dict[str, list[float]] = {part: [] for part in PARTS}
    plain: list[float] = []
    rates = []
    for number in range(rounds + 1):
        batch = batches[number % len(batches)]
        curvature.reset()
        plain.append(sgd.step(*batch))
        thor.step(*batch)
        rates.append(matmul_rate(device))
        own = sum(curvature.seconds[part] for part in ("inversion", "preconditioning"))
        update = thor.optimizer.seconds - own - sgd.optimizer.seconds  # type: ignore[attr-defined]
        for part, seconds in {**curvature.seconds, "update": update}.items():
            shares[part].append(seconds / plain[-1])
    # The first round only warms up.
    second, rate = statistics.median(plain[1:]), statistics.median(rates[1:])
    return {
        "parts": {part: statistics.median(values[1:]) for part, values in shares.items()},
        "floor": {part: flops / rate / second for part, flops in curvature.flops.items()} | {"update": 0.0},
        "gflops": rate / 1e9,
    }


def timed_runner(workload: Workload, device: torch.device) -> Runner:
    """THOR that refreshes at every step, with clocks in it."""
    torch.manual_seed(0)
    model = workload.model().to(device).train()
    curvature = TimedCurvature(model, update_every_n_steps=1)
    curvature.reset()
    thor = Thor(model.parameters(), lr=1e-3, preconditioner=curvature)
    return Runner(model, TimedStep(thor, device), curvature)


def matmul_rate(device: torch.device) -> float:
    """Multiplications and additions per second of one float32 product of large square matrices."""
    side = SIDES[device.type]
    a = torch.ones(side, side, device=device)
    synchronise(device)
    start = time.perf_counter()
    a @ a
    synchronise(device)
    return 2 * side**3 / (time.perf_counter() - start)
