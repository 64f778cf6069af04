"""Trainings that are broken off and go on: each mode, situation and strategy, and from each strategy to others.

``python resumes.py FOLDER [NAME ...]`` runs the cases of `MATRIX` and `MOVES` with these names, or all; each rank saves
what came out of an unbroken and of a resumed training as ``FOLDER/<name>-<rank>.pt``. `resumed` starts that program
once for all tests.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision

from lightning_thor import ThorDDPStrategy, ThorModelParallelStrategy
from tests.helpers.distributed_workers import ROWS, Result, fit, state
from tests.helpers.launching import fork, run
from tests.helpers.sharded_workers import Sharded

SECONDS = 3600
MODES = ("natural", "polar", "adam")
SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "staggered": {"stagger": True},
    "trace_rule": {"trace_rule": (0.2, 0.02)},
    "accumulation": {"micro_batches": 2},
    # Batches 1 and 4 of each epoch overflow: before the checkpoint and after it.
    "skipped_steps": {"overflows": (1, 4), "batches": (0, 1, 2, 3, 4, 5)},
    "mid_epoch": {"save_at": 2},
}
"""Options of `Broken` and of ``fit``. A refresh is due every third step, a checkpoint after the fourth or second."""


class Strategy(NamedTuple):
    """Where a training runs."""

    kind: str
    n_ranks: int

    @property
    def is_sharded(self) -> bool:
        return self.kind.startswith("fsdp2")

    def made(self) -> Any:
        """The Trainer's argument."""
        made: dict[str, Any] = {
            "single": lambda: "auto",
            "ddp": lambda: "ddp",
            "thor_ddp": lambda: "thor_ddp",
            "inverse_workers": lambda: ThorDDPStrategy(inverse_workers=1),
            "fsdp2_folder": ThorModelParallelStrategy,
            "fsdp2_file": lambda: ThorModelParallelStrategy(save_distributed_checkpoint=False),
            "fsdp2_workers_folder": lambda: ThorModelParallelStrategy(inverse_workers=1),
            "fsdp2_workers_file": lambda: ThorModelParallelStrategy(
                inverse_workers=1, save_distributed_checkpoint=False
            ),
        }
        return made[self.kind]()


SINGLE, THOR_DDP, FOLDER, FILE = (
    Strategy("single", 1),
    Strategy("thor_ddp", 2),
    Strategy("fsdp2_folder", 2),
    Strategy("fsdp2_file", 2),
)
STRATEGIES = (SINGLE, Strategy("ddp", 2), THOR_DDP, Strategy("inverse_workers", 2), FOLDER, FILE)
WORKERS = (Strategy("fsdp2_workers_folder", 2), Strategy("fsdp2_workers_file", 2))
"""Moves between these and others are those of `tests.fsdp.test_meshes`."""


class Case(NamedTuple):
    """An unbroken training, and one that goes on from its checkpoint."""

    mode: str
    situation: str
    before: Strategy
    after: Strategy

    @property
    def unbroken(self) -> str:
        """Name of the case whose unbroken training, and its checkpoint, this one has too."""
        return self._replace(after=self.before).name

    @property
    def name(self) -> str:
        places = [self.before] if self.after == self.before else [self.before, self.after]
        return "-".join([self.mode, self.situation, *(f"{one.kind}_{one.n_ranks}" for one in places)])


def possible(mode: str, strategy: Strategy) -> bool:
    """Adam's mode with DDP stores every inverse on every rank."""
    return (mode, strategy.kind) != ("adam", "inverse_workers")


MATRIX = {
    case.name: case
    for mode, situation, strategy in product(MODES, SITUATIONS, (*STRATEGIES, *WORKERS))
    if possible(mode, strategy)
    for case in [Case(mode, situation, strategy, strategy)]
}
"""Bit for bit."""
ON_FOUR = (THOR_DDP._replace(n_ranks=4), FOLDER._replace(n_ranks=4))
MOVES = {
    case.name: case
    for mode, before, after in product(MODES, (*STRATEGIES, *ON_FOUR), (*STRATEGIES, *ON_FOUR))
    # A folder is read by sharded strategies alone.
    if before != after and (before.kind != FOLDER.kind or after.is_sharded)
    if possible(mode, before) and possible(mode, after)
    for case in [Case(mode, "plain", before, after)]
}
"""To rounding in float64: sums are taken in another order."""
UNBROKEN = {case.unbroken: case._replace(after=case.before) for case in (MATRIX | MOVES).values()}
"""By name; a move from two ranks or one has its unbroken training with the matrix."""


