"""Trainings on two nodes of one rank each: two torchruns that meet at the loopback address.

``torchrun ... two_nodes.py FOLDER NAME ...`` runs these trainings of `TRAININGS` on a node; each rank saves what came
out of it as ``FOLDER/<name>-<rank>.pt``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests.helpers.distributed_workers import HALVES, Module, Result, dies, fit, in_buckets
from tests.helpers.launching import run
from tests.helpers.lone_ranks import free_port
from tests.helpers.sharded_workers import Sharded, train

NODES = {"devices": 1, "num_nodes": 2, "max_epochs": 1}


def dies_on_the_second(rank: int, number: int) -> None:
    """Without a word, on the node that the other does not look up to."""
    if rank == 1 and number == 3:
        os._exit(13)


TRAININGS: dict[str, Callable[[Path], Result]] = {
    "ddp": lambda folder: fit(folder, Module(HALVES), strategy="thor_ddp", **NODES),
    "fsdp2": lambda folder: train(folder, Sharded(HALVES), "thor_fsdp2", **NODES),
    **{
        f"ddp_{fail.__name__}": lambda folder, fail=fail: fit(
            folder, Module(HALVES, fail=fail), strategy=in_buckets(), **NODES
        )
        for fail in (dies, dies_on_the_second)
    },
    **{
        f"fsdp2_{fail.__name__}": lambda folder, fail=fail: train(
            folder, Sharded(HALVES, fail=fail), "thor_fsdp2", **NODES
        )
        for fail in (dies, dies_on_the_second)
    },
}


def two_nodes(folder: Path, *names: str) -> list[tuple[int, str]]:
    """Run trainings; exit status and output of each node."""
    place = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    start = partial(_start, [*place, __file__, str(folder), *names])
    with ThreadPoolExecutor(2) as nodes:
        return list(nodes.map(start, range(2)))


def _start(arguments: list[str], node: int) -> tuple[int, str]:
    return run(["-m", "torch.distributed.run", f"--node-rank={node}", *arguments])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        result = TRAININGS[name](Path(sys.argv[1]))
        torch.save(result, Path(sys.argv[1]) / f"{name}-{dist.get_rank()}.pt")
