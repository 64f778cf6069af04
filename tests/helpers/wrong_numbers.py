"""Trainings in which numbers go wrong, by THOR beside torch's momentum SGD.

``python -m tests.helpers.wrong_numbers FILE NUMBER ...`` trains the cases of these numbers in `CASES` on two ranks and
writes what broke the laws, a line each.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_thor import Curvature, Thor
from tests.helpers.launching import fork

STEPS, SAMPLES = 8, 6
NAN, INF = math.nan, math.inf
MODES = ("natural", "polar", "adam")
PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}


class Fault(NamedTuple):
    """What goes wrong on the last rank: ``change`` of what is at ``place``, in ``steps``."""

    place: str
    change: Callable[[Tensor], Tensor]
    steps: range = range(3, 4)


def put(number: float) -> Callable[[Tensor], Tensor]:
    """In the place of the first entry."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[0] = number
        return x

    return change


ALWAYS, STORM = range(STEPS), range(2, 6)
FAULTS = {
    **{
        f"{number} in {'one rank’s ' if place == 'gradient' else ''}{place}": Fault(place, put(number))
        for place in ("batch", "activation", "target", "gradient", "factor")
        for number in (NAN, INF)
    },
    "zero gradients from step 2 on": Fault("loss", lambda loss: loss * 0.0, range(2, STEPS)),
    "zero gradients": Fault("loss", lambda loss: loss * 0.0, ALWAYS),
    "zero inputs": Fault("batch", torch.zeros_like, ALWAYS),
    "constant features": Fault("batch", torch.ones_like, ALWAYS),
    "rank one": Fault("batch", lambda x: x[:1] * torch.arange(1, len(x) + 1).to(x).view(-1, 1, 1, 1), ALWAYS),
    "batch of one": Fault("samples", lambda x: x[:1], ALWAYS),
    "inputs times 1e20": Fault("batch", lambda x: x * 1e20, ALWAYS),
    "inputs times 1e-20": Fault("batch", lambda x: x * 1e-20, ALWAYS),
    "overflow storm": Fault("loss", lambda loss: loss * 1e30, STORM),
    "loss spike": Fault("loss", lambda loss: loss * 1e6),
    "loss times 1e-30": Fault("loss", lambda loss: loss * 1e-30, ALWAYS),
}
CASES = list(product(FAULTS, PRECISIONS, MODES))


def net(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3),
    ).to(dtype)  # fmt: skip