class Places:
    """A loader that goes on where its state says.

    Args:
        pieces: one for each batch.
    """

    def __init__(self, pieces: list[Any]) -> None:
        self.pieces, self.start, self.place = pieces, 0, 0

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for place in range(start, len(self.pieces)):
            self.place = place + 1
            yield self.pieces[place]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = self.place = state["place"] % len(self.pieces)


class SavesAt(L.Callback):
    """A checkpoint after a step, in the middle of an epoch."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Broken(Sharded):
    """Its loader knows where it is, the losses of some batches overflow, and it is saved after a step.

    Args:
        overflows: numbers of these batches.
        saver: what saves it.
    """

    def __init__(
        self, parts: tuple[int, ...], overflows: tuple[int, ...] = (), saver: SavesAt | None = None, **others: Any
    ) -> None:
        super().__init__(parts, **others)
        self.overflows, self.saver = overflows, saver

    def train_dataloader(self) -> Any:
        return Places(list(super().train_dataloader().dataset))

    def training_step(self, piece: Any, index: int) -> Any:
        self.overflow = number if (number := int(piece[2][0])) in self.overflows else None
        return super().training_step(piece, index)

    def configure_callbacks(self) -> list[L.Callback]:
        return [] if self.saver is None else [self.saver]


def train(folder: Path, case: Case, strategy: Strategy, *, resumes: bool) -> Result:
    """Two epochs, of which one that resumes has less."""
    options = dict(SITUATIONS[case.situation])
    own = {key: options.pop(key) for key in ("micro_batches", "overflows", "batches") if key in options}
    step = options.pop("save_at", None)
    checkpoints = folder / case.unbroken
    if own.get("overflows"):
        own["dtype"] = torch.float32
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]
    elif strategy.is_sharded:
        options["precision"] = "32-true"  # the weights are float64 all the same
    if resumes:
        options["resume"] = checkpoints / ("mid.ckpt" if step else "epoch=0.ckpt")
    elif step:
        own["saver"] = SavesAt(step, checkpoints / "mid.ckpt")
    else:
        options["checkpoints"] = case.unbroken
    module = Broken((ROWS // strategy.n_ranks,) * strategy.n_ranks, mode=case.mode, **own)
    result = fit(folder, module, devices=strategy.n_ranks, strategy=strategy.made(), **options)
    return state(result) | {"steps": result["steps"]}


def work(folder: Path, names: list[str], part: str) -> None:
    """What one rank does of these cases."""
    torch.set_num_threads(1)
    for name in names:
        case = (MATRIX | MOVES | UNBROKEN)[name]
        result = train(folder, case, getattr(case, part), resumes=part == "after")
        torch.save(result, folder / f"{name}-{part}-{os.environ['RANK']}.pt")
        if dist.is_initialized():
            dist.barrier()


@functools.lru_cache(maxsize=1)
def launched() -> tuple[tempfile.TemporaryDirectory[str], str]:
    """The folder with the results of all cases (it goes with the cache), and what the processes printed."""
    folder = tempfile.TemporaryDirectory(prefix="lightning_thor_resumes_")
    return folder, run([__file__, folder.name], SECONDS)[1]


def resumed(name: str) -> tuple[list[Result], list[Result]]:
    """What the unbroken training gave on each rank, and the resumed one."""
    folder, printed = launched()
    case = (MATRIX | MOVES)[name]
    found = []
    for part, file in (("before", case.unbroken), ("after", name)):
        files = [Path(folder.name) / f"{file}-{part}-{rank}.pt" for rank in range(getattr(case, part).n_ranks)]
        assert all(file.is_file() for file in files), f"{name!r} did not end. They printed: ...{printed[-6000:]}"
        found.append([torch.load(file, weights_only=True) for file in files])
    return found[0], found[1]


if __name__ == "__main__":
    chosen = sys.argv[2:] or [*MATRIX, *MOVES]
    cases = {name: (MATRIX | MOVES)[name] for name in chosen}
    unbroken = {case.unbroken: UNBROKEN[case.unbroken] for case in cases.values()}
    for part, trainings in (("before", unbroken), ("after", cases)):
        for n_ranks in (1, 2, 4):
            if names := [name for name, case in trainings.items() if getattr(case, part).n_ranks == n_ranks]:
                fork(n_ranks, partial(work, Path(sys.argv[1]), names, part))
