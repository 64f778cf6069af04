"""A small model and its data for tests that run a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_thor import Thor, ThorCallback, configure_thor


class Boring(L.LightningModule):
    """Two convolutions, a norm and two linear layers on 8x8 images with 3 classes; THOR by `configure_thor`."""

    def __init__(self, lr: float = 0.01, n: int = 32, batch_size: int = 8, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.lr, self.n, self.batch_size, self.options = lr, n, batch_size, options
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, stride=2),
            nn.Flatten(),
            nn.Linear(36, 16),
            nn.LayerNorm(16),
            nn.Tanh(),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("loss", loss)
        return loss

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy in at least float32, the mean over the batch."""
        return nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.loss(self(x), y))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        out: Tensor = self(batch[0])
        return out

    def configure_optimizers(self) -> Any:
        optimizer: Thor = configure_thor(self, lr=self.lr, **self.options)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def data(self, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(12)
        x = torch.randn(
            self.n, 1, 8, 8, generator=generator, dtype=self.dtype if self.dtype.is_floating_point else None
        )
        y = torch.randint(3, (self.n,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.data()

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.data()


def quiet(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer on the CPU that prints, logs and saves nothing."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """As `quiet`, with `ThorCallback` (every second step) unless ``callbacks`` bring their own."""
    if not any(isinstance(callback, ThorCallback) for callback in callbacks):
        callbacks = (ThorCallback(update_every_n_steps=2, summary=False), *callbacks)
    return quiet(folder, *callbacks, **options)


def callback_of(trainer: L.Trainer) -> ThorCallback:
    (callback,) = (c for c in trainer.callbacks if isinstance(c, ThorCallback))
    return callback


def everything(trainer: L.Trainer) -> list[Tensor]:
    """Weights, the optimizer's state, factors, inverses and learning rates of a finished fit."""
    curvature = callback_of(trainer).curvature
    assert curvature is not None
    (optimizer,) = trainer.optimizers
    module = trainer.lightning_module
    tensors = [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        tensors += [torch.as_tensor(value) for value in optimizer.state[p].values()] if p in optimizer.state else []
    for stack in curvature.factors.batches.values():
        tensors += [stack.average, stack.inverse]
    tensors += [inverted.float() for inverted in curvature.factors.inverted_blocks.values()]
    tensors += [torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)]
    tensors += [torch.tensor([curvature.step, trainer.global_step])]
    return tensors


def without_words(value: Any) -> Any:
    """Nested dicts and lists without the strings in them, which `torch.testing.assert_close` does not compare."""
    if isinstance(value, dict):
        return {key: without_words(part) for key, part in value.items() if not isinstance(part, str)}
    if isinstance(value, list | tuple):
        return [without_words(part) for part in value if not isinstance(part, str)]
    return value


def assert_bitwise(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
