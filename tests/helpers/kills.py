"""Trainings that are killed again and again at random moments, and go on from ``ckpt_path="last"`` each time.

``python kills.py FOLDER NAME ...`` runs each of the trainings of `CHAINS`, and writes what became of it to
``FOLDER/<name>.json``. Each life is forked from a process that has imported everything. `killed` starts that program
once for all tests.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_thor import ThorCallback
from tests.helpers.boring import quiet
from tests.helpers.distributed_workers import ROWS, STEPS_PER_EPOCH, curvature_of, whole
from tests.helpers.launching import ends_of, run
from tests.helpers.lone_ranks import by_hand, free_port
from tests.helpers.resumes import FOLDER, MODES, SINGLE, THOR_DDP, Broken, Strategy

N_KILLS = int(os.environ.get("LIGHTNING_THOR_KILLS", "20"))
STEPS = 200
"""Of one epoch; each is saved. Lightning itself counts wrongly where a fit is resumed at the ends of two epochs: with
SGD and a loader of torch 16 steps where 12 are right."""
LIMIT = 120
"""Seconds in which a rank ends by itself when another one was killed."""
SECONDS = 3600


class Chain(NamedTuple):
    """How a training is run and ended."""

    mode: str
    strategy: Strategy
    signals: tuple[int, ...] = (signal.SIGKILL,)
    """In turn."""
    alone: bool = False
    """Whether one rank, drawn each time, is killed, and the other one is left to end by itself."""


CHAINS = {
    **{f"{one.kind}-{mode}": Chain(mode, one) for one in (SINGLE, THOR_DDP, FOLDER) for mode in MODES},
    **{f"{one.kind}-{mode}-alone": Chain(mode, one, alone=True) for one in (THOR_DDP, FOLDER) for mode in MODES},
    **{
        f"{one.kind}-{mode}-signals": Chain(mode, one, (signal.SIGTERM, signal.SIGINT))
        for one, mode in zip((SINGLE, THOR_DDP, FOLDER), MODES, strict=True)
    },
}


class Diary(L.Callback):
    """Appends to a file the step with which a life begins, and each step that is saved."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._write(trainer, f"began {trainer.global_step}")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        # The checkpoint of the step before is complete.
        self._write(trainer, f"saved {trainer.global_step}")

    def _write(self, trainer: L.Trainer, line: str) -> None:
        if trainer.is_global_zero:
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write(f"{line}\n")


