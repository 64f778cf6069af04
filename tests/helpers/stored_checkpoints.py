"""Trainings whose checkpoints, as earlier versions wrote them, lie in ``tests/data/checkpoints``; the present version
has to go on from them as those did.

``NAME.ckpt`` is the Trainer's checkpoint of `SAVED_AT` steps, a file or a folder of shards; ``NAME.after.pt`` holds the
losses of the steps that followed, until `LAST_STEP`, and the weights they led to. `tests.helpers.make_checkpoints`
wrote them, and only it does. ``python stored_checkpoints.py FOLDER`` goes on on two ranks, see `go_on_on_two_ranks`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_thor import ThorCallback, ThorDDPStrategy, ThorModelParallelStrategy, configure_thor
from lightning_thor.schedules import Exponential, PerStepLR, Polynomial
from tests.helpers.launching import fork

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard

STORED = Path(__file__).parents[1] / "data" / "checkpoints"
FORMER = STORED / "former"
ROWS, LENGTH, SYMBOLS = 16, 5, 7
SAVED_AT, LAST_STEP = 7, 14
"""Steps: of one epoch, and of both. (Within an epoch Lightning would go on with its first batch again.) Refreshes come
every third step: the checkpoint lies between two of them."""

Result = dict[str, Any]


class Training(NamedTuple):
    """How to train.

    Args:
        mode: of the optimizer.
        options: of `ThorCallback`, besides those that all have.
        n_ranks: which share each batch out in equal parts.
        strategy: makes the Trainer's.
        tied: the output layer's weight is the table's.
        loss_scale: what the loss is multiplied by, which changes nothing but the unit that gradients are noted in.
        of_optimizer: options of `Thor` that have other defaults now.
        recurrent: an LSTM stands in the place of the convolution.
    """

    mode: str = "natural"
    options: dict[str, Any] = {}  # noqa: RUF012  # nobody writes into it
    n_ranks: int = 1
    strategy: Callable[[], Any] = lambda: "auto"
    tied: bool = False
    loss_scale: float = 1.0
    of_optimizer: dict[str, Any] = {"max_relative_step": None, "rms_averaging": 0.0}  # noqa: RUF012
    recurrent: bool = False


def kept_by_one() -> ThorDDPStrategy:
    return ThorDDPStrategy(inverse_workers=1)


def in_a_folder() -> ThorModelParallelStrategy:
    return ThorModelParallelStrategy()


def in_one_file() -> ThorModelParallelStrategy:
    return ThorModelParallelStrategy(save_distributed_checkpoint=False)


TRAININGS = {
    "natural": Training(),
    "natural_with_running_means": Training(loss_scale=1e-9, of_optimizer={}),
    "natural_tied": Training(tied=True, loss_scale=1e-9),
    "polar": Training("polar", {"stagger": True}),
    "adam": Training("adam", {"precondition_bias": True}),
    "ddp_natural": Training("natural", {}, 2, lambda: "thor_ddp"),
    "ddp_polar_kept_by_one": Training("polar", {}, 2, kept_by_one),
    "fsdp2_natural": Training("natural", {}, 2, in_one_file),
    "fsdp2_polar_in_a_folder": Training("polar", {}, 2, in_a_folder, of_optimizer={}),
    "recurrent": Training(of_optimizer={}, recurrent=True),
}
OF_FORMER_CODE = {
    # Of commit 9e34d9c: no unit of gradients, no largest gradient so far, no limit of a step.
    "2026-11-25_natural": Training(),
    # Of commit 9937402, where a decision under way was a dict: there are two.
    "2026-11-28_trace_rule": Training("natural", {"trace_rule": (0.5, 0.1), "stagger": True}),
}
"""In `FORMER`, written by code of that day, whose checkpoints had other keys. Those of `TRAININGS` are of commit
941db66, but those with running means (empty ``of_optimizer``) are of 2026-11-30; ``2026-11-23_natural.ckpt`` is of
6078932, version 0.1.0, which is refused."""
ON_OTHER_RANKS = {"natural_on_two_ranks": ("natural", Training("natural", {}, 2, lambda: "thor_ddp"))}
"""Of which stored checkpoint each goes on, and how."""


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Always the same 16 words ``[16, 5]`` and the symbols ``[16]`` to tell of them, for one number."""
    generator = torch.Generator().manual_seed(3000 + number)
    words = torch.randint(SYMBOLS, (ROWS, LENGTH), generator=generator)
    return words, torch.randint(SYMBOLS, (ROWS,), generator=generator)


