"""The migration door on two ranks under a Trainer with plain "ddp": real processes over gloo.

``python mindspore_workers.py FOLDER`` fits once per variant; each rank saves its weights and curvature as
``FOLDER/<variant>-<rank>.pt``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_thor.mindspore.optimizer import MindSporeThor, thor
from tests.helpers.launching import fork
from tests.helpers.nn_thor_formulas import float64

RANKS, BATCH, STEPS = 2, 6, 5
RATES, DAMPINGS = [0.05, 0.04, 0.03, 0.02, 0.01], [0.5, 0.4, 0.3, 0.2, 0.1]
VARIANTS = ("gpu", "ascend")
SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "batch_size": BATCH, "use_nesterov": True, "frequency": 2}


def make() -> nn.Module:
    """A convolution, a layer norm and dense layers, the last with two outputs."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 8), nn.Linear(8, 2)
    )
    return float64(net, seed=4)


def part(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """The samples of one rank in one step: always the same."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(BATCH, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (BATCH,), generator=generator)


class Module(L.LightningModule):
    def __init__(self, variant: str) -> None:
        super().__init__()
        self.net, self.variant = make(), variant

    def train_dataloader(self) -> DataLoader[Any]:
        parts = [part(step, self.trainer.global_rank) for step in range(STEPS)]
        return DataLoader(parts, batch_size=None)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> MindSporeThor:
        return thor(self.net, RATES, DAMPINGS, 0.9, variant=self.variant, **SETTINGS)


def main() -> None:
    torch.set_num_threads(1)
    for variant in VARIANTS:
        module = Module(variant)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=RANKS,
            strategy="ddp",
            max_epochs=1,
            precision="64-true",
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=sys.argv[1],
        )
        trainer.fit(module)
        (optimizer,) = trainer.optimizers
        saved = {"weights": module.net.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved, Path(sys.argv[1]) / f"{variant}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    fork(RANKS, main)
