"""Trainings of sharded models, on one, two and four ranks, as `tests.helpers.distributed_workers` has them."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_thor import Thor, ThorCallback, ThorDDPStrategy, ThorModelParallelStrategy
from tests.helpers.boring import quiet
from tests.helpers.distributed_workers import (
    HALVES,
    IN_WINDOW,
    QUARTERS,
    ROWS,
    STEPS_PER_EPOCH,
    Module,
    Net,
    Result,
    Unfreezing,
    fit,
    training,
)  # fmt: skip
from tests.helpers.full_disks import SavesOntoAFullDisk
from tests.helpers.launching import Crash, fork, run_forked

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard


class Words(Net):
    """With a table whose weight is the output layer's too. Four ranks do not divide its widths; of five rows one of
    them has none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 12)
        self.head.weight = self.table.weight

    def forward(self, images: Tensor, extra: int) -> Tensor:
        images = images.to(self.extra.bias.dtype)
        tokens = images.flatten(1)[:, :4].gt(0).long() + torch.arange(4)
        hidden = self.hidden(self.norm(self.conv(images).relu().flatten(1))) + self.table(tokens).mean(1)
        logits: Tensor = self.head(hidden.tanh())
        for times in range(extra):
            logits = logits + self.extra((hidden * (1 + times)).tanh())
        return logits


class Sharded(Module):
    """Trains `Words`, sharded where the strategy has a mesh.

    Args:
        thor: options of the optimizer's groups.
    """

    def __init__(self, parts: tuple[int, ...], thor: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(parts, **others)
        self.net = Words().to(others.get("dtype", torch.float64))
        self.thor = thor or {}
        self.kinds: set[str] = set()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.hidden, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> Any:
        found, schedules = super().configure_optimizers()
        for group in found[0].param_groups:
            group.update(self.thor)
        return found, schedules


class CompiledSharded(Sharded):
    """Its model is compiled: graphs break where FSDP2 gathers weights."""

    def configure_model(self) -> None:
        super().configure_model()
        self.net.compile(backend="aot_eager")


class Normed(Sharded):
    """Two of its layers compute their weights."""

    def __init__(self, parts: tuple[int, ...], **others: Any) -> None:
        super().__init__(parts, **others)
        weight_norm(self.net.conv)
        spectral_norm(self.net.hidden)


class Grouped(Sharded):
    """With a layer in its middle that does not train, and groups of parameters that go backwards through the model."""

    def __init__(self, parts: tuple[int, ...], **others: Any) -> None:
        super().__init__(parts, **others)
        self.net.norm.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        params = [p for p in self.parameters() if p.requires_grad][::-1]
        groups = [{"params": params[1::2], "weight_decay": 0.1}, {"params": params[::2]}]
        optimizer = Thor(groups, lr=0.02, mode=self.mode)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]


class UnfreezingSharded(Unfreezing, Sharded):
    """Its first two layers are frozen at first."""


class Searching(Sharded):
    """Looks for a learning rate before it trains, in as many steps as an epoch has: a validation is the last of it."""

    def configure_callbacks(self) -> list[Callback]:
        return [LearningRateFinder(num_training_steps=STEPS_PER_EPOCH, max_lr=0.1, update_attr=False)]

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def validation_step(self, piece: tuple[Tensor, Tensor, Tensor], index: int) -> None:
        self.training_step(piece, index)


class Growing(Sharded):
    """Steps after each micro-batch of the first epoch, after every second one of the next ones."""

    def on_train_epoch_start(self) -> None:
        self.trainer.accumulate_grad_batches = 1 + min(self.trainer.current_epoch, 1)


def train(folder: Path, module: Sharded, strategy: Any, **options: Any) -> Any:
    """As `fit`, and how the momentum lies at its end."""
    if isinstance(strategy, ThorModelParallelStrategy):
        options["precision"] = "32-true"
    result = fit(folder, module, strategy=strategy, **options)
    states = module.optimizers().optimizer.state.values()
    momenta = [state.get("momentum_buffer", state.get("exp_avg")) for state in states]
    rows = [tuple(one.to_local().shape) for one in momenta if isinstance(one, DTensor)]
    return result | {"n_momenta": len([one for one in momenta if one is not None]), "shards": rows}


