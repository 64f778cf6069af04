"""The parts of THOR's extra time in a refresh step, and a lower bound of each.

The floor of a part is its number of multiplications and additions over the rate of a large matrix product, measured in
the same run. Statistics: 2 rows b for each coordinate of a factor in blocks of size b (symmetry would save half, but no
batched product uses it). Inversion: b³ for each block, a third of it Cholesky's. Preconditioning: 2 (b_A + b_G) for
each weight. The update does little arithmetic, so its floor is taken as 0.
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.environment import seconds_of
from benchmarks.common.workloads import Batch, Workload
from benchmarks.step_cost.profiler import PackageProfile
from benchmarks.step_cost.workloads import Runner, make_runner
from lightning_thor import Curvature, Thor

PARTS = ("statistics", "inversion", "preconditioning", "update")
SIDES = {"cpu": 1024, "cuda": 4096}
"""Side of the square matrices whose product shows the rate of a device, by its type."""


class TimedPreconditioner:
    """A `Curvature` as `Thor` uses it, with the seconds of its last update and directions.

    `Thor` asks it for all directions at once, where on a CPU it would ask the curvature itself for a few at a time.
    """

    def __init__(self, curvature: Curvature, device: torch.device) -> None:
        self.curvature, self.device = curvature, device
        self.seconds: dict[str, float] = {}

    def update(self) -> None:
        """As `Curvature.update`: averages and inverses."""
        self.seconds["inversion"] = seconds_of(self.curvature.update, self.device)

    def precondition(self, grads: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """As `Curvature.precondition`."""
        directions: dict[nn.Parameter, Tensor] = {}
        self.seconds["preconditioning"] = seconds_of(
            lambda: directions.update(self.curvature.precondition(grads)), self.device
        )
        return directions


def floor_flops(curvature: Curvature, n_rows: Mapping[str, int]) -> dict[str, float]:
    """Multiplications and additions of each part of a refresh step, given the output rows of each layer in a batch."""
    flops = dict.fromkeys(PARTS, 0.0)
    for name, layer in curvature.layers.items():
        factors = [factor for factor in (layer.A, layer.G) if factor is not None and factor.size > 1]
        takes_all = curvature.max_rows is None or isinstance(layer.module, nn.Embedding)
        rows = n_rows[name] if takes_all else min(n_rows[name], curvature.max_rows or 0)
        flops["statistics"] += 2.0 * rows * sum(one.groups * one.width * one.size for one in factors)
        flops["inversion"] += sum(one.groups * one.n_blocks * one.size**3 for one in factors)
        flops["preconditioning"] += 2.0 * layer.parameters[0].numel() * sum(one.size for one in factors)
    return flops


def count_rows(curvature: Curvature, run: Any) -> dict[str, int]:
    """Output rows of each layer, by name, in the forward pass that ``run`` does."""
    n_rows: dict[str, int] = {}

    def note(name: str, width: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        n_rows[name] = output.numel() // width

    handles = [
        layer.module.register_forward_hook(partial(note, name, layer.G.groups * layer.G.width))
        for name, layer in curvature.layers.items()
    ]
    run()
    for handle in handles:
        handle.remove()
    return n_rows


def measure_parts(workload: Workload, batches: Sequence[Batch], rounds: int, device: torch.device) -> dict[str, Any]:
    """Time the parts of ``rounds`` refresh steps, each beside a step of SGD; other steps than those timed as a whole.

    Returns:
        ``"parts"``: medians of ``PARTS``, as shares of SGD's step; ``"update"`` without SGD's own update. ``"floor"``:
        lower bounds of the same. ``"gflops"``: 10⁹ multiplications and additions a second of a matrix product.
    """
    sgd, thor = make_runner("sgd", workload, device), timed_runner(workload, device)
    timed, curvature = thor.optimizer.preconditioner, thor.curvature  # type: ignore[attr-defined]
    assert curvature is not None
    n_rows = count_rows(curvature, lambda: thor.backward(*batches[0]))
    thor.optimizer.step()
    shares: dict[str, list[float]] = {part: [] for part in PARTS}
    plain, rates = [], []
    for number in range(rounds + 1):
        batch = batches[number % len(batches)]
        sgd.optimizer.zero_grad()
        thor.optimizer.zero_grad()
        backward = seconds_of(partial(sgd.backward, *batch), device)
        update = seconds_of(sgd.optimizer.step, device)
        # Hooks run in the thread of backward, and Python profiles this one.
        with torch.autograd.set_multithreading_enabled(False), PackageProfile(device) as profile:
            thor.backward(*batch)
        step = seconds_of(thor.optimizer.step, device)
        seconds = {"statistics": profile.seconds, **timed.seconds}
        seconds["update"] = step - sum(timed.seconds.values()) - update
        plain.append(backward + update)
        rates.append(matmul_rate(device))
        for part in PARTS:
            shares[part].append(seconds[part] / plain[-1])
    # The first round only warms up.
    second, rate = statistics.median(plain[1:]), statistics.median(rates[1:])
    return {
        "parts": {part: statistics.median(values[1:]) for part, values in shares.items()},
        "floor": {part: flops / rate / second for part, flops in floor_flops(curvature, n_rows).items()},
        "gflops": rate / 1e9,
    }


def timed_runner(workload: Workload, device: torch.device) -> Runner:
    """Build a THOR that refreshes at every step and asks a `TimedPreconditioner`."""
    torch.manual_seed(0)
    model = workload.model().to(device).train()
    curvature = Curvature(model, update_every_n_steps=1)
    thor = Thor(model.parameters(), lr=1e-3, preconditioner=TimedPreconditioner(curvature, device))
    return Runner(model, thor, curvature)


def matmul_rate(device: torch.device) -> float:
    """Multiplications and additions per second of one float32 product of large square matrices."""
    side = SIDES[device.type]
    a = torch.ones(side, side, device=device)
    return 2 * side**3 / seconds_of(lambda: a @ a, device)
