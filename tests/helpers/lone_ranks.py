"""Ranks that no launcher watches, each a process with the variables that a cluster would set.

``python lone_ranks.py FOLDER CLUSTER NAME ...`` runs each of the trainings (see `tests.helpers.distributed_workers`)
on two ranks of a cluster of `CLUSTERS`, one after the other, until the ranks end by themselves, and writes what became
of them to ``FOLDER/ended.json``. Ranks are forked from a process that has imported everything, which takes longer than
their training; they leave as any program does, by the end of this file.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.helpers.distributed_workers import train
from tests.helpers.launching import ends_of, run_forked

N_RANKS = 2
LIMIT = 60  # seconds, until what hangs is killed


class Ended(NamedTuple):
    """How a rank ended."""

    status: int
    """Of its process; less than 0 if a signal ended it."""
    seconds: float
    """After the first one of them that ended."""
    printed: str


def by_hand(rank: int, port: int) -> dict[str, str]:
    """What Lightning asks to be set on a cluster of one's own."""
    place = {"NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": str(N_RANKS)}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def slurm(rank: int, port: int) -> dict[str, str]:
    """What ``srun --ntasks-per-node=2 python ...`` sets, and a port, which otherwise comes from the job's number."""
    return {
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(N_RANKS),
        "SLURM_NTASKS_PER_NODE": str(N_RANKS),
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(port),
    }


CLUSTERS: dict[str, Callable[[int, int], dict[str, str]]] = {"by_hand": by_hand, "slurm": slurm}


def lone_ranks(folder: Path, cluster: str, *names: str, **env: str) -> dict[str, list[Ended]]:
    """How each rank of each training ended."""
    _, printed = run_forked(__file__, str(folder), cluster, *names, torn_down=True, **env)
    file = folder / "ended.json"
    assert file.is_file(), printed[-6000:]
    return {name: [Ended(*one) for one in ranks] for name, ranks in json.loads(file.read_text()).items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def watched(processes: Sequence[int], logs: Sequence[Path]) -> list[Ended]:
    """Wait until all have ended; kill those that have not in time."""
    ends = ends_of(processes, LIMIT)
    first = min(when for _, when in ends)
    return [Ended(status, when - first, log.read_text()) for (status, when), log in zip(ends, logs, strict=True)]


def main() -> None:
    folder, variables = Path(sys.argv[1]), CLUSTERS[sys.argv[2]]
    ended = {}
    for name in sys.argv[3:]:
        port = free_port()
        logs = [folder / f"{name}-{rank}.txt" for rank in range(N_RANKS)]
        processes = []
        for rank, log in enumerate(logs):
            process = os.fork()
            if not process:
                for number in (1, 2):
                    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
                os.environ.update(variables(rank, port))
                train(folder, name)
                return
            processes.append(process)
        ended[name] = watched(processes, logs)
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