def sharded(parts: tuple[int, ...] = HALVES, kind: Any = Sharded, **options: Any) -> Callable[[Path], Result]:
    """A `training` of a sharded model."""
    return training(parts, kind, train, **{"strategy": "thor_fsdp2", **options})


def consolidated() -> ThorModelParallelStrategy:
    """An instance: of those Lightning checks the precision, and refuses 64-true; the weights are float64 anyway."""
    return ThorModelParallelStrategy(save_distributed_checkpoint=False)


FEW = partial(ThorModelParallelStrategy, inverse_workers=1)
"""Each layer's inverses are on one rank."""


class InTheStep(ThorModelParallelStrategy):
    """All factors at once, when backward is over."""

    def __init__(self) -> None:
        super().__init__(factor_bucket_mb=1e6)

    def is_sync_step(self) -> bool:
        return False


def in_buckets() -> ThorModelParallelStrategy:
    """One for each layer."""
    return ThorModelParallelStrategy(factor_bucket_mb=1e-6)


def on_a_full_disk(name: str, when: str, ranks: tuple[int, ...], strategy: Any, folder: Path) -> Result:
    """What a callback found that saves in the middle of a fit onto a disk that is full for some ranks."""
    saver = SavesOntoAFullDisk(folder / name, when, ranks)
    module = Sharded(HALVES, dtype=torch.float32)
    trainer = quiet(
        folder, ThorCallback(summary=False), saver, devices=2, strategy=strategy(), max_epochs=1,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module)
    return {"error": saver.error, "found": saver.found, "step_of_last": saver.step_of_last}


def irregular(rank: int, number: int) -> int:
    """Once or twice, other on each rank; in batch 3 not at all, on all ranks: FSDP2 allows no less."""
    return 0 if number == 3 else 1 + (number + rank) % 2


def never(rank: int, number: int) -> int:
    return 0


KL = {"match_rms": None, "kl_clip": 1e-7, "weight_decay": 0.1, "decoupled_weight_decay": False, "clip_norm": 0.02}
BF16 = {"dtype": torch.float32}
RULE = {"max_epochs": 3, "trace_rule": (0.05, 0.001)}
"""A decision of the fourth step waits to be followed when the first epoch's checkpoint is written."""

MODULES: dict[str, Callable[[tuple[int, ...]], Sharded]] = {
    "alone": Sharded,
    "alone_polar": lambda parts: Sharded(parts, mode="polar"),
    "alone_adam": lambda parts: Sharded(parts, mode="adam"),
    "alone_grouped": Grouped,
    "alone_grouped_polar": lambda parts: Grouped(parts, mode="polar"),
    "alone_unused": lambda parts: Sharded(parts, extra=never),
    "alone_without_momentum": lambda parts: Sharded(parts, {"momentum": 0.0}),
}
"""What begins on one device and goes on with two ranks."""


def begin(name: str, folder: Path) -> Result:
    """On one device, unbroken, with a checkpoint after each epoch; and once more as versions before wrote it."""
    result = fit(folder, MODULES[name]((ROWS,)), devices=1, max_epochs=3, checkpoints=name)
    checkpoint = torch.load(folder / name / "epoch=0.ckpt", weights_only=True)
    (saved,) = checkpoint["optimizer_states"]
    places: dict[int, int] = {}
    for group in saved["param_groups"]:
        group["params"] = [places.setdefault(number, len(places)) for number in group["params"]]
    saved["state"] = {places[number]: state for number, state in saved["state"].items()}
    torch.save(checkpoint, folder / name / "old.ckpt")
    return result


def go_on(name: str, folder: Path, file: str = "epoch=0.ckpt") -> Result:
    return train(folder, MODULES[name](HALVES), "thor_fsdp2", devices=2, max_epochs=3, resume=folder / name / file)


