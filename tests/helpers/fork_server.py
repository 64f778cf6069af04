"""Starts programs as forks of itself: it has imported everything, and has no threads, which a fork would not have.

``python -m tests.helpers.fork_server`` reads pickled `Request` from its standard input and writes a line with the exit
status of each program to its standard output.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple, NoReturn


class Request(NamedTuple):
    """A program to run."""

    program: str | Callable[[], object]
    """A file, or a function."""
    arguments: tuple[str, ...]
    """Of its command line."""
    env: dict[str, str]
    """All of its environment."""
    printed: str
    """The file that its output goes to."""
    seconds: float
    """After which it is killed, with all processes that it started."""
    torn_down: bool = False
    """Whether it and its forks end as other programs do, which takes a second, and not at once."""


def serve() -> None:
    """Run one program after the other until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while True:
        try:
            request: Request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        print(run(request), file=answers, flush=True)


def run(request: Request) -> int:
    """Exit status of the program, less than 0 if a signal ended it."""
    pid = os.fork()
    if not pid:
        be(request)
    start = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - start > request.seconds:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)


def be(request: Request) -> NoReturn:
    """Turn this process into the program."""
    os.setsid()
    out = os.open(request.printed, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request.env)
    program = request.program
    sys.argv = [program if isinstance(program, str) else "program", *request.arguments]
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
    number = status if isinstance(status, int) else int(status is not None)
    if request.torn_down:
        sys.exit(number)
    os._exit(number)


if __name__ == "__main__":
    # What most programs import.
    import tests.helpers.mesh_strategies  # noqa: F401

    # What was imported is no garbage: forks need not look through it, which would copy it.
    gc.freeze()
    serve()
