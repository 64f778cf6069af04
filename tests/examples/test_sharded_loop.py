"""The plain loop over a mesh: it learns as one process does, and goes on over another mesh."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import pytest

from examples import sharded_loop
from tests.helpers.launching import fork, run_forked


def run_loops(loops: list[tuple[int, list[str]]]) -> None:
    for n_ranks, flags in loops:
        print("run", flush=True)
        sys.argv[1:] = flags
        fork(n_ranks, sharded_loop.main)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["natural", pytest.param("adam", marks=pytest.mark.long)])
def test_the_loop_over_meshes_learns_as_one_process(tmp_path: Path, mode: str) -> None:
    """Shards and tensor parallelism on 4 ranks, then tensor parallelism alone, then shards and replicas; float32 over
    other sums rounds otherwise."""
    steps, folder = ["--mode", mode, "--steps", "10"], ["--checkpoint", str(tmp_path / "saved")]
    loops = [
        (4, ["--shard", "2", "--tensor", "2", *steps, *folder]),
        (2, ["--tensor", "2", *steps, *folder]),
        (4, ["--replicate", "2", "--shard", "2", *steps, *folder]),
        (1, ["--mode", mode, "--steps", "30"]),
    ]
    _, printed = run_forked(partial(run_loops, loops))
    losses = [[float(loss) for loss in re.findall(r"loss ([\d.]+)", part)] for part in printed.split("run\n")[1:]]
    *parts, alone = losses
    assert [loss for part in parts for loss in part] == pytest.approx(alone, rel=0.002), printed[-3000:]
    assert alone[-1] < alone[0]


def test_the_loop_fits_on_two_screens() -> None:
    assert len(Path(sharded_loop.__file__).read_text(encoding="utf-8").splitlines()) < 120