ONE: dict[str, Callable[[Path], Result]] = {name: partial(begin, name) for name in MODULES}
UNMOVED: Any = {"thor": {"momentum": 0.0}}
TWO: dict[str, Callable[[Path], Result]] = {
    "natural": sharded(max_epochs=3, checkpoints="natural"),
    "polar": sharded(mode="polar", strategy=consolidated, checkpoints="polar"),
    "adam": sharded(max_epochs=3, mode="adam", checkpoints="adam"),
    "resumed": sharded(max_epochs=3, resume="natural"),
    "adam_resumed": sharded(max_epochs=3, mode="adam", resume="adam"),
    "auto": sharded(block_size="auto", checkpoints="auto"),
    "auto_resumed": sharded(block_size="auto", resume="auto"),
    "polar_resumed": sharded(mode="polar", strategy=consolidated, resume="polar"),
    "compiled": sharded(kind=CompiledSharded, micro_batches=2),
    "one_file": sharded(max_epochs=3, strategy=consolidated, checkpoints="one_file"),
    "one_file_resumed": sharded(max_epochs=3, strategy=consolidated, resume="one_file"),
    "searching": sharded(kind=Searching, max_epochs=3),
    "searching_in_one_file": sharded(kind=Searching, max_epochs=3, strategy=consolidated),
    "micro_batches": sharded(micro_batches=2),
    "normed": sharded(kind=Normed),
    "kl_clip": sharded(thor=KL, gradient_clip_val=0.05),
    "no_momentum": sharded(max_epochs=1, checkpoints="no_momentum", **UNMOVED),
    "unused": sharded(extra=never, checkpoints="unused"),
    "unused_resumed": sharded(extra=never, resume="unused"),
    "overflow": sharded(**IN_WINDOW),
    "overflow_left_out": sharded(scaled=True, batches=(0, 1, 2, 4, 5)),
    "scaled": sharded(scaled=True, batches=(0, 1, 2), checkpoints="scaled"),
    "overflow_resumed": sharded(scaled=True, max_epochs=2, batches=(0, 1, 2), overflow=0, resume="scaled"),
    "bf16": sharded(max_epochs=1, precision="bf16-mixed", **BF16),
    "in_buckets": sharded(max_epochs=3, strategy=in_buckets),
    "unfrozen": sharded(kind=UnfreezingSharded, max_epochs=3),
    "adam_unfrozen": sharded(kind=UnfreezingSharded, max_epochs=3, mode="adam"),
    "few": sharded(max_epochs=3, strategy=FEW, checkpoints="few"),
    "few_resumed": sharded(max_epochs=3, strategy=FEW, resume="few"),
    "adam_rule": sharded(mode="adam", **RULE),
    "adam_rule_few": sharded(mode="adam", strategy=FEW, checkpoints="adam_rule_few", **RULE),
    "adam_rule_few_resumed": sharded(mode="adam", strategy=FEW, resume="adam_rule_few", **RULE),
    "auto_few": sharded(block_size="auto", strategy=FEW),
    "unfrozen_few": sharded(kind=UnfreezingSharded, max_epochs=3, strategy=FEW),
    "adam_unfrozen_few": sharded(kind=UnfreezingSharded, max_epochs=3, mode="adam", strategy=FEW),
    "in_the_step": sharded(max_epochs=3, strategy=InTheStep),
    "split": sharded(max_epochs=3, strategy=partial(ThorModelParallelStrategy, split_indices=[0])),
    "irregular_in_buckets": sharded(extra=irregular, max_epochs=3, strategy=in_buckets),
    "irregular_in_the_step": sharded(extra=irregular, max_epochs=3, strategy=InTheStep),
    "micro_batches_in_buckets": sharded(micro_batches=2, strategy=in_buckets),
    "growing_in_buckets": sharded(kind=Growing, micro_batches=2, strategy=in_buckets),
    "growing_in_the_step": sharded(kind=Growing, micro_batches=2, strategy=InTheStep),
    **{
        f"full_disk_of_{name}": partial(on_a_full_disk, f"full_disk_of_{name}", when, ranks, strategy)
        for name, when, ranks, strategy in (
            ("shards", "shards", (0, 1), ThorModelParallelStrategy),
            ("the_last_rank", "shards", (1,), ThorModelParallelStrategy),
            ("metadata", "metadata", (0,), ThorModelParallelStrategy),
            ("one_file", "file", (0,), consolidated),
            ("ddp", "file", (0,), ThorDDPStrategy),
        )
    },
    **{f"{name}_goes_on": partial(go_on, name) for name in MODULES},
    "alone_grouped_of_old_goes_on": partial(go_on, "alone_grouped", file="old.ckpt"),
}
FOUR: dict[str, Callable[[Path], Result]] = {
    "four": sharded(QUARTERS, max_epochs=3),
    "four_polar": sharded(QUARTERS, mode="polar"),
    "four_adam": sharded(QUARTERS, max_epochs=3, mode="adam"),
    "four_adam_resumed": sharded(QUARTERS, max_epochs=3, mode="adam", resume="adam"),
    "four_resumed": sharded(QUARTERS, max_epochs=3, resume="natural"),
    "four_polar_resumed": sharded(QUARTERS, mode="polar", strategy=consolidated, resume="polar"),
}
LONG = (
    *(f"alone_{name}{ends}" for name in ("adam", "grouped_polar", "unused") for ends in ("", "_goes_on")),
    *(f"full_disk_of_{name}" for name in ("the_last_rank", "metadata", "ddp")),
    *(f"four_{name}" for name in ("polar", "adam_resumed", "polar_resumed")),
    *("adam_unfrozen", "adam_unfrozen_few", "auto_few", "unused_resumed", "searching_in_one_file"),
    *("growing_in_buckets", "growing_in_the_step"),
)
"""Of the tests that are marked long: other combinations of what the other tests hold."""

