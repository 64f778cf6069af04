"""Trainings on several ranks with DDP's options, in other environments, and with several options of ours at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn import functional as F

from lightning_thor import ThorCallback, ThorDDPStrategy
from tests.helpers import outside_strategy
from tests.helpers.boring import quiet
from tests.helpers.distributed_workers import (
    HALVES,
    IN_WINDOW,
    QUARTERS,
    Module,
    Net,
    Result,
    Unfreezing,
    in_buckets,
    training,
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
        self.trainer.strategy.model.register_comm_hook(None, default_hooks.fp16_compress_hook)


class PowerSGD(ThorDDPStrategy):
    """DDP sends gradients as products of two narrow matrices, from the third step on."""

    def __init__(self) -> None:
        state = PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2, min_compression_rate=0.1)
        super().__init__(ddp_comm_state=state, ddp_comm_hook=powerSGD_hook)

    def _register_ddp_hooks(self) -> None:
        # Lightning itself registers hooks on a GPU only.
        self.model.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)


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
    options = {"precision": "64-true", "max_epochs": 1, "use_distributed_sampler": False}
    quiet(folder, *callbacks, counts, devices=2, strategy=strategy, **options).fit(module)
    return {"passes": counts.passes, "messages": counts.messages}


ALL_AT_ONCE = {"mode": "polar", "max_epochs": 4, "stagger": True, "trace_rule": (0.2, 0.02)}


VIEW: Any = {"gradient_as_bucket_view": True}
TRAININGS: dict[str, Callable[[Path], Result]] = {
    "my_ddp": training(max_epochs=3, strategy=outside_strategy.NAME),
    "view": training(max_epochs=3, strategy=partial(in_buckets, **VIEW)),
    "view_ddp": training(max_epochs=3, strategy=partial(DDPStrategy, **VIEW)),
    "polar_view": training(mode="polar", strategy=partial(in_buckets, **VIEW)),
    "polar_view_ddp": training(mode="polar", strategy=partial(DDPStrategy, **VIEW)),
    "compressed": training(kind=Compressed, max_epochs=3, strategy=in_buckets),
    "compressed_unfrozen": training(kind=Unfreezing, max_epochs=3, strategy=PowerSGD),
    "compressed_ddp": training(kind=Compressed, max_epochs=3, strategy="ddp"),
    "crossed": training(
        kind=lambda parts: Module(parts, net=Crossed()),
        max_epochs=3,
        strategy=partial(ThorDDPStrategy, factor_bucket_mb=1e-6),
    ),
    "crossed_ddp": training(kind=lambda parts: Module(parts, net=Crossed()), max_epochs=3, strategy="ddp"),
    # Windows of 3 batches and of 1.
    "odd": training(max_epochs=3, accumulate=3, strategy=in_buckets),
    "all_at_once": training(checkpoints="all_at_once", strategy=in_buckets, **ALL_AT_ONCE),
    "all_at_once_resumed": training(resume="all_at_once", strategy=in_buckets, **ALL_AT_ONCE),
    "all_at_once_ddp": training(strategy="ddp", **ALL_AT_ONCE),
    "overflow_ddp": training(strategy="ddp", **IN_WINDOW),
    "counted": lambda folder: counted(
        folder, Module(HALVES), in_buckets(), ThorCallback(update_every_n_steps=3, block_size=8, summary=False)
    ),
    "counted_sgd": lambda folder: counted(folder, Plain(HALVES), "ddp"),
}
FOUR: dict[str, Callable[[Path], Result]] = {
    "four_all_at_once_resumed": training(QUARTERS, resume="all_at_once", strategy=in_buckets, **ALL_AT_ONCE),
}
