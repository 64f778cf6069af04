"""Trainings on several ranks for the tests: real processes over gloo, started by Lightning's launcher or torchrun.

``python distributed_workers.py FOLDER [NAME ...]`` runs every training of `TRAININGS` here and in the files beside, or
those that are named; each rank saves what came out of it as ``FOLDER/<name>-<rank>.pt``. `two_ranks` starts that
program once for all tests and reads the files.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_thor import Curvature, ThorCallback, ThorDDPStrategy, configure_thor
from lightning_thor.block_size import choose
from lightning_thor.distributed import dtensor, process_group
from tests.helpers.boring import quiet, without_words
from tests.helpers.launching import fork, run, run_forked

ROWS = 32
STEPS_PER_EPOCH = 4
HALVES = (16, 16)

Result = dict[str, Any]


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Always the same 32 images ``[32, 2, 4, 4]`` and classes ``[32]`` for one number."""
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randn(ROWS, 2, 4, 4, generator=generator), torch.randint(5, (ROWS,), generator=generator)


class Net(nn.Module):
    """Something of each kind of layer, but no batch norm: its statistics differ between one batch and two halves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.LayerNorm(96)
        self.hidden = nn.Linear(96, 12)
        self.head = nn.Linear(12, 5)
        self.extra = nn.Linear(12, 5)

    def forward(self, images: Tensor, extra: int) -> Tensor:
        hidden = self.hidden(self.norm(F.relu(self.conv(images), inplace=True).flatten(1)))
        logits: Tensor = self.head(hidden.tanh())
        for times in range(extra):
            logits = logits + self.extra((hidden * (1 + times)).tanh())
        return logits


def always_once(rank: int, number: int) -> int:
    return 1


def fail_not(rank: int, number: int) -> None:
    pass


class Module(L.LightningModule):
    """Trains `Net`; every step shares one batch of 32 out to the ranks and their micro-batches.

    Args:
        parts: rows of the batch that each rank takes, in its order.
        micro_batches: equal pieces that a rank cuts its part into.
        batches: numbers of the batches of an epoch.
        overflow: the batch whose loss becomes infinite on the last rank, and nowhere else.
        extra: how often each rank uses the layer ``extra``, by batch.
        fail: called with the rank and the batch before its forward pass.
        dtype: of the weights.
        mode: of the optimizer.
        net: a model, for a subclass that has its own `batch` and `loss`; otherwise a `Net`.
    """

    def __init__(
        self,
        parts: tuple[int, ...],
        micro_batches: int = 1,
        batches: tuple[int, ...] = tuple(range(STEPS_PER_EPOCH)),
        overflow: int | None = None,
        extra: Callable[[int, int], int] = always_once,
        fail: Callable[[int, int], None] = fail_not,
        dtype: torch.dtype = torch.float64,
        mode: str = "natural",
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        assert sum(parts) == ROWS
        # float64 from the beginning: with precision="64-true" alone, Lightning loads a checkpoint's weights into a new
        # model of float32 and converts that afterwards, so a resumed run would begin with rounded weights.
        self.net = (Net() if net is None else net).to(dtype)
        self.mode = mode
        self.parts, self.micro_batches, self.batches = parts, micro_batches, batches
        self.overflow, self.extra, self.fail = overflow, extra, fail

    def train_dataloader(self) -> DataLoader[Any]:
        rank = self.trainer.global_rank
        pieces = []
        for number in self.batches:
            inputs, targets = (part.split(list(self.parts))[rank] for part in self.batch(number))
            numbers = torch.full((len(targets),), number)
            pieces += list(zip(*(x.chunk(self.micro_batches) for x in (inputs, targets, numbers)), strict=True))
        return DataLoader(pieces, batch_size=None)

    def training_step(self, piece: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        inputs, targets, numbers = piece
        number = int(numbers[0])
        self.fail(self.trainer.global_rank, number)
        loss = self.loss(inputs, targets, number)
        if number == self.overflow and self.trainer.global_rank == self.trainer.world_size - 1:
            loss = loss * float("inf")
        return loss

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        return batch(number)

    def loss(self, inputs: Tensor, targets: Tensor, number: int) -> Tensor:
        return F.cross_entropy(self.net(inputs, self.extra(self.trainer.global_rank, number)), targets)

    def configure_optimizers(self) -> Any:
        optimizer = configure_thor(self, lr=0.02, weight_decay=0.1, mode=self.mode)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]


class Compiled(Module):
    """Its model is compiled, as several graphs for DDP's buckets of gradients."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.net.compile(backend="aot_eager")


