"""Trainings under a Trainer over meshes of one, two and four ranks, each going on from a checkpoint of another one.

``python mesh_strategies.py FOLDER NAME ...`` runs these, all first legs, then all second ones: see `LEGS`.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_thor import Thor, ThorModelParallelStrategy
from tests.helpers.distributed_workers import ROWS, Module, Result, fit, whole
from tests.helpers.launching import fork, run_forked
from tests.helpers.mesh_workers import LENGTH, VOCABULARY, Text, parallelized


class Meshed(Module):
    """Trains `Text` over whatever mesh the strategy has, with groups that go backwards through the model."""

    def __init__(self, n_data: int, width: int = 1, mode: str = "natural") -> None:
        super().__init__((ROWS // n_data,) * n_data, net=Text(16), mode=mode, batches=(0, 1))
        self.width = width

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh
            shards: Any = mesh["replicate", "shard"] if "replicate" in mesh.mesh_dim_names else mesh["data_parallel"]
            tensor = mesh["tensor_parallel"]
            parallelized(
                self.net,
                tensor if tensor.size() > 1 else None,
                shards if self.trainer.world_size > self.width else None,
            )

    def configure_optimizers(self) -> Any:
        params = list(self.parameters())[::-1]
        groups = [{"params": params[1::2], "weight_decay": 0.1}, {"params": params[::2]}]
        return Thor(groups, lr=0.02, mode=self.mode)

    def train_dataloader(self) -> Any:
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return super().train_dataloader()
        sampler = self.trainer.strategy.distributed_sampler_kwargs
        assert sampler["num_replicas"] == len(self.parts)
        pieces = [tuple(part.chunk(len(self.parts))[sampler["rank"]] for part in self.batch(n)) for n in self.batches]
        return DataLoader(pieces, batch_size=None)

    def training_step(self, piece: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(piece[0]).flatten(0, 1), piece[1].flatten())

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(number))
        return tokens[:, :-1], tokens[:, 1:]


class Leg(NamedTuple):
    """One epoch of a training; the next leg goes on from its checkpoint."""

    n_ranks: int = 1
    width: int = 1
    """Of tensor parallelism."""
    replicas: int | None = None
    """None: no sharded strategy."""
    in_one_file: bool = True
    inverse_workers: int | None = None
    block_size: int | Literal["auto"] = 4

    def strategy(self) -> Any:
        if self.replicas is None:
            return "thor_ddp" if self.n_ranks == 2 else "ddp" if self.n_ranks > 2 else "auto"
        return ThorModelParallelStrategy(
            tensor_parallel_size=self.width, replicas=self.replicas, save_distributed_checkpoint=not self.in_one_file,
            inverse_workers=self.inverse_workers,
        )  # fmt: skip


ALONE, TP, HSDP, FSDP, TP_FSDP = Leg(), Leg(2, 2, 1), Leg(4, 1, 2), Leg(2, 1, 1), Leg(4, 2, 1)
# Each layer's inverses on one rank of a replica, or of those along which tensor parallelism is not.
FEW_FSDP, FEW_HSDP = Leg(4, 1, 1, inverse_workers=1), HSDP._replace(inverse_workers=2)
FEW_TP_FSDP = TP_FSDP._replace(inverse_workers=2)
LEGS: dict[str, list[Leg]] = {
    # From each way to train to another one, in one file.
    "files": [ALONE, TP, HSDP, Leg(2), TP_FSDP, FSDP, ALONE],
    # A folder is read by sharded strategies alone.
    "folders": [one._replace(in_one_file=False) for one in (FSDP, TP_FSDP, HSDP, TP)],
    "adam_files": [TP_FSDP, ALONE, HSDP, TP],
    "polar_folders": [HSDP._replace(in_one_file=False), TP_FSDP],
    # Norms are whole under tensor parallelism alone.
    "adam_folders": [FSDP._replace(in_one_file=False), TP],
    "natural_few": [ALONE, FEW_HSDP, Leg(2), FEW_FSDP, ALONE],
    "polar_few": [FEW_FSDP._replace(in_one_file=False), FEW_TP_FSDP, FSDP],
    "adam_few": [FEW_TP_FSDP._replace(in_one_file=False), FEW_HSDP, FSDP._replace(inverse_workers=1), ALONE],
}

LONG = ("adam_files", "polar_folders", "polar_few", "adam_few")
"""Of the tests that are marked long: the ways of others in another mode."""

TRIALS = {f"auto_{name}": [leg._replace(block_size="auto")] for name, leg in (("tp", TP), ("hsdp", HSDP))}
"""One leg each, whose block size is measured."""


def work(folder: Path, number: int, names: list[str]) -> None:
    """Go the legs of this number, one training after the other: the first one takes longest."""
    torch.set_num_threads(1)
    for name in names:
        go(folder, name, number, (LEGS | TRIALS)[name][number])


def go(folder: Path, name: str, number: int, leg: Leg) -> None:
    module = Meshed(leg.n_ranks // leg.width, leg.width, mode_of(name))
    resume = None if number == 0 else folder / f"{name}{number - 1}" / f"epoch={number - 1}.ckpt"
    options = {"precision": "32-true"} if leg.replicas is not None else {}
    result = fit(
        folder, module, devices=leg.n_ranks, strategy=leg.strategy(), max_epochs=number + 1, block_size=leg.block_size,
        checkpoints=f"{name}{number}", resume=resume, **options,
    )  # fmt: skip
    torch.save(summary(module, result), folder / f"{name}{number}-{module.trainer.global_rank}.pt")


def mode_of(name: str) -> Any:
    """The mode that the name of some legs begins with, or the default."""
    first = name.split("_")[0]
    return first if first in ("polar", "adam") else "natural"


def summary(module: Meshed, result: Result) -> Result:
    """What the laws compare: moments and momentum by name."""
    names = {p: name for name, p in module.net.named_parameters()}
    states = module.optimizers().optimizer.state
    kept = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    return {
        "weights": result["weights"],
        "moments": whole({names[p]: {k: v for k, v in one.items() if k in kept} for p, one in states.items()}),
        "curvature": {key: value for key, value in result["curvature"].items() if not isinstance(value, str)},
        "steps": result["steps"],
        "block_size": result["block_size"],
    }


def unbroken(folder: Path, name: str, block_size: int = 4) -> Result:
    module = Meshed(1, 1, mode_of(name))
    n_epochs = len((LEGS | TRIALS)[name])
    return summary(module, fit(folder, module, devices=1, max_epochs=n_epochs, block_size=block_size))


@functools.lru_cache
def launched(names: tuple[str, ...]) -> tuple[tempfile.TemporaryDirectory[str], str]:
    """The folder with the results of these legs (it goes with the cache), and what the processes printed."""
    folder = tempfile.TemporaryDirectory(prefix="lightning_thor_legs_")
    return folder, run_forked(__file__, folder.name, *names)[1]


def legs(name: str) -> list[list[Result]]:
    """What each rank had at the end of each leg."""
    ordinary = tuple(one for one in LEGS | TRIALS if one not in LONG)
    folder, printed = launched(LONG if name in LONG else ordinary)
    files = [
        [Path(folder.name) / f"{name}{number}-{rank}.pt" for rank in range(leg.n_ranks)]
        for number, leg in enumerate((LEGS | TRIALS)[name])
    ]
    assert all(file.is_file() for some in files for file in some), f"{name!r} did not end: ...{printed[-6000:]}"
    return [[torch.load(file, weights_only=True) for file in some] for some in files]


if __name__ == "__main__":
    for place, row in enumerate(zip_longest(*((LEGS | TRIALS)[one] for one in sys.argv[2:]))):
        for n in (1, 2, 4):
            if together := [one for one, leg in zip(sys.argv[2:], row, strict=True) if leg and leg.n_ranks == n]:
                fork(n, partial(work, Path(sys.argv[1]), place, together))
