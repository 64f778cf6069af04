"""Laws of the time of the parts of a step: they add up to it, and on a GPU nothing is waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature
from lightning_thor.curvature.part_timer import MOST_ENDED, PARTS, PartTimer
from lightning_thor.distributed.communicator import WorkerGrid
from tests.helpers.fakes import FakeCommunicator


class Clock:
    """Goes on by what it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Event:
    """One of CUDA's, which has passed once the device is as far."""

    clock, passed = Clock(), -1.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.clock.now

    def query(self) -> bool:
        return self.at <= Event.passed

    def elapsed_time(self, later: Event) -> float:
        assert later.query(), "it would wait"
        return 1e3 * (later.at - self.at)


@pytest.fixture(params=["cpu", "cuda"])
def timed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[PartTimer, Clock]:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(Event, "clock", clock)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return PartTimer(torch.device(request.param)), clock


def step(timer: PartTimer, clock: Clock) -> None:
    timer.begin_step()
    clock.now += 1
    with timer.part("statistics"):
        clock.now += 2
    clock.now += 4
    with timer.part("inversion"):
        clock.now += 8
        with timer.part("communication"):
            clock.now += 16
        clock.now += 32
    clock.now += 64
    timer.end_step()


def test_parts_are_without_those_in_them_and_add_up_to_the_steps(timed: tuple[PartTimer, Clock]) -> None:
    timer, clock = timed
    Event.passed = torch.inf
    step(timer, clock)
    clock.now += 1000  # between steps, as is a part outside of one
    with timer.part("directions"):
        clock.now += 1000
    expected = {"rest": 69, "directions": 0, "statistics": 2, "inversion": 40, "communication": 16}
    assert timer.seconds() == expected
    assert list(expected) == list(PARTS)
    step(timer, clock)
    assert timer.seconds() == {part: 2 * seconds for part, seconds in expected.items()}


def test_a_step_that_raised_is_forgotten(timed: tuple[PartTimer, Clock]) -> None:
    timer, clock = timed
    Event.passed = torch.inf
    timer.begin_step()
    timer.part("inversion").__enter__()
    clock.now += 1
    step(timer, clock)
    assert sum(timer.seconds().values()) == 127


def test_steps_that_nobody_asks_for_do_not_fill_the_memory(timed: tuple[PartTimer, Clock]) -> None:
    timer, clock = timed
    Event.passed = torch.inf
    for _ in range(3 * MOST_ENDED):
        step(timer, clock)
    assert len(timer._ended) <= MOST_ENDED
    assert sum(timer.seconds().values()) == 127 * 3 * MOST_ENDED


@pytest.mark.parametrize("timed", ["cuda"], indirect=True)
def test_on_a_gpu_a_step_counts_once_its_events_have_passed(timed: tuple[PartTimer, Clock]) -> None:
    timer, clock = timed
    step(timer, clock)
    end = clock.now
    step(timer, clock)
    for passed, n_steps in ((end - 1, 0), (end, 1), (clock.now, 2)):
        Event.passed = passed
        assert sum(timer.seconds().values()) == 127 * n_steps


class Slow(FakeCommunicator):
    """Whose collectives take a second each, and whose waits do."""

    clock = Clock()

    def all_reduce(self, flat: Tensor) -> Any:
        work = super().all_reduce(flat)
        wait = work.wait

        def slowly() -> None:
            self.clock.now += 1
            wait()

        work.wait = slowly
        return work

    def all_gather(self, own: Tensor) -> Tensor:
        self.clock.now += 1
        return super().all_gather(own)

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("workers", [1, 2])
def test_all_waits_for_other_processes_are_communication(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(Slow, "clock", clock)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    curvature = Curvature(model, block_size=3)
    curvature.connect(Slow(), worker_grid=WorkerGrid(Slow(2 // workers), Slow(workers)))
    curvature.timer = PartTimer(torch.device("cpu"))
    curvature.timer.begin_step()
    model(torch.randn(4, 6)).square().mean().backward()
    curvature.update()
    curvature.precondition({p: p.grad for p in model.parameters() if p.grad is not None})
    curvature.timer.end_step()
    assert clock.now >= 3  # the agreement, the factors, and inverses or directions
    assert curvature.timer.seconds() == dict.fromkeys(PARTS, 0.0) | {"communication": clock.now}
