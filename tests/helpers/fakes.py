"""Processes that are not there: an `Communicator` for tests in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_thor.distributed.communicator import WorkerGrid


class Work:
    """A collective under way, of which ``wait`` is what is left to do."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


class Twins:
    """Several processes that do the same at the same time: a sum is a multiple. They share nothing out: a curvature
    that has them needs a ``solve`` of its own."""

    def __init__(self, world_size: int = 2) -> None:
        self.world_size = world_size
        self.rank = 0
        self.log: list[str] = []
        """What happened to sums: ``start N`` and ``wait N``, N numbers long."""
        self.in_backward: list[bool] = []
        """Of each sum, whether it started in backward."""

    def all_reduce(self, flat: Tensor) -> Work:
        self.log.append(f"start {len(flat)}")
        self.in_backward.append(torch._C._current_graph_task_id() != -1)
        summed = flat * self.world_size

        def wait() -> None:
            self.log.append(f"wait {len(flat)}")
            flat.copy_(summed)

        return Work(wait)

    def all_gather(self, own: Tensor) -> Tensor:
        return own.repeat(self.world_size)


class Recorded:
    """One of several processes, which run one after the other: what they send is recorded, then replayed."""

    def __init__(self, world_size: int, rank: int, sent: list[list[Tensor]], replay: bool = False) -> None:
        self.world_size, self.rank, self.replay = world_size, rank, replay
        self._sent, self._calls = sent, 0

    def _all(self, own: Tensor) -> list[Tensor]:
        if not self.replay:
            self._sent[self.rank].append(own.clone())
            return [own] * self.world_size
        torch.testing.assert_close(own, self._sent[self.rank][self._calls], equal_nan=True)
        self._calls += 1
        return [sent[self._calls - 1] for sent in self._sent]

    def all_reduce(self, flat: Tensor) -> Work:
        summed = torch.stack(self._all(flat)).sum(0)

        def wait() -> None:
            flat.copy_(summed)

        return Work(wait)

    def all_gather(self, own: Tensor) -> Tensor:
        return torch.cat(self._all(own))


class Room:
    """Some of several processes, which are threads here: what they give to each other is really exchanged."""

    def __init__(self, n: int) -> None:
        self.given: list[Tensor | None] = [None] * n
        self.barrier = threading.Barrier(n, timeout=60)


class Member:
    """One of them."""

    def __init__(self, room: Room, rank: int) -> None:
        self.world_size, self.rank = len(room.given), rank
        self.log: list[tuple[str, int, torch.dtype]] = []
        """What it gave: the name of the collective, how many numbers, and of which dtype."""
        self._room = room

    def _all(self, name: str, own: Tensor) -> list[Tensor]:
        self.log.append((name, len(own), own.dtype))
        self._room.given[self.rank] = own.clone()
        self._room.barrier.wait()
        given = [tensor for tensor in self._room.given if tensor is not None]
        self._room.barrier.wait()
        assert len({(len(tensor), tensor.dtype) for tensor in given}) == 1
        return given

    def all_reduce(self, flat: Tensor) -> Work:
        summed = torch.stack(self._all("sum", flat)).sum(0)

        def wait() -> None:
            flat.copy_(summed)

        return Work(wait)

    def all_gather(self, own: Tensor) -> Tensor:
        return torch.cat(self._all("gather", own))

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        raise AssertionError("these do not swap")


class Place(NamedTuple):
    """Where one of several processes is."""

    rank: int
    world: Member
    workers: WorkerGrid | None


def on_ranks(n_ranks: int, n_workers: int | None, work: Callable[[Place], Any]) -> list[Any]:
    """What ``work`` gives on each of several processes, as threads; ``n_workers`` of them keep a layer's inverses."""
    n_groups = n_ranks // (n_workers or n_ranks)
    world = Room(n_ranks)
    groups = [Room(n_ranks // n_groups) for _ in range(n_groups)]
    receivers = [Room(n_groups) for _ in range(n_ranks // n_groups)]
    results: list[Any] = [None] * n_ranks

    def run(rank: int) -> None:
        place, group = divmod(rank, n_groups)
        workers = WorkerGrid(Member(groups[group], place), Member(receivers[place], group))
        try:
            results[rank] = work(Place(rank, Member(world, rank), None if n_workers is None else workers))
        except BaseException as error:
            results[rank] = error
            for room in (world, *groups, *receivers):
                room.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, BaseException)]
    # The others only say that the barrier was broken.
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return results


class Threads:
    """One of several threads of this process, which swap; `run_in_threads` starts them."""

    def __init__(self, world_size: int, rank: int, swapped: list[list[Tensor]], barrier: threading.Barrier) -> None:
        self.world_size, self.rank = world_size, rank
        self._swapped, self._barrier = swapped, barrier
        self.n_sent: list[int] = []
        """How many numbers went to others, of each swap."""

    def all_reduce(self, flat: Tensor) -> Work:
        raise AssertionError("these only swap")

    def all_gather(self, own: Tensor) -> Tensor:
        raise AssertionError("these only swap")

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        assert sent_lengths[self.rank] == 0
        self.n_sent.append(len(sent))
        self._swapped[self.rank] = list(sent.split(list(sent_lengths)))
        self._barrier.wait()
        received = [parts[self.rank] for parts in self._swapped]
        assert [len(part) for part in received] == list(received_lengths)
        self._barrier.wait()
        return torch.cat(received)


def run_in_threads(n: int, work: Callable[[Threads], None]) -> list[Threads]:
    """``work`` of each of ``n`` threads, to its end; an error in one of them ends all."""
    swapped: list[list[Tensor]] = [[] for _ in range(n)]
    barrier, errors = threading.Barrier(n, timeout=60), []
    threads = [Threads(n, own, swapped, barrier) for own in range(n)]

    def guarded(one: Threads) -> None:
        try:
            work(one)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    running = [threading.Thread(target=guarded, args=(one,)) for one in threads]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise next((one for one in errors if not isinstance(one, threading.BrokenBarrierError)), errors[0])
    return threads
