"""A physics-informed network (Raissi et al. 2019) trained with THOR, beside other optimizers for equally many seconds
of the processor: ``python -m examples.pinn --equation burgers --optimizers thor adamw muon`` prints errors and draws.

One call takes points inside and on the border: of points inside alone, the last layer may get no gradient at its
output, and no curvature. What THOR observes there: docs/tutorials/pinn.md.
"""

import argparse
import math
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from examples.demo.pictures import save_fields
from examples.demo.recipes import MuonAndAdamW
from examples.demo.training import QUIET, keep_lightning_quiet
from lightning_thor import ThorCallback, configure_thor


class Equation(NamedTuple):
    """An equation for u of two coordinates from ``low`` to 1; u is known on ``sides``: (axis, value)."""

    words: str
    exact: Callable[[Tensor], Tensor]  # points [n, 2] to values [n]
    terms: Callable[..., Tensor]  # points, u [n], its derivatives [n, 2], a function of axis for second ones
    low: tuple[float, float] = (-1.0, 0.0)
    sides: tuple[tuple[int, float], ...] = ((1, 0.0), (0, -1.0), (0, 1.0))

    def residual(self, x: Tensor, u: Tensor) -> Tensor:
        """What ``u [n]``, computed from ``x [n, 2]``, leaves of the equation."""
        first = gradient(u, x)
        return self.terms(x, u, first, lambda axis: gradient(first[:, axis], x)[:, axis])


def gradient(u: Tensor, x: Tensor) -> Tensor:
    """Derivatives of ``u [n]`` by ``x [n, 2]``, which can be differentiated again."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def waves(x: Tensor) -> Tensor:
    """sin 2πx sin πy, the solution of Poisson's equation."""
    return (2 * math.pi * x[:, 0]).sin() * (math.pi * x[:, 1]).sin()


def burgers(x: Tensor) -> Tensor:
    """From -sin(πx), by the Cole-Hopf transform and Gauss-Hermite quadrature (Basdevant et al. 1986)."""
    z, weights = (torch.from_numpy(part).to(x) for part in numpy.polynomial.hermite.hermgauss(100))
    y = math.pi * (x[:, :1] - (0.08 * x[:, 1:]).sqrt() * z)
    density = weights * ((-1 - y.cos()) / (0.04 * math.pi)).exp()
    return -(density * y.sin()).sum(1) / density.sum(1)


EQUATIONS = {
    "poisson": Equation(
        "∂²u/∂x² + ∂²u/∂y² = −5π² sin 2πx sin πy", waves,
        lambda x, u, first, second: (second(0) + second(1)) / (5 * math.pi**2) + waves(x),
        (0.0, 0.0), ((0, 0.0), (0, 1.0), (1, 0.0), (1, 1.0)),
    ),
    "heat": Equation(
        "∂u/∂t = 0.05 ∂²u/∂x²", lambda x: (2 * math.pi * x[:, 0]).sin() * (-0.2 * math.pi**2 * x[:, 1]).exp(),
        lambda x, u, first, second: first[:, 1] - 0.05 * second(0),
    ),
    "burgers": Equation(
        "∂u/∂t + u ∂u/∂x = 0.02 ∂²u/∂x²", burgers,
        lambda x, u, first, second: first[:, 1] + u * first[:, 0] - 0.02 * second(0),
    ),
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "thor": lambda network: configure_thor(network, lr=3e-3),
    "adamw": lambda network: torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0),
    "muon": lambda network: MuonAndAdamW(network, lr=1e-2),
    "sgd": lambda network: torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.9),
    "soap": lambda network: import_module("pytorch_optimizer").SOAP(network.parameters(), lr=1e-2, weight_decay=0.0),
}


class PINN(L.LightningModule):
    """Four tanh layers of 64. The rate falls to 0 over so many seconds of steps, or so many steps."""

    def __init__(self, equation: Equation, optimizer: str, seconds: float, steps: int) -> None:
        super().__init__()
        self.equation, self.optimizer, self.limits = equation, optimizer, (seconds, steps)
        hidden = (part for width in (2, 64, 64, 64) for part in (nn.Linear(width, 64), nn.Tanh()))
        self.network = nn.Sequential(*hidden, nn.Linear(64, 1))
        self.grid = torch.cartesian_prod(*(torch.linspace(low, 1, 101) for low in equation.low))
        self.seconds, self.curve = 0.0, [(0.0, self.error())]  # of steps so far, with relative errors

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        self.started = time.process_time()
        equation, low = self.equation, torch.tensor(self.equation.low)
        inside, border = (low + (1 - low) * torch.rand(640, 2)).split([512, 128])
        for i, (axis, value) in enumerate(equation.sides):
            border[i :: len(equation.sides), axis] = value
        values: Tensor = self.network(torch.cat([inside.requires_grad_(), border]))[:, 0]
        u, known = values[:512], values[512:]
        return equation.residual(inside, u).square().mean() + 10 * (known - equation.exact(border)).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self)
        rule = LambdaLR(optimizer, lambda step: min(20 * self.share(step + 1), math.cos(1.57 * self.share(step)) ** 2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rule, "interval": "step"}}

    def share(self, step: int) -> float:
        return min(1.0, max(self.seconds / self.limits[0], step / self.limits[1]))

    def on_train_batch_end(self, outputs: Any, batch: int, batch_idx: int) -> None:
        self.seconds += time.process_time() - self.started
        self.trainer.should_stop = self.share(batch_idx + 1) == 1
        if self.share(batch_idx + 1) >= len(self.curve) / 50:
            self.curve.append((self.seconds, self.error()))

    @torch.no_grad()
    def error(self) -> float:
        u = self.equation.exact(self.grid)
        return float((self.network(self.grid)[:, 0] - u).norm() / u.norm())


def main(arguments: list[str] | None = None) -> dict[str, PINN]:
    """Train with each optimizer in turn, print errors, and draw; returns what was trained."""
    parser = argparse.ArgumentParser(description="A physics-informed network, trained with THOR and others.")
    parser.add_argument("--equation", choices=EQUATIONS, default="burgers")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["thor", "adamw"])
    parser.add_argument("--seconds", type=float, default=20, help="of training, for each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10**6, help="at most, for each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/pinn"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    keep_lightning_quiet()
    torch.set_num_threads(1)
    modules = {}
    for name in options.optimizers:
        L.seed_everything(0, verbose=False)  # the same initial weights and points for all
        modules[name] = module = PINN(EQUATIONS[options.equation], name, options.seconds, options.steps)
        trainer = L.Trainer(max_epochs=1, callbacks=ThorCallback(summary=False) if name == "thor" else None, **QUIET)
        print(f"{name}: training for {options.seconds:g} s", flush=True)
        trainer.fit(module, range(options.steps))  # a batch is only its number: the step draws the points
        print(f"{name}: relative error {module.error():.1e} after {module.seconds:.1f} s")
    save_fields(options.out / "pinn.png", module.equation.words, module.equation.exact, modules)
    return modules


if __name__ == "__main__":
    main()
