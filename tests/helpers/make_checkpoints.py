"""``python -m tests.helpers.make_checkpoints`` trains what is missing in ``tests/data/checkpoints``.

What is there stays as it is: its worth is that an earlier version wrote it. So this is for a training that was added to
`tests.helpers.stored_checkpoints.TRAININGS`; to replace a file because a change of the
numbers is meant, delete it first.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from tests.helpers.launching import fork
from tests.helpers.stored_checkpoints import STORED, TRAININGS, train


def make(name: str) -> None:
    """The work of one rank."""
    torch.set_num_threads(1)
    result = train(TRAININGS[name], STORED / f"{name}.ckpt")
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(result, STORED / f"{name}.after.pt")


def main() -> None:
    STORED.mkdir(parents=True, exist_ok=True)
    for name, training in TRAININGS.items():
        if not all((STORED / f"{name}.{end}").is_file() for end in ("ckpt", "after.pt")):
            fork(training.n_ranks, partial(make, name))
            print(f"{name}: {(STORED / f'{name}.ckpt').stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