class Training:
    """One model with its optimizer, on one rank or several.

    Args:
        model: a `net`.
        make_optimizer: of the model and of a function that returns the loss scale.
        fault: what happens on this rank; None: nothing.
        precision: as of a Trainer.
    """

    def __init__(
        self,
        model: nn.Sequential,
        make_optimizer: Callable[[nn.Module, Callable[[], float]], torch.optim.Optimizer],
        fault: Fault | None,
        precision: str,
    ) -> None:
        self.model, self.fault, self.precision = model, fault, precision
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=precision == "16-mixed")
        self.optimizer = make_optimizer(model, self.scaler.get_scale)
        self.step = -1
        model[4].register_forward_hook(lambda module, args, out: self.at("activation", out))
        model[4].weight.register_hook(lambda grad: self.at("gradient", grad))
        self.forward = DistributedDataParallel(model) if dist.is_initialized() else model

    def at(self, place: str, x: Tensor) -> Tensor:
        fault = self.fault
        return fault.change(x) if fault and fault.place == place and self.step in fault.steps else x

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Leaves unscaled gradients."""
        self.step += 1
        x, y = (self.at("samples", z) for z in (x, y))
        self.optimizer.zero_grad()
        half = torch.float16 if self.precision.startswith("16") else torch.bfloat16
        with torch.autocast("cpu", half, enabled=self.precision.endswith("mixed")):
            out = self.forward(self.at("batch", x))
        difference = out.to(torch.promote_types(out.dtype, torch.float32)) - self.at("target", y)
        self.scaler.scale(self.at("loss", difference.square().mean())).backward()
        self.scaler.unscale_(self.optimizer)

    def apply(self) -> bool:
        """Whether the step was not skipped."""
        applied: list[bool] = []
        handle = self.optimizer.register_step_post_hook(lambda *_: applied.append(True))
        self.scaler.step(self.optimizer)
        handle.remove()
        self.scaler.update()
        return bool(applied)


def broken_laws(fault_name: str, precision: str, mode: Any) -> Iterator[str]:
    """Trains with a fault, on all ranks at once if there are several; says which laws did not hold."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dtype, fault = PRECISIONS[precision], FAULTS[fault_name]
    own = fault if rank == world - 1 or fault.place == "factor" else None
    sgd_options: dict[str, Any] = {"lr": 0.006, "momentum": 0.9, "nesterov": True}
    curvatures: list[Curvature] = []

    def thor(model: nn.Module, scale: Callable[[], float]) -> torch.optim.Optimizer:
        curvatures.append(Curvature(model, mode=mode, block_size=16, update_every_n_steps=2, loss_multiplier=scale))
        return Thor(model.parameters(), mode=mode, preconditioner=curvatures[0])

    ours = Training(net(dtype), thor, own, precision)
    rival = Training(net(dtype), lambda model, _: torch.optim.SGD(model.parameters(), **sgd_options), own, precision)
    (curvature,) = curvatures
    factors = curvature.factors
    twin = copy.deepcopy(list(ours.model.parameters()))
    twins = torch.optim.SGD(twin, **sgd_options)
    """Weights that momentum SGD moves by the gradients of THOR's own run."""
    generator = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        x = torch.randn(SAMPLES, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64).to(
            torch.promote_types(dtype, torch.float32)
        )
        ours.backward(x, y)
        for ghost, p in zip(twin, ours.model.parameters(), strict=True):
            ghost.grad = p.grad.clone()
        if ours.apply():
            twins.step()
        else:
            curvature.discard()
        rival.backward(x, y)
        rival.apply()
        if own and own.place == "factor" and step in own.steps:
            for batch in factors.batches.values():
                batch.average[0] = own.change(batch.average[0])
        for (name, p), ghost in zip(ours.model.named_parameters(), twin, strict=True):
            if bool(ghost.isfinite().all()) and not bool(p.isfinite().all()):
                yield f"step {step}: {name} is not finite, SGD's is with the same gradients"
        for size, batch in factors.batches.items():
            if not bool(batch.inverse.isfinite().all()):
                yield f"step {step}: an inverse of size {size} is not finite"
            if fault.place != "factor" and not bool(batch.average.isfinite().all()):
                yield f"step {step}: a factor of size {size} is not finite"
    if curvature.left_out:
        yield f"curvature was taken away: {curvature.left_out}"
    lost = [name for name, p in ours.model.named_parameters() if not bool(p.isfinite().all())]
    if lost and all(bool(p.isfinite().all()) for p in rival.model.parameters()):
        yield f"{', '.join(lost)} not finite, all of SGD's own run are"
    if world > 1:
        weights = torch.cat([p.detach().double().flatten() for p in ours.model.parameters()])
        both = [torch.empty_like(weights) for _ in range(world)]
        dist.all_gather(both, weights)
        if not torch.equal(both[0].nan_to_num(), both[1].nan_to_num()):
            yield "ranks have different weights"
    curvature.close()


def laws_broken_in(case: tuple[str, str, str]) -> list[str]:
    """What was broken, an exception included."""
    try:
        return list(broken_laws(*case))
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]


def main(file: Path, numbers: list[int]) -> None:
    """On one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = [CASES[number] for number in numbers]
    lines = [f"{' / '.join(case)}: {law}" for case in cases for law in laws_broken_in(case)]
    file.with_suffix(f".{dist.get_rank()}").write_text("\n".join(lines), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    fork(2, lambda: main(Path(sys.argv[1]), [*map(int, sys.argv[2:])]))
