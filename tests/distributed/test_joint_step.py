"""Laws of the step that processes agree on after a signal, whenever each of them is told and begins its steps."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightning_thor.distributed import joint_step
from lightning_thor.distributed.joint_step import SECONDS_ALONE, JointStep


class Ranks:
    """Processes in one, each with a `JointStep`, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.clock, self.rank, store = 0.0, 0, dist.HashStore()
        monkeypatch.setattr(joint_step, "is_distributed", lambda: True)
        monkeypatch.setattr(joint_step, "_get_default_store", lambda: store)
        monkeypatch.setattr(joint_step, "time", SimpleNamespace(monotonic=lambda: self.clock))
        monkeypatch.setattr(dist, "get_rank", lambda: self.rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: n)
        self.steps: list[JointStep] = []
        for _ in range(n):
            monkeypatch.setattr(joint_step, "_numbers", itertools.count())
            self.steps.append(JointStep())

    def begins(self, rank: int, n_ahead: int = 1, device: torch.device | None = None) -> JointStep:
        self.rank = rank
        self.steps[rank].begins(n_ahead, *([] if device is None else [device]))
        return self.steps[rank]


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("seconds", [0.01, 4.0, 60.0])
def test_all_agree_however_long_a_step_takes(
    seconds: float, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(30):
        draw = random.Random(seed)
        ranks = Ranks(monkeypatch, draw.choice([2, 3]))
        n = len(ranks.steps)
        told_at = [10 * seconds + draw.uniform(0, 0.9 * SECONDS_ALONE) for _ in range(n)]
        begun, due = [0] * n, [0] * n
        while not all(due):
            # The last micro-batch of a window does not end before all have begun it.
            free = [i for i in range(n) if begun[i] // micro_batches * micro_batches <= min(begun) and not due[i]]
            rank = draw.choice(free)
            ranks.clock += draw.uniform(0, 2 * seconds / n / micro_batches)
            for one, at in zip(ranks.steps, told_at, strict=True):
                if at <= ranks.clock:
                    one.tell()
            begun[rank] += 1
            step = ranks.begins(rank, micro_batches)
            assert not step.is_alone
            if step.is_due:
                due[rank] = begun[rank]
        assert len(set(due)) == 1


def test_a_process_that_alone_is_told_finds_out_after_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 2)
    ranks.steps[1].tell()
    ranks.clock = 1000.0  # in which nothing began
    for second in range(30):
        ranks.clock += 1.0
        assert not ranks.begins(0).is_alone
        assert ranks.begins(1).is_alone == (second > SECONDS_ALONE + 3)


def test_a_device_is_waited_for_before_others_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its host may have begun many steps that the others' devices have not.
    ranks, device, waits = Ranks(monkeypatch, 2), torch.device("cuda"), list[torch.device]()
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(synchronize=waits.append))
    ranks.begins(1, device=device)
    assert not waits
    ranks.steps[0].tell()
    ranks.steps[1].tell()
    assert not ranks.begins(1, device=device).is_due
    assert waits == [device]
    assert not ranks.begins(0, device=device).is_due
    assert ranks.begins(0, device=device).is_due


@pytest.mark.parametrize("n_steps", range(1, 6))
def test_none_is_due_after_the_first_process_has_no_more_steps(n_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(50):
        draw = random.Random(seed)
        ranks = Ranks(monkeypatch, 2)
        told_at, begun, is_over = [draw.randrange(6) for _ in range(2)], [0, 0], [False, False]
        while not all(is_over):
            rank = draw.choice([i for i in range(2) if not is_over[i]])  # none waits for another one
            step = ranks.steps[rank]
            if begun[rank] >= told_at[rank]:
                step.tell()
            if begun[rank] < n_steps:
                begun[rank] += 1
                ranks.begins(rank)
            else:
                step.ends()
            is_over[rank] = step.is_due or (begun[rank] == n_steps and draw.random() < 0.5)
            if is_over[rank] and not step.is_due:
                step.ends()
        assert ranks.steps[0].is_due == ranks.steps[1].is_due
