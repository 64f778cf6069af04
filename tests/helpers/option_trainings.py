"""Trainings on several ranks with DDP's options, in other environments, and with several options of ours at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F

from lightning_thor import ThorCallback, ThorDDPStrategy
from tests.helpers import outside_strategy
from tests.helpers.distributed_workers import (
    HALVES,
    QUARTERS,
    Module,
    Net,
    Result,
    fit,
    fit_with_loss_scaling,
    in_buckets,
)
from tests.helpers.watch import Watch


class Crossed(Net):
    """Two branches, which the ranks run in other orders; both have layers of the same shape."""

    def forward(self, images: Tensor, extra: int) -> Tensor:
        hidden = self.hidden(self.norm(F.relu(self.conv(images), inplace=True).flatten(1))).tanh()
        branches = (self.head, self.extra) if dist.get_rank() else (self.extra, self.head)
        outputs = {branch: branch(hidden) for branch in branches}
        logits: Tensor = outputs[self.head] + 0.5 * outputs[self.extra]
        return logits


class Compressed(Module):
    """DDP sends gradients in float16."""

    def on_train_start(self) -> None:
        # Lightning itself registers hooks on a GPU only.
        self.trainer.strategy.model.register_comm_hook(None, default_hooks.fp16_compress_hook)  # type: ignore


class Requeued(Module):
    """At the end of the first epoch the cluster says that the job's time is over."""

    def on_train_epoch_end(self) -> None:
        if self.trainer.current_epoch == 0:
            os.kill(os.getpid(), signal.SIGUSR1)


class Counted(L.Callback):
    """Counts, by batch, the operators of forward and backward, and the messages to other ranks of the whole step."""

    def __init__(self) -> None:
        self.passes: list[dict[str, int]] = []
        self.messages: list[dict[str, int]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._watch = Watch()
        self._watch.__enter__()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.passes.append(dict(self._watch.called))

    def on_train_batch_end(self, *_: Any) -> None:
        self._watch.__exit__(None, None, None)
        messages = ("broadcast_", "allreduce_", "_allgather_base_", "alltoall_base_")
        self.messages.append({name: self._watch.called[name] for name in messages if self._watch.called[name]})


class Plain(Module):
    """Momentum SGD."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def counted(folder: Path, module: Module, strategy: Any, *callbacks: L.Callback) -> Result:
    """One epoch; a refresh is due in its batches 0 and 3, if at all."""
    counts = Counted()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=1,
        precision="64-true",
        callbacks=[*callbacks, counts],
        default_root_dir=folder,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module)
    return {"passes": counts.passes, "messages": counts.messages}


def fit_all_at_once(folder: Path, parts: tuple[int, ...] = HALVES, strategy: Any = None, **options: Any) -> Result:
    """Polar, staggered and with a trace rule; in buckets, unless a strategy is given."""
    return fit(
        folder,
        Module(parts, mode="polar"),
        devices=len(parts),
        max_epochs=4,
        stagger=True,
        trace_rule=(0.2, 0.02),
        strategy=strategy or (in_buckets() if len(parts) > 1 else None),
        **options,
    )


def fit_requeued(folder: Path) -> Result:
    """Lightning saves at the signal, and finds by itself what it saved when the job starts again."""
    fit(folder / "requeued", Requeued(HALVES), max_epochs=1)
    return fit(folder / "requeued", Module(HALVES), max_epochs=3)


def saved_by_two(name: str) -> Path:
    """The checkpoint after the first epoch of a training of `two_ranks`."""
    return Path(os.environ["TWO_RANKS"]) / name / "epoch=0.ckpt"


TRAININGS: dict[str, Callable[[Path], Result]] = {
    "my_ddp": lambda folder: fit(folder, Module(HALVES), max_epochs=3, strategy=outside_strategy.NAME),
    "view": lambda folder: fit(folder, Module(HALVES), max_epochs=3, strategy=in_buckets(gradient_as_bucket_view=True)),
    "view_ddp": lambda folder: fit(
        folder, Module(HALVES), max_epochs=3, strategy=DDPStrategy(gradient_as_bucket_view=True)
    ),
    "polar_view": lambda folder: fit(
        folder, Module(HALVES, mode="polar"), strategy=in_buckets(gradient_as_bucket_view=True)
    ),
    "polar_view_ddp": lambda folder: fit(
        folder, Module(HALVES, mode="polar"), strategy=DDPStrategy(gradient_as_bucket_view=True)
    ),
    "compressed": lambda folder: fit(folder, Compressed(HALVES), max_epochs=3, strategy=in_buckets()),
    "compressed_ddp": lambda folder: fit(folder, Compressed(HALVES), max_epochs=3, strategy="ddp"),
    "crossed": lambda folder: fit(
        folder, Module(HALVES, net=Crossed()), max_epochs=3, strategy=ThorDDPStrategy(factor_bucket_mb=1e-6)
    ),
    "crossed_ddp": lambda folder: fit(folder, Module(HALVES, net=Crossed()), max_epochs=3, strategy="ddp"),
    # Windows of 3 batches and of 1.
    "odd": lambda folder: fit(folder, Module(HALVES), max_epochs=3, accumulate=3, strategy=in_buckets()),
    "all_at_once": lambda folder: fit_all_at_once(folder, checkpoints="all_at_once"),
    "all_at_once_resumed": lambda folder: fit_all_at_once(folder, resume=folder / "all_at_once/epoch=0.ckpt"),
    "all_at_once_ddp": lambda folder: fit_all_at_once(folder, strategy="ddp"),
    "overflow_ddp": lambda folder: fit_with_loss_scaling(
        folder, strategy="ddp", batches=(0, 1, 2, 3, 4, 5), overflow=3
    ),
    "counted": lambda folder: counted(
        folder, Module(HALVES), in_buckets(), ThorCallback(update_every_n_steps=3, block_size=8, summary=False)
    ),
    "counted_sgd": lambda folder: counted(folder, Plain(HALVES), "ddp"),
}
NAMED_ONLY: dict[str, Callable[[Path], Result]] = {
    "four_all_at_once_resumed": lambda folder: fit_all_at_once(folder, QUARTERS, resume=saved_by_two("all_at_once")),
    "requeued": fit_requeued,
}