class Unfreezing(Module):
    """Its first two layers are frozen at first, and trained from the second epoch on."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        for module in (self.net.conv, self.net.norm):
            module.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.trainer.current_epoch == 1:
            self.unfreeze()

    def unfreeze(self) -> None:
        layers = self.net.conv, self.net.norm
        further = [p for module in layers for p in module.requires_grad_(True).parameters()]
        self.trainer.optimizers[0].add_param_group({"params": further, "lr": 0.01})


class UnfreezingTwice(Unfreezing):
    """Its head is frozen while those begin to train, and all layers train from the third epoch on."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.net.head.requires_grad_(self.trainer.current_epoch != 1)


class UnfreezingInABatch(Unfreezing):
    """In a hook that comes after those of callbacks, just before the step."""

    def on_train_epoch_start(self) -> None:
        pass

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.current_epoch == 1 and batch_idx == 1:
            self.unfreeze()


class TwoThors(Module):
    """A `Thor` for its last two layers, which steps first, and one for the others; both of one loss."""

    automatic_optimization = False

    def training_step(self, piece: tuple[Tensor, Tensor, Tensor], index: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(piece, index))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        heads, body = [self.net.head, self.net.extra], [self.net.conv, self.net.norm, self.net.hidden]
        return [configure_thor(nn.ModuleList(modules), lr=0.02) for modules in (heads, body)]


