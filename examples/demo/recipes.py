"""The optimizers that the demo compares, each with its peak learning rate.

How the rates were chosen: ``--tune`` (`examples.demo.tuning`) tries six per optimizer, each twice the one before, on
the same two seeds, and scores a rate by the validation accuracy averaged over the whole training (being good early
counts, and so does being good in the end). Tuning uses seeds and a train/validation split that the demo does not use.
Muon's rate is AdamW's, whose steps have the same size, and was not tuned yet. All else stays at each optimizer's
defaults; the momentum of SGD, which has none by default, is 0.9 like THOR's. The rates for Burgers' equation are those
of `examples.pinn`: THOR's default; for the others the best of three of AdamW's on a similar task, 0.01.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_thor import ThorCallback, configure_thor


@dataclass(frozen=True)
class Recipe:
    """One contender: how to build its optimizer at a peak learning rate, that rate, and the rates that were tried."""

    build: Callable[[nn.Module, float], Optimizer]
    lr: float
    lr_grid: tuple[float, ...]
    callbacks: Callable[[], list[L.Callback]] = list


class MuonAndAdamW(torch.optim.AdamW):
    """`torch.optim.Muon` for hidden matrices and kernels, and AdamW at the same rate for the head and for vectors."""

    def __init__(self, module: nn.Module, lr: float) -> None:
        from benchmarks.common.contenders import FlatMuon, others  # it needs torch 2.9

        hidden: list[Any] = [m.weight for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)][:-1]
        super().__init__(others(module, hidden), lr=lr, weight_decay=0.0)
        self.muon = FlatMuon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]  # schedulers set that one
        self.muon.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.muon.zero_grad()


RECIPES = {
    "THOR": Recipe(
        build=lambda module, lr: configure_thor(module, lr=lr),
        lr=0.04,
        lr_grid=(0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
        callbacks=lambda: [ThorCallback(summary=False)],
    ),
    "momentum SGD": Recipe(
        build=lambda module, lr: torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9),
        lr=0.2,
        lr_grid=(0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
    ),
    "AdamW": Recipe(
        build=lambda module, lr: torch.optim.AdamW(module.parameters(), lr=lr),
        lr=0.02,
        lr_grid=(0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
    ),
    "Muon": Recipe(
        build=lambda module, lr: MuonAndAdamW(module, lr=lr),
        lr=0.02,
        lr_grid=(0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
    ),
}