class Net(nn.Module):
    """Something of each kind of layer, as small as can be; in float64, so that processors differ in the last digits."""

    def __init__(self, *, tied: bool, recurrent: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        # From the beginning: normal numbers drawn as float32 differ in the last digits of those.
        double: dict[str, Any] = {"dtype": torch.float64}
        self.table = nn.Embedding(SYMBOLS, 6, **double)
        self.norm = nn.LayerNorm(6, **double)
        self.recurrent = recurrent
        if recurrent:
            self.lstm = nn.LSTM(6, 8, batch_first=True, **double)
        else:
            self.conv = nn.Conv1d(6, 8, 2, **double)
        self.hidden = nn.Linear(8, 6, **double)
        self.head = nn.Linear(6, SYMBOLS, **double)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        inputs = self.norm(self.table(words))
        positions = self.lstm(inputs)[0].mT if self.recurrent else self.conv(inputs.mT).tanh()
        logits: Tensor = self.head(self.hidden(positions.mean(-1)).tanh())
        return logits


class Module(L.LightningModule):
    """Trains `Net`, sharded where the strategy has a mesh."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.net = Net(tied=training.tied, recurrent=training.recurrent)
        self.options = training
        self.losses: list[Tensor] = []
        """Means over the ranks, by step."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.hidden, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def train_dataloader(self) -> DataLoader[Any]:
        rank, n_ranks = self.trainer.global_rank, self.trainer.world_size
        parts = [tuple(x.chunk(n_ranks)[rank] for x in batch(number)) for number in range(SAVED_AT)]
        return DataLoader(parts, batch_size=None)

    def training_step(self, part: tuple[Tensor, Tensor], index: int) -> Tensor:
        words, symbols = part
        loss = self.options.loss_scale * F.cross_entropy(self.net(words), symbols)
        self.losses.append(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean"))
        return loss

    def configure_optimizers(self) -> Any:
        mode = self.options.mode
        optimizer = configure_thor(self, lr=0.02, weight_decay=0.1, mode=mode, **self.options.of_optimizer)
        schedule = PerStepLR(optimizer, Polynomial(1.0, end=0.5, n_steps=20))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Saves(L.Callback):
    """A checkpoint when `SAVED_AT` steps are done: at an epoch's end, or at once in a training that goes on there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.path)


def train(training: Training, saved: Path, resume: Path | None = None) -> Result:
    """Train until `LAST_STEP`, and save a checkpoint on the way, as `Saves` says, at the path ``saved``.

    Returns:
        ``losses``, of the steps after `SAVED_AT`, and ``weights``, after the last one.
    """
    module = Module(training)
    damping = Exponential(0.2, factor=0.7, every_n_steps=5)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=training.n_ranks,
        strategy=training.strategy(),
        max_epochs=2,
        callbacks=[
            ThorCallback(damping=damping, block_size=4, update_every_n_steps=3, summary=False, **training.options),
            Saves(saved),
        ],
        default_root_dir=saved.parent,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ckpt_path=resume)
    weights = {name: weight.detach() for name, weight in module.net.named_parameters()}
    return {
        "losses": torch.stack(module.losses[SAVED_AT - LAST_STEP :]),
        "weights": {n: w.full_tensor() if isinstance(w, DTensor) else w.clone() for n, w in weights.items()},
    }


def go_on_on_two_ranks(folder: Path) -> None:
    """From each stored checkpoint of two ranks, and as `ON_OTHER_RANKS` says; the work of one rank.

    What was saved at once is ``FOLDER/NAME.ckpt``, what came out of it ``FOLDER/NAME.after.pt``.
    """
    torch.set_num_threads(1)
    same = {name: (name, training) for name, training in TRAININGS.items() if training.n_ranks == 2}
    for name, (stored, training) in (same | ON_OTHER_RANKS).items():
        result = train(training, folder / f"{name}.ckpt", resume=STORED / f"{stored}.ckpt")
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}.after.pt")


if __name__ == "__main__":
    fork(2, partial(go_on_on_two_ranks, Path(sys.argv[1])))
