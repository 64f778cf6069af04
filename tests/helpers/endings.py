"""Trainings on two ranks that one of them leaves in the middle of a step that refreshes, in several ways."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_thor import ThorModelParallelStrategy
from tests.helpers.distributed_workers import HALVES, Module, Result, fit, in_buckets
from tests.helpers.sharded_workers import fully_shard

TIMEOUT = 6
"""Seconds that a rank waits for one that hangs; for others it waits as long as by default, half an hour."""


def throw() -> None:
    raise RuntimeError("a rank of the test raised")


def interrupt() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os._exit(13)


def hang() -> None:
    time.sleep(2 * TIMEOUT)


class Leaving(Module):
    """One rank ends in batch 3, which refreshes.

    Args:
        leaver: that rank.
        how: what it does.
        in_backward: when: before its forward pass; or in the middle of backward, when the factors of the layers above
            the norm are on their way. The other rank does not use the first of those layers in that batch: there none
            is on its way before the step, and in backward it waits for gradients.
    """

    def __init__(self, leaver: int, how: Callable[[], None], in_backward: bool, **options: Any) -> None:
        super().__init__(HALVES, extra=lambda rank, number: int(number != 3 or rank == leaver), **options)
        self.leaver, self.how, self.in_backward = leaver, how, in_backward

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for module in (self.net.hidden, self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def loss(self, inputs: Tensor, targets: Tensor, number: int) -> Tensor:
        if (self.trainer.global_rank, number) != (self.leaver, 3):
            return super().loss(inputs, targets, number)
        if not self.in_backward:
            self.how()

        def hooked(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda g: self.how())

        handle = self.net.norm.register_forward_hook(hooked)
        loss = super().loss(inputs, targets, number)
        handle.remove()
        return loss


def leave(folder: Path, leaver: int, how: Callable[[], None], in_backward: bool, sharded: bool = False) -> Result:
    limit = {"timeout": timedelta(seconds=TIMEOUT)} if how is hang else {}
    if sharded:
        module = Leaving(leaver, how, in_backward, dtype=torch.float32)
        return fit(
            folder, module, strategy=ThorModelParallelStrategy(factor_bucket_mb=1e-6, **limit), precision="32-true"
        )
    return fit(folder, Leaving(leaver, how, in_backward), strategy=in_buckets(find_unused_parameters=True, **limit))


NAMED_ONLY: dict[str, Callable[[Path], Result]] = {
    "raises": lambda folder: leave(folder, 1, throw, in_backward=True),
    "interrupted": lambda folder: leave(folder, 0, interrupt, in_backward=False),
    "interrupted_in_backward": lambda folder: leave(folder, 1, interrupt, in_backward=True),
    "dies_in_backward": lambda folder: leave(folder, 0, die, in_backward=True),
    "hangs": lambda folder: leave(folder, 1, hang, in_backward=True),
    "sharded_raises": lambda folder: leave(folder, 1, throw, in_backward=True, sharded=True),
    "sharded_interrupted": lambda folder: leave(folder, 0, interrupt, in_backward=False, sharded=True),
}
