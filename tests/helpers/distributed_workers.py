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
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
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
from lightning_thor.distributed import process_group
from tests.helpers.boring import without_words
from tests.helpers.launching import run

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
        return DataLoader(pieces, batch_size=None)  # type: ignore[arg-type]

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
    callback = next(one for one in trainer.callbacks if isinstance(one, ThorCallback))  # type: ignore[attr-defined]
    assert callback.curvature is not None
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
    process_group.dist = SimpleNamespace(**{**vars(dist), **ops})  # type: ignore[assignment]
    try:
        yield calls
    finally:
        process_group.dist = dist


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
        trainer = L.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy or ("thor_ddp" if devices > 1 else "auto"),
            max_epochs=max_epochs,
            callbacks=[
                ThorCallback(
                    update_every_n_steps=3,
                    block_size=block_size,
                    stagger=stagger,
                    trace_rule=trace_rule,
                    loss_reduction=loss_reduction,
                    summary=False,
                ),
                log,
                *([saver] if checkpoints else []),
            ],
            accumulate_grad_batches=accumulate or module.micro_batches,
            default_root_dir=folder,
            enable_checkpointing=checkpoints is not None,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
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


def fit_with_loss_scaling(folder: Path, strategy: Any = None, **options: Any) -> Result:
    """One epoch in float16; on a CPU ``precision="16-mixed"`` alone would silently mean bfloat16."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))  # type: ignore[arg-type]
    module = Module(HALVES, dtype=torch.float32, **options)
    return fit(folder, module, strategy=strategy, max_epochs=1, plugins=[plugin])


def fit_with_a_block_size_that_each_rank_would_choose_differently(folder: Path) -> Result:
    def seconds(factors: Any, block_size: int, *_: Any) -> float:
        # Rank 0 finds that large blocks cost nothing, rank 1 that they cost everything.
        return 1.0 if dist.get_rank() == 0 else float(block_size) ** 9

    original, choose._inversion_seconds = choose._inversion_seconds, seconds  # type: ignore[assignment]
    try:
        return fit(folder, Module(HALVES), max_epochs=1, block_size="auto")
    finally:
        choose._inversion_seconds = original  # type: ignore[assignment]


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


def keeping(n_workers: int, **options: Any) -> ThorDDPStrategy:
    return ThorDDPStrategy(inverse_workers=n_workers, **options)


def in_buckets(**options: Any) -> ThorDDPStrategy:
    return ThorDDPStrategy(factor_bucket_mb=1e-3, **options)


TRAININGS: dict[str, Callable[[Path], Result]] = {
    "halves": lambda folder: fit(folder, Module(HALVES), max_epochs=3, checkpoints="halves"),
    "halves_ddp": lambda folder: fit(folder, Module(HALVES), max_epochs=3, strategy="ddp"),
    "resumed": lambda folder: fit(folder, Module(HALVES), max_epochs=3, resume=folder / "halves" / "epoch=0.ckpt"),
    "staggered": lambda folder: fit(folder, Module(HALVES), max_epochs=3, stagger=True),
    "polar": lambda folder: fit(folder, Module(HALVES, mode="polar"), max_epochs=2, strategy=in_buckets()),
    "adam": lambda folder: fit(folder, Module(HALVES, mode="adam"), max_epochs=2, strategy=in_buckets()),
    "trace_rule": lambda folder: fit(folder, Module(HALVES), max_epochs=3, trace_rule=(0.2, 0.02)),
    "quarters": lambda folder: fit(folder, Module(HALVES, micro_batches=2)),
    "unequal": lambda folder: fit(folder, Module((10, 22)), max_steps=1),
    # Batch 3 would be the fourth applied step, in which a refresh is due.
    "overflow": lambda folder: fit_with_loss_scaling(folder, batches=(0, 1, 2, 3, 4, 5), overflow=3),
    "overflow_left_out": lambda folder: fit_with_loss_scaling(folder, batches=(0, 1, 2, 4, 5)),
    "unused": lambda folder: fit(folder, Module(HALVES, extra=on_the_first_rank), strategy=UNUSED, max_epochs=1),
    "unused_once": lambda folder: fit(folder, Module(HALVES, extra=on_the_first_rank), strategy=UNUSED, max_steps=1),
    # A refresh is due at batches 0, 3, 2, 1 of three epochs.
    "buckets": lambda folder: fit(folder, Module(HALVES), max_epochs=3, strategy=in_buckets()),
    "split": lambda folder: fit(folder, Module(HALVES), max_epochs=3, strategy=ThorDDPStrategy(split_indices=[0, 2])),
    "static": lambda folder: fit(folder, Module(HALVES), max_epochs=3, strategy=in_buckets(static_graph=True)),
    "irregular": lambda folder: fit(
        folder, Module(HALVES, extra=irregular), max_epochs=3, strategy=in_buckets(find_unused_parameters=True)
    ),
    "irregular_ddp": lambda folder: fit(
        folder, Module(HALVES, extra=irregular), max_epochs=3, strategy="ddp_find_unused_parameters_true"
    ),
    "auto": fit_with_a_block_size_that_each_rank_would_choose_differently,
    "micro_batches_in_buckets": lambda folder: fit(folder, Module(HALVES, micro_batches=2), strategy=in_buckets()),
    "plain_loop": plain_loop,
    "all_nobody": lambda folder: fit(folder, Module(HALVES, extra=nobody_at_times), strategy=UNUSED),
    "one": lambda folder: fit(folder, Module(HALVES), max_epochs=3, strategy=keeping(1), checkpoints="one"),
    "one_polar": lambda folder: fit(folder, Module(HALVES, mode="polar"), strategy=keeping(1)),
    "one_staggered": lambda folder: fit(folder, Module(HALVES), max_epochs=3, strategy=keeping(1), stagger=True),
    "one_trace_rule": lambda folder: fit(
        folder, Module(HALVES), max_epochs=3, strategy=keeping(1), trace_rule=(0.2, 0.02)
    ),
    "one_quarters": lambda folder: fit(folder, Module(HALVES, micro_batches=2), strategy=keeping(1)),
    "one_overflow": lambda folder: fit_with_loss_scaling(folder, keeping(1), batches=(0, 1, 2, 3, 4, 5), overflow=3),
    "one_nobody": lambda folder: fit(
        folder, Module(HALVES, extra=nobody_at_times), strategy=keeping(1, find_unused_parameters=True)
    ),
    "one_resumed": lambda folder: fit(
        folder, Module(HALVES), max_epochs=3, strategy=keeping(1), resume=folder / "one" / "epoch=0.ckpt"
    ),
    "one_from_all": lambda folder: fit(
        folder, Module(HALVES), max_epochs=3, strategy=keeping(1), resume=folder / "halves" / "epoch=0.ckpt"
    ),
    "all_from_one": lambda folder: fit(folder, Module(HALVES), max_epochs=3, resume=folder / "one" / "epoch=0.ckpt"),
    "two": lambda folder: fit(folder, Module(HALVES), max_epochs=3, strategy=keeping(2)),
}
NAMED_ONLY: dict[str, Callable[[Path], Result]] = {
    "four": lambda folder: fit(folder, Module(QUARTERS), devices=4, max_epochs=3, strategy=in_buckets()),
    "four_resumed": lambda folder: fit(
        folder, Module(QUARTERS), devices=4, max_epochs=3, resume=Path(os.environ["TWO_RANKS"]) / "halves/epoch=0.ckpt"
    ),
    "four_one": lambda folder: fit(folder, Module(QUARTERS), devices=4, strategy=keeping(1)),
    "four_two": lambda folder: fit(folder, Module(QUARTERS), devices=4, strategy=keeping(2)),
    "four_two_polar": lambda folder: fit(folder, Module(QUARTERS, mode="polar"), devices=4, strategy=keeping(2)),
    "four_four": lambda folder: fit(
        folder, Module(QUARTERS), devices=4, max_epochs=3, strategy=in_buckets(inverse_workers=4)
    ),
    "four_two_resumed": lambda folder: fit(
        folder,
        Module(QUARTERS),
        devices=4,
        max_epochs=3,
        strategy=keeping(2),
        resume=Path(os.environ["TWO_RANKS"]) / "one/epoch=0.ckpt",
    ),
    "three_of_four": lambda folder: fit(folder, Module(QUARTERS), devices=4, strategy=keeping(3)),
    "dies": lambda folder: fit(folder, Module(HALVES, fail=dies), strategy=in_buckets()),
}


@functools.lru_cache(maxsize=1)
def launched() -> tuple[tempfile.TemporaryDirectory[str], str]:
    """The folder with the results of all trainings (it goes with the cache), and what the two processes printed."""
    folder = tempfile.TemporaryDirectory(prefix="lightning_thor_two_ranks_")
    return folder, run([__file__, folder.name])[1]


def torchrun(n_ranks: int, folder: Path, *names: str) -> tuple[int, str]:
    """Run trainings under torchrun, which may go on from those of `two_ranks`; exit status and output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    return run([*launcher, __file__, str(folder), *names], TWO_RANKS=str(results_folder()))


