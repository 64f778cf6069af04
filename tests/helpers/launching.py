"""How tests start several ranks: real processes, which can be ended; what they train is other files' matter."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.helpers.fork_server import Request

# Generous, since the machine may be busy; a rank that waits for the other one for ever is what it is for.
SECONDS = 300
ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """What a launcher left in this process would make a new one believe that it is a rank already."""
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT")}
    path = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    return env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def run(command: list[str], seconds: float = SECONDS, **env: str) -> tuple[int, str]:
    """Exit status and output of a Python command with all processes that it starts; ended after ``seconds``."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a hanging rank can be ended with the process that started it
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed = f"Ended after {seconds} seconds. {process.communicate()[0]}"
    return process.returncode, printed


@functools.lru_cache(maxsize=1)
def fork_server() -> subprocess.Popen[bytes]:
    """A process of `tests.helpers.fork_server`, which ends with this one."""
    command = [sys.executable, "-m", "tests.helpers.fork_server"]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def run_forked(
    program: str | Callable[[], object], *arguments: str, torn_down: bool = False, **env: str
) -> tuple[int, str]:
    """As `run`, of a program that starts as a fork: importing everything takes longer than most programs run.

    Args:
        program: a file, or a function that can be pickled.
        arguments: of its command line.
        torn_down: whether it and its forks end as other programs do, which takes a second, and not at once.
        env: variables of its environment.
    """
    server = fork_server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as printed:
        pickle.dump(Request(program, arguments, environment() | env, printed.name, SECONDS, torn_down), server.stdin)
        server.stdin.flush()
        status = int(server.stdout.readline())
        words = f"Ended after {SECONDS} seconds. " if status == -signal.SIGKILL else ""
        return status, words + printed.read()


class Crash(SystemExit):
    """A signal ended a process."""


def fork(n_ranks: int, work: Callable[[], None]) -> None:
    """``n_ranks`` processes as torchrun would start them, but without importing everything once more in each.

    Raises:
        Crash: a signal ended one of them, such as SIGABRT within torch; the others are ended then.
        SystemExit: one of them failed otherwise.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: set[int] = set()
    for rank in map(str, range(n_ranks)):
        pid = os.fork()
        if pid:
            ranks.add(pid)
            continue
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(n_ranks), "GROUP_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            raise (Crash if os.WIFSIGNALED(status) else SystemExit)(f"A rank of {n_ranks} failed: status {status}.")


def ends_of(processes: Sequence[int], limit: float) -> list[tuple[int, float]]:
    """Wait for children, and kill those that are still there after ``limit`` seconds; exit status, less than 0 if a
    signal ended it, and time (`time.monotonic`) of the end of each."""
    ends: dict[int, tuple[int, float]] = {}
    start = time.monotonic()
    while len(ends) < len(processes):
        for process in set(processes) - ends.keys():
            if time.monotonic() - start > limit:
                os.kill(process, signal.SIGKILL)
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                ends[process] = os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.005)
    return [ends[process] for process in processes]