class TwoPasses(Module):
    """Two backward passes in each step of manual optimization."""

    automatic_optimization = False

    def training_step(self, piece: tuple[Tensor, Tensor, Tensor], index: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        for share in (0.75, 0.25):
            self.manual_backward(share * super().training_step(piece, index))
        optimizer.step()
        optimizer.zero_grad()


class StepLog(L.Callback):
    """After every batch: how many all-reduces of factors there were so far, and how many applied steps."""

    def __init__(self, calls: list[Result]) -> None:
        self.calls = calls
        self.counts: list[int] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.counts.append(len(only("all_reduce", self.calls)))
        self.steps.append(curvature_of(trainer).step)


def curvature_of(trainer: L.Trainer) -> Curvature:
    callback = next(one for one in trainer.callbacks if isinstance(one, ThorCallback))
    return callback.curvature


def whole(state: Any) -> Any:
    """Nested dicts and lists with whole tensors in the place of sharded ones."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, state)


def only(op: str, calls: list[Result]) -> list[Result]:
    return [call for call in calls if call["op"] == op]


@contextmanager
def listed_collectives() -> Iterator[list[Result]]:
    """Every collective that lightning_thor makes: what this rank gives to it, in which group, and from where."""
    calls: list[Result] = []

    def listed(op: str) -> Callable[..., Any]:
        def call(*tensors: Tensor, group: Any = None, **kwargs: Any) -> Any:
            calls.append(
                {
                    "op": op.removesuffix("_into_tensor").removesuffix("_single"),
                    "numel": tensors[-1].numel(),
                    "bytes": tensors[-1].numel() * tensors[-1].element_size(),
                    "own_group": group not in (None, dist.group.WORLD),
                    "in_backward": torch._C._current_graph_task_id() != -1,
                }
            )
            return getattr(dist, op)(*tensors, group=group, **kwargs)

        return call

    names = ("all_reduce", "all_gather_into_tensor", "all_gather_single", "all_to_all_single")
    ops = {name: listed(name) for name in names if hasattr(dist, name)}
    with pytest.MonkeyPatch.context() as patch:
        for module in (process_group, dtensor):
            patch.setattr(module, "dist", SimpleNamespace(**{**vars(dist), **ops}))
        yield calls


def fit(
    folder: Path,
    module: Module,
    *,
    devices: int = 2,
    strategy: Any = None,
    max_epochs: int = 2,
    resume: Path | None = None,
    checkpoints: str | None = None,
    stagger: bool = False,
    trace_rule: Any = None,
    block_size: int | Literal["auto"] = 8,
    loss_reduction: str = "mean",
    accumulate: int | None = None,
    **trainer_options: Any,
) -> Result:
    """Train ``module``; everything that the laws compare, as plain types and tensors."""
    saver = ModelCheckpoint(folder / (checkpoints or "none"), "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    if "plugins" not in trainer_options:
        trainer_options.setdefault("precision", "64-true")
    with listed_collectives() as calls:
        log = StepLog(calls)
        callback = ThorCallback(
            update_every_n_steps=3,
            block_size=block_size,
            stagger=stagger,
            trace_rule=trace_rule,
            loss_reduction=loss_reduction,
            summary=False,
        )
        trainer = quiet(
            folder,
            *[callback, log, *([saver] if checkpoints else [])],
            devices=devices,
            strategy=strategy or ("thor_ddp" if devices > 1 else "auto"),
            max_epochs=max_epochs,
            accumulate_grad_batches=accumulate or module.micro_batches,
            enable_checkpointing=checkpoints is not None,
            use_distributed_sampler=False,
            **trainer_options,
        )
        trainer.fit(module, ckpt_path=resume)
    curvature = curvature_of(trainer)
    optimizer = trainer.optimizers[0].state_dict()
    return {
        "strategy": type(trainer.strategy).__name__,
        "environment": type(getattr(trainer.strategy, "cluster_environment", None)).__name__,
        "world_size": trainer.world_size,
        "weights": whole({name: weight.detach().clone() for name, weight in module.net.named_parameters()}),
        "optimizer": whole(optimizer),
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "curvature": curvature.state_dict(),
        "block_size": next(one for one in trainer.callbacks if isinstance(one, ThorCallback)).block_size,
        "window": float(curvature.factors.flat_sums.abs().sum()),
        "inverse_bytes": sum(stack.inverse.nbytes for stack in curvature.factors.batches.values()),
        "said_bytes": sum(map(curvature.n_bytes, curvature.layers)),
        "travelling": sum(map(curvature.factors.packed_bytes, range(len(curvature.layers))))
        // curvature.factors.dtype.itemsize,
        "collectives": calls,
        "all_reduces": only("all_reduce", calls),
        "counts": log.counts,
        "steps": log.steps,
        "epochs": (trainer.current_epoch, trainer.global_step),
    }


OF_MODULE = {"batches", "dtype", "extra", "fail", "micro_batches", "mode", "overflow", "thor"}


def training(
    parts: tuple[int, ...] = HALVES,
    kind: Callable[..., Module] = Module,
    by: Callable[..., Result] = fit,
    *,
    strategy: str | Callable[[], Any] | None = None,
    resume: str | Path | None = None,
    scaled: bool = False,
    **options: Any,
) -> Callable[[Path], Result]:
    """A training, which runs when it is called with a folder.

    Args:
        parts: rows of the batch that each rank takes.
        kind: makes the module.
        by: how it is trained.
        strategy: its name, or a function that makes it.
        resume: name of a training of `two_ranks`, or its folder of checkpoints: go on from the end of its first epoch.
        scaled: train in float16 (on a CPU ``precision="16-mixed"`` alone would silently mean bfloat16), for one epoch.
        options: of the module (those in `OF_MODULE`), and of `fit`.
    """
    if scaled:
        options = {"max_epochs": 1, "dtype": torch.float32, **options}
    own = {key: options.pop(key) for key in OF_MODULE & options.keys()}

    def train(folder: Path) -> Result:
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
        start = None if resume is None else Path(os.environ.get("TWO_RANKS", folder)) / resume / "epoch=0.ckpt"
        made = strategy() if callable(strategy) else strategy
        return by(folder, kind(parts, **own), devices=len(parts), strategy=made, resume=start, **options)

    return train


def fit_with_a_block_size_that_each_rank_would_choose_differently(folder: Path) -> Result:
    def seconds(factors: Any, block_size: int, *_: Any) -> float:
        # Rank 0 finds that large blocks cost nothing, rank 1 that they cost everything.
        return 1.0 if dist.get_rank() == 0 else float(block_size) ** 9

    original, choose._inversion_seconds = choose._inversion_seconds, seconds
    try:
        return fit(folder, Module(HALVES), max_epochs=1, block_size="auto")
    finally:
        choose._inversion_seconds = original


def plain_loop(folder: Path) -> Result:
    """No Trainer: `Curvature` and the collectives by themselves, in the process group that the Trainer left."""
    rank = dist.get_rank()
    flat = torch.tensor([1.0 + rank, 10.0])
    same = flat
    group = process_group.new_factor_group()
    process_group.ProcessGroupCommunicator(group).all_reduce(flat).wait()
    process_group.ProcessGroupCommunicator().all_reduce(flat).wait()
    net = Net().double()
    curvature = Curvature(net, block_size=8)
    images, classes = (part.split([10, 22])[rank] for part in batch(0))
    F.cross_entropy(net(images.double(), 1), classes).backward()
    with listed_collectives() as calls:
        curvature.update()
    return {
        "is_distributed": process_group.is_distributed(),
        "group_size": dist.get_world_size(group),
        "own_group": group not in (None, dist.group.WORLD),
        "summed": flat,
        "in_place": flat is same,
        "curvature": curvature.state_dict(),
        "all_reduces": only("all_reduce", calls),
        "n_collectives": len(calls),
    }


def on_the_first_rank(rank: int, number: int) -> int:
    return int(rank == 0)


def irregular(rank: int, number: int) -> int:
    """From batch to batch and rank to rank another number of uses, among them more than before, and none."""
    return ((2, 0, 3, 1), (1, 2, 0, 3))[rank][number]


def nobody_at_times(rank: int, number: int) -> int:
    """As `irregular`, but in batch 2, for which no rank uses the layer."""
    return ((2, 0, 0, 1), (1, 2, 0, 3))[rank][number]


def raises(rank: int, number: int) -> None:
    """On the last rank, in a step that refreshes, while the first one goes on to backward and sends its factors."""
    if rank and number == 3:
        raise RuntimeError("a rank of the test raised")


def dies(rank: int, number: int) -> None:
    """Without a word, on the rank that the others look up to."""
    if rank == 0 and number == 3:
        os._exit(13)


QUARTERS = (8, 8, 8, 8)
UNUSED = "thor_ddp_find_unused_parameters_true"


IN_WINDOW = {"scaled": True, "batches": (0, 1, 2, 3, 4, 5), "overflow": 3}
"""Batch 3 would be the fourth applied step, in which a refresh is due."""


def keeping(n_workers: int, **options: Any) -> Callable[[], ThorDDPStrategy]:
    return partial(ThorDDPStrategy, inverse_workers=n_workers, **options)


def in_buckets(**options: Any) -> ThorDDPStrategy:
    return ThorDDPStrategy(factor_bucket_mb=1e-3, **options)


TRAININGS: dict[str, Callable[[Path], Result]] = {
    "halves": training(max_epochs=3, checkpoints="halves"),
    "halves_ddp": training(max_epochs=3, strategy="ddp"),
    "resumed": training(max_epochs=3, resume="halves"),
    "staggered": training(max_epochs=3, stagger=True),
    "polar": training(mode="polar", strategy=in_buckets),
    "adam": training(mode="adam", strategy=in_buckets),
    "trace_rule": training(max_epochs=3, trace_rule=(0.2, 0.02)),
    "quarters": training(micro_batches=2),
    "unequal": training((10, 22), max_steps=1),
    "overflow": training(**IN_WINDOW),
    "overflow_left_out": training(scaled=True, batches=(0, 1, 2, 4, 5)),
    "unused": training(extra=on_the_first_rank, strategy=UNUSED, max_epochs=1),
    "unused_once": training(extra=on_the_first_rank, strategy=UNUSED, max_steps=1),
    # A refresh is due at batches 0, 3, 2, 1 of three epochs.
    "buckets": training(max_epochs=3, strategy=in_buckets),
    "split": training(max_epochs=3, strategy=partial(ThorDDPStrategy, split_indices=[0, 2])),
    "static": training(max_epochs=3, strategy=partial(in_buckets, static_graph=True)),
    "irregular": training(extra=irregular, max_epochs=3, strategy=partial(in_buckets, find_unused_parameters=True)),
    "irregular_ddp": training(extra=irregular, max_epochs=3, strategy="ddp_find_unused_parameters_true"),
    "auto": fit_with_a_block_size_that_each_rank_would_choose_differently,
    "micro_batches_in_buckets": training(micro_batches=2, strategy=in_buckets),
    "plain_loop": plain_loop,
    "all_nobody": training(extra=nobody_at_times, strategy=UNUSED),
    "one": training(max_epochs=3, strategy=keeping(1), checkpoints="one"),
    "one_polar": training(mode="polar", strategy=keeping(1)),
    "one_staggered": training(max_epochs=3, strategy=keeping(1), stagger=True),
    "one_trace_rule": training(max_epochs=3, strategy=keeping(1), trace_rule=(0.2, 0.02)),
    "one_quarters": training(micro_batches=2, strategy=keeping(1)),
    "one_overflow": training(strategy=keeping(1), **IN_WINDOW),
    "one_nobody": training(extra=nobody_at_times, strategy=keeping(1, find_unused_parameters=True)),
    "one_resumed": training(max_epochs=3, strategy=keeping(1), resume="one"),
    "one_from_all": training(max_epochs=3, strategy=keeping(1), resume="halves"),
    "all_from_one": training(max_epochs=3, resume="one"),
    "two": training(max_epochs=3, strategy=keeping(2)),
    "compiled": training(kind=Compiled, micro_batches=2, strategy=in_buckets),
    "unfrozen": training(kind=Unfreezing, micro_batches=2, max_epochs=3, strategy=in_buckets, checkpoints="unfrozen"),
    "two_thors": training(kind=TwoThors, strategy=in_buckets),
    "two_passes": training(kind=TwoPasses, strategy=in_buckets),
    "unfrozen_ddp": training(kind=UnfreezingInABatch, max_epochs=3, strategy="ddp"),
    "unfrozen_twice": training(kind=UnfreezingTwice, max_epochs=3),
    "unfrozen_one": training(kind=Unfreezing, max_epochs=3, strategy=keeping(1), stagger=True),
    "unfrozen_resumed": training(
        kind=Unfreezing, micro_batches=2, max_epochs=3, strategy=in_buckets, resume="unfrozen"
    ),
}
FOUR: dict[str, Callable[[Path], Result]] = {
    "four": training(QUARTERS, max_epochs=3, strategy=in_buckets),
    "four_resumed": training(QUARTERS, max_epochs=3, resume="halves"),
    "four_one": training(QUARTERS, strategy=keeping(1)),
    "four_two": training(QUARTERS, strategy=keeping(2)),
    "four_two_polar": training(QUARTERS, mode="polar", strategy=keeping(2)),
    "four_four": training(QUARTERS, max_epochs=3, strategy=partial(in_buckets, inverse_workers=4)),
    "four_two_resumed": training(QUARTERS, max_epochs=3, strategy=keeping(2), resume="one"),
}
NAMED_ONLY: dict[str, Callable[[Path], Result]] = {
    "three_of_four": training(QUARTERS, strategy=keeping(3)),
    "dies": training(fail=dies, strategy=in_buckets),
}
LONG = (
    *("one_from_all", "one_polar", "one_staggered", "one_quarters", "unfrozen_twice", "unfrozen_one"),
    *("static", "polar_view", "polar_view_ddp", "unequal_text", "unequal_text_ddp"),
    *("four_two_polar", "four_one"),
)
"""Of the tests that are marked long: other combinations of what the other tests hold."""


@functools.lru_cache
def launched(without: tuple[str, ...]) -> tuple[tempfile.TemporaryDirectory[str], str]:
    """The folder with the results of all trainings but some (it goes with the cache), and what two ranks printed."""
    folder = tempfile.TemporaryDirectory(prefix="lightning_thor_two_ranks_")
    names = [name for name in all_trainings()[0] if name not in without]
    return folder, run_forked(__file__, folder.name, *names)[1]


def torchrun(n_ranks: int, folder: Path, *names: str) -> tuple[int, str]:
    """Run trainings under torchrun, which may go on from those of `two_ranks`; exit status and output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    return run([*launcher, __file__, str(folder), *names], TWO_RANKS=str(results_folder()))


@functools.lru_cache
def launched_four(without: tuple[str, ...]) -> tuple[tempfile.TemporaryDirectory[str], int, str]:
    """As `launched`, for those on four ranks, which are forked; with the exit status."""
    folder = tempfile.TemporaryDirectory(prefix="lightning_thor_four_ranks_")
    names = [name for name in all_trainings()[1] if name not in without]
    return folder, *run_forked(__file__, folder.name, *names, TWO_RANKS=str(results_folder()), FORKED="4")


def four_ranks(name: str) -> list[Result]:
    """What the training ``name`` gave on each of four ranks."""
    folder, _, printed = launched_four(() if name in LONG else LONG)
    return results(Path(folder.name), name, 4, printed)


def results(folder: Path, name: str, n_ranks: int, printed: str) -> list[Result]:
    """What a training left in ``folder``; an AssertionError with what it ``printed`` if it did not end."""
    files = [folder / f"{name}-{rank}.pt" for rank in range(n_ranks)]
    if not all(file.is_file() for file in files):
        raise AssertionError(f"The training {name!r} did not end on all ranks. They printed: ...{printed[-6000:]}")
    return [torch.load(file, weights_only=True) for file in files]


def results_folder() -> Path:
    """Where the two ranks put their results and checkpoints."""
    return Path(launched(LONG)[0].name)


def two_ranks(name: str) -> list[Result]:
    """What the training ``name`` gave on rank 0 and on rank 1."""
    folder, printed = launched(() if name in LONG else LONG)
    return results(Path(folder.name), name, 2, printed)


def one_rank(folder: Path, **options: Any) -> Result:
    """What a `training` gives on one rank, which takes whole batches."""
    return training((ROWS,), **options)(folder)


def state(result: Result, *without: str) -> Result:
    """What must be equal where two trainings are one."""
    names = ("weights", "optimizer", "curvature", "schedulers", "epochs")
    return {name: without_words(result[name]) for name in names if name not in without}


def all_trainings() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """By name: those of two ranks, those of four, and those that run only when they are named."""
    # These are made of what is in this file.
    from tests.helpers import endings, option_trainings, signalled, text_trainings

    return (
        TRAININGS | option_trainings.TRAININGS | text_trainings.TRAININGS,
        FOUR | option_trainings.FOUR | text_trainings.FOUR,
        NAMED_ONLY | endings.NAMED_ONLY | signalled.NAMED_ONLY,
    )


def train(folder: Path, *names: str) -> None:
    """Run these trainings, or all that `two_ranks` may be asked for, and save what came out of each."""
    two, four, named_only = all_trainings()
    for name in names or two:
        result = (two | four | named_only)[name](folder)
        torch.save(result, folder / f"{name}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = partial(train, Path(sys.argv[1]), *sys.argv[2:])
    if n_forked := int(os.environ.pop("FORKED", 0)):
        fork(n_forked, work)
    else:
        work()
