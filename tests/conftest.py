"""Settings that all tests share: reproducible, few threads (several tests start processes of their own)."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

torch.set_num_threads(1)

# The same cases each time, so that a failure is one of the change; thousands of new ones with LIGHTNING_THOR_FUZZ=1.
settings.register_profile("default", max_examples=20, derandomize=True, deadline=None, database=None)
settings.register_profile("fuzz", max_examples=3000, derandomize=False, deadline=None, print_blob=True)
settings.load_profile("fuzz" if os.environ.get("LIGHTNING_THOR_FUZZ") == "1" else "default")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one of pytest-xdist's processes, and all that share the trainings of a launcher.

    Files with slow tests come first: in the end both processes then have something left to do.
    """
    for item in items:
        module = getattr(item, "module", None)
        launchers = [getattr(module, name) for name in ("two_ranks", "four_ranks", "ranks") if hasattr(module, name)]
        item.add_marker(pytest.mark.xdist_group(launchers[0].__module__ if launchers else str(item.path)))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how to run what ``make test`` leaves out, which pytest does not mention where several processes run tests."""
    left_out = {"long": "tests that take minutes: make long", "soak": "those that take hours: make soak"}
    if words := [told for mark, told in left_out.items() if f"not {mark}" in config.option.markexpr]:
        terminalreporter.write_line(f"Left out: {'; '.join(words)}.")


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through all that was imported, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Removes what a strategy leaves in this process: variables for the ranks that it starts, and a process group."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
