"""How tests start several ranks: real processes, which can be ended; what they train is other files' matter."""

from __future__ import annotations

import faulthandler
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

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


def run_forked(program: str | Callable[[], object], *arguments: str, **env: str) -> tuple[int, str]:
    """As `run`, of a program that starts as a fork of this process: importing everything takes longer than most run.

    Args:
        program: a file, or a command's function.
        arguments: of its command line.
        env: variables of its environment.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        pid = os.fork()
        if not pid:
            _be(program, arguments, env, printed.fileno())
        start, ended = time.monotonic(), (0, 0)
        while not ended[0]:
            time.sleep(0.02)
            ended = os.waitpid(pid, os.WNOHANG)
            if time.monotonic() - start > SECONDS:
                os.killpg(pid, signal.SIGKILL)
                start = math.inf
        printed.seek(0)
        words = f"Ended after {SECONDS} seconds. " if start == math.inf else ""
        return os.waitstatus_to_exitcode(ended[1]), words + printed.read()


def _be(program: str | Callable[[], object], arguments: tuple[str, ...], env: dict[str, str], out: int) -> NoReturn:
    """Turn this process into a new program's."""
    os.setsid()
    for number in (1, 2):
        os.dup2(out, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    variables = environment() | env
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = [program if isinstance(program, str) else "program", *arguments]
    warnings.resetwarnings()
    status: object = 0
    try:
        faulthandler.enable()
        runpy.run_path(program, run_name="__main__") if isinstance(program, str) else program()
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


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
