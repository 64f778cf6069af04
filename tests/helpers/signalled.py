"""Trainings on two ranks that get a signal, each at another moment of a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_thor import ThorCallback
from lightning_thor.distributed import joint_step
from tests.helpers.boring import quiet
from tests.helpers.distributed_workers import HALVES, Result, whole
from tests.helpers.resumes import FOLDER, THOR_DDP, Broken, Strategy

STEPS = 12


class Signalled(Broken):
    """Rank 0 gets a signal in a forward pass, rank 1 after backward: between other collectives.

    Args:
        signum: None for none.
        ranks: those that get it.
        in_validation: whether it comes in a validation, after four steps, and not after two.
    """

    def __init__(
        self, signum: int | None = None, ranks: Sequence[int] = (0, 1), in_validation: bool = False, **options: Any
    ) -> None:
        super().__init__(HALVES, batches=tuple(range(STEPS)), **options)
        self.signum, self.ranks, self.in_validation = signum, ranks, in_validation

    def send(self, rank: int, step: int) -> None:
        is_here = (self.global_rank, self.trainer.global_step) == (rank, step)
        if self.signum is not None and is_here and rank in self.ranks:
            os.kill(os.getpid(), self.signum)

    def on_train_start(self) -> None:
        self.began = self.trainer.global_step

    def training_step(self, piece: Any, index: int) -> Any:
        if not self.in_validation:
            self.send(0, 2)
        return super().training_step(piece, index)

    def on_after_backward(self) -> None:
        if not self.in_validation:
            self.send(1, 2)

    def val_dataloader(self) -> Any:
        return list(range(8)) if self.in_validation else []

    def validation_step(self, batch: Any, index: int) -> None:
        # Rank 1 is in the second batch, where it waits for rank 0, which is at the end of the first.
        if index == 1:
            self.send(1, 4)
        dist.barrier()
        if index == 0:
            self.send(0, 4)
        assert index < 5 or self.trainer.global_step != 4


def trained(
    folder: Path, module: Signalled, strategy: Strategy, start: str | None = None, saves: bool = True, **options: Any
) -> Result:
    """Weights and the number of steps of a fit that ends as it should, or by the signal."""
    callback = ThorCallback(update_every_n_steps=3, block_size=8, summary=False)
    saver = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=100, save_on_exception=saves)
    if strategy.is_sharded:
        options["precision"] = "32-true"  # the weights are float64 all the same
    trainer = quiet(
        folder, callback, saver, strategy=strategy.made(), devices=2, max_epochs=1, enable_checkpointing=True,
        use_distributed_sampler=False, accumulate_grad_batches=module.micro_batches, num_sanity_val_steps=0,
        val_check_interval=4 * module.micro_batches, **options,
    )  # fmt: skip
    ended = ""
    try:
        trainer.fit(module, ckpt_path=start)
    except SystemExit as error:
        ended = type(error).__name__
    weights = whole({name: weight.detach().clone() for name, weight in module.net.named_parameters()})
    return {"weights": weights, "from": module.began, "step": trainer.global_step, "ended": ended}


def ended_and_resumed(folder: Path, strategy: Strategy, **options: Any) -> Result:
    """An unbroken fit, one that SIGTERM ends, and one that goes on from what that one saved."""
    micro_batches = {"micro_batches": options.pop("micro_batches", 1)}
    own = folder / os.environ["MASTER_PORT"]
    return {
        "unbroken": trained(own / "unbroken", Signalled(**micro_batches), strategy),
        "broken": trained(own / "broken", Signalled(signal.SIGTERM, **micro_batches, **options), strategy),
        "resumed": trained(own / "broken", Signalled(**micro_batches), strategy, "last"),
    }


def requeued(folder: Path, strategy: Strategy) -> Result:
    """An unbroken fit, one that SLURM's signal tells to save, and one that starts as the requeued job."""
    own = folder / strategy.kind
    return {
        "unbroken": trained(own / "unbroken", Signalled(), strategy),
        "broken": trained(own / "broken", Signalled(signal.SIGUSR1), strategy),
        "resumed": trained(own / "broken", Signalled(), strategy),
    }


def alone(folder: Path) -> Result:
    """One rank gets SIGTERM, and cannot save alone what all ranks write."""
    joint_step.SECONDS_ALONE = 0.0
    return trained(folder, Signalled(signal.SIGTERM, ranks=(1,)), THOR_DDP, saves=False)


NAMED_ONLY: dict[str, Callable[[Path], Result]] = {
    "ended": partial(ended_and_resumed, strategy=THOR_DDP),
    "sharded_ended": partial(ended_and_resumed, strategy=FOLDER),
    "accumulating_ended": partial(ended_and_resumed, strategy=THOR_DDP, micro_batches=2),
    "validating_ended": partial(ended_and_resumed, strategy=THOR_DDP, in_validation=True),
    "sharded_validating_ended": partial(ended_and_resumed, strategy=FOLDER, in_validation=True),
    "ended_alone": alone,
    "saved_for_slurm": partial(requeued, strategy=THOR_DDP),
    "sharded_saved_for_slurm": partial(requeued, strategy=FOLDER),
}