FOUR = (
    "four",
    "four_resumed",
    "four_one",
    "four_two",
    "four_two_polar",
    "four_four",
    "four_two_resumed",
    "four_texts",
    "four_all_at_once_resumed",
)


@functools.lru_cache(maxsize=1)
def launched_four() -> tuple[tempfile.TemporaryDirectory[str], int, str]:
    """As `launched`, for the trainings of `FOUR` on four ranks; with the exit status."""
    folder = tempfile.TemporaryDirectory(prefix="lightning_thor_four_ranks_")
    return folder, *torchrun(4, Path(folder.name), *FOUR)


def four_ranks(name: str) -> list[Result]:
    """What the training ``name`` of `FOUR` gave on each of four ranks."""
    folder, _, printed = launched_four()
    return results(Path(folder.name), name, 4, printed)


def results(folder: Path, name: str, n_ranks: int, printed: str) -> list[Result]:
    """What a training left in ``folder``; an AssertionError with what it ``printed`` if it did not end."""
    files = [folder / f"{name}-{rank}.pt" for rank in range(n_ranks)]
    if not all(file.is_file() for file in files):
        raise AssertionError(f"The training {name!r} did not end on all ranks. They printed: ...{printed[-6000:]}")
    return [torch.load(file, weights_only=True) for file in files]