ONCE_MORE = "Once more from"


def work(folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        result = (ONE | TWO | FOUR)[name](folder)
        torch.save(result, folder / f"{name}-{os.environ['RANK']}.pt")


@functools.lru_cache
def launched(without: tuple[str, ...]) -> tuple[tempfile.TemporaryDirectory[str], str]:
    """The folder with the results of all trainings but some (it goes with the cache), and what was printed."""
    folder = tempfile.TemporaryDirectory(prefix="lightning_thor_sharded_")
    printed = run_forked(__file__, folder.name, *without)[1]
    if ONCE_MORE in printed:
        warnings.warn(f"A rank crashed: ...{printed.split(ONCE_MORE)[0][-6000:]}", stacklevel=1)
    return folder, printed


def results_folder() -> Path:
    return Path(launched(LONG)[0].name)


def ranks(name: str) -> list[Result]:
    """What the training ``name`` gave on each rank."""
    folder, printed = launched(() if name in LONG else LONG)
    files = [Path(folder.name) / f"{name}-{rank}.pt" for rank in range(1 if name in ONE else 2 if name in TWO else 4)]
    assert all(file.is_file() for file in files), f"{name!r} did not end. They printed: ...{printed[-6000:]}"
    return [torch.load(file, weights_only=True) for file in files]


def work_through(folder: Path, n_ranks: int, names: Sequence[str]) -> None:
    """Run these trainings; those that are left once more, in new processes, if a signal ended a rank.

    Some 50 trainings in one process are nothing that this package is for, and a double free in one of hundreds of such
    processes (2026-11-28, torch 2.13) can't be of a package in Python alone; what faulthandler says of it is printed.
    """
    try:
        fork(n_ranks, partial(work, folder, names))
    except Crash as crash:
        done = {name for name in names if len(list(folder.glob(f"{name}-[0-9].pt"))) == n_ranks}
        left = [name for name in names if name not in done]
        print(f"{crash} {ONCE_MORE} {left[0]!r} on.", flush=True)
        for name in left:
            shutil.rmtree(folder / name, ignore_errors=True)
        fork(n_ranks, partial(work, folder, left))


if __name__ == "__main__":
    for n, trainings in ((1, ONE), (2, TWO), (4, FOUR)):
        work_through(Path(sys.argv[1]), n, [name for name in trainings if name not in sys.argv[2:]])