def live(folder: Path, chain: Chain, saves: bool = True) -> None:
    """Train from the last checkpoint to the end, and save the weights and the curvature of the end."""
    torch.set_num_threads(1)
    n = chain.strategy.n_ranks
    module = Broken((ROWS // n,) * n, mode=chain.mode, batches=tuple(step % STEPS_PER_EPOCH for step in range(STEPS)))
    saver = ModelCheckpoint(folder / "own", save_last=True, save_top_k=0, every_n_train_steps=1)
    callback = ThorCallback(update_every_n_steps=3, block_size=8, summary=False)
    options: dict[str, Any] = {"precision": "32-true"} if chain.strategy.is_sharded else {}
    trainer = quiet(
        folder, callback, *([saver, Diary(folder / "diary.txt")] if saves else []), devices=n,
        strategy=chain.strategy.made(), max_epochs=1, enable_checkpointing=saves, use_distributed_sampler=False,
        **options,
    )  # fmt: skip
    trainer.fit(module, ckpt_path="last" if saves else None)
    if trainer.global_step == STEPS:
        weights = whole({name: weight.detach().clone() for name, weight in module.net.named_parameters()})
        factors = [stack.inverse for stack in curvature_of(trainer).factors.batches.values()]
        torch.save({"weights": weights, "inverses": factors}, folder / f"end-{trainer.global_rank}.pt")


def begin(chain: Chain, work: Callable[[], None], log: Path) -> list[int]:
    """The processes of a life, by rank."""
    port, processes = free_port(), []
    for rank in range(chain.strategy.n_ranks):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        status = 1
        try:
            for number in (1, 2):
                os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
            if chain.strategy.n_ranks > 1:
                os.environ.update(by_hand(rank, port))
            work()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return processes


def end(processes: list[int]) -> tuple[float, bool]:
    """Wait for all, at most `LIMIT` seconds: the seconds from the first end to the last one, and whether one hung."""
    start = time.monotonic()
    _, times = zip(*ends_of(processes, LIMIT), strict=True)
    return max(times) - min(times), max(times) - start >= LIMIT


def went(folder: Path, chain: Chain, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill a training so many times at most, and let it end."""
    began, lost, in_save, hung, seconds = [0], 0, 0, 0, [0.0]
    diary = folder / "diary.txt"
    diary.touch()
    left = kills
    while not (folder / "end-0.pt").exists():
        lines = len(diary.read_text().splitlines())
        processes = begin(chain, lambda: live(folder, chain), folder / "printed.txt")
        deadline = time.monotonic() + LIMIT
        while len(diary.read_text().splitlines()) == lines and time.monotonic() < deadline:
            time.sleep(0.005)
        if left:
            time.sleep(draw.uniform(0, 0.3))
            number = chain.signals[left % len(chain.signals)]
            victims = [draw.choice(processes)] if chain.alone else processes
            for process in victims:
                os.kill(process, number)
            left -= 1
        last, is_hung = end(processes)
        seconds.append(last)
        hung += is_hung
        words = [line.split() for line in diary.read_text().splitlines()]
        before = [int(step) for word, step in words[:lines] if word == "saved"]
        (this, *_) = [int(step) for word, step in words[lines:] if word == "began"] or [-1]
        lost += bool(before) and this < max(before)
        began.append(this)
        in_save += any(one.suffix in (".incomplete", ".before") for one in (folder / "own").glob("*"))
    return {
        "kills": kills - left,
        "began": began,
        "lost": lost,
        "in_save": in_save,
        "hung": hung,
        "seconds": max(seconds),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or CHAINS:
        chain, draw = CHAINS[name], random.Random(name)
        (folder / name).mkdir()
        end(begin(chain, lambda chain=chain, name=name: live(folder / name, chain, False), folder / f"{name}.txt"))
        ranks = range(chain.strategy.n_ranks)
        unbroken = [torch.load(folder / name / f"end-{rank}.pt", weights_only=True) for rank in ranks]
        counts = ("kills", "lost", "in_save", "hung")
        found: dict[str, Any] = {**dict.fromkeys(counts, 0), "lives": 0, "differ": 0, "seconds": 0.0}
        while found["kills"] < N_KILLS:
            place = folder / name / f"from-{found['kills']}"
            place.mkdir()
            one = went(place, chain, N_KILLS - found["kills"], draw)
            for key in counts:
                found[key] += one[key]
            found["lives"] += len(one["began"]) - 1
            found["seconds"] = max(found["seconds"], one["seconds"])
            ends = [torch.load(place / f"end-{rank}.pt", weights_only=True) for rank in ranks]
            for a, b in zip(ends, unbroken, strict=True):
                same = all(torch.equal(a["weights"][key], weight) for key, weight in b["weights"].items())
                same &= all(torch.equal(x, y) for x, y in zip(a["inverses"], b["inverses"], strict=True))
                found["differ"] += not same
        (folder / f"{name}.json").write_text(json.dumps(found))
        print(name, found, flush=True)


@functools.lru_cache(maxsize=1)
def launched() -> tuple[tempfile.TemporaryDirectory[str], str]:
    """The folder with the results of all chains (it goes with the cache), and what the processes printed."""
    folder = tempfile.TemporaryDirectory(prefix="lightning_thor_kills_")
    return folder, run([__file__, folder.name], SECONDS)[1]


def killed(name: str) -> dict[str, Any]:
    """What became of a training."""
    folder, printed = launched()
    file = Path(folder.name) / f"{name}.json"
    assert file.is_file(), f"{name!r} did not end. They printed: ...{printed[-6000:]}"
    found: dict[str, Any] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    main()