def results_folder() -> Path:
    """Where the two ranks put their results and checkpoints."""
    return Path(launched()[0].name)


def two_ranks(name: str) -> list[Result]:
    """What the training ``name`` gave on rank 0 and on rank 1."""
    return results(results_folder(), name, 2, launched()[1])


def one_rank(folder: Path, **options: Any) -> Result:
    """What `fit` gives on one rank, which takes whole batches."""
    return fit(folder, Module((ROWS,)), devices=1, **options)


def state(result: Result, *without: str) -> Result:
    """What must be equal where two trainings are one."""
    names = ("weights", "optimizer", "curvature", "schedulers", "epochs")
    return {name: without_words(result[name]) for name in names if name not in without}


def train(folder: Path, *names: str) -> None:
    """Run these trainings, or all that `two_ranks` may be asked for, and save what came out of each."""
    # These are made of what is in this file.
    from tests.helpers import endings, option_trainings, text_trainings

    trainings = TRAININGS | option_trainings.TRAININGS | text_trainings.TRAININGS
    named_only = NAMED_ONLY | option_trainings.NAMED_ONLY | text_trainings.NAMED_ONLY | endings.NAMED_ONLY
    for name in names or trainings:
        result = (trainings | named_only)[name](folder)
        torch.save(result, folder / f"{name}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), *sys.argv[2:])
