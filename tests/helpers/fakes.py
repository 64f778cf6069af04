"""A `Communicator` for tests in one process: its ranks are threads, or twins that are not there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_thor.distributed.communicator import WorkerGrid


class Work:
    """A collective under way; ``wait`` finishes it."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


class Room:
    """Where ``n`` threads exchange what they send."""

    def __init__(self, n: int) -> None:
        self.sent: list[Any] = [None] * n
        self.barrier = threading.Barrier(n, timeout=60)


class FakeCommunicator:
    """One of ``world_size`` ranks, with a log of what it sends.

    Args:
        world_size: number of ranks.
        rank: number of this one.
        room: of the threads that are the other ranks (see `on_ranks`); None: they send what this one sends.
    """

    def __init__(self, world_size: int = 2, rank: int = 0, room: Room | None = None) -> None:
        self.world_size, self.rank, self._room = world_size, rank, room
        self.log: list[tuple[str, int]] = []
        """Each collective and its numel, in order; ``("wait", numel)`` where the result of an all-reduce is used."""
        self.dtypes: list[torch.dtype] = []
        """Of each collective."""
        self.in_backward: list[bool] = []
        """Of each all-reduce: whether it started in backward."""

    def _exchange(self, op: str, own: Tensor, sent: Any) -> list[Any]:
        """``sent`` by each rank, in their order."""
        self.log.append((op, own.numel()))
        self.dtypes.append(own.dtype)
        if self._room is None:
            return [sent] * self.world_size
        self._room.sent[self.rank] = sent
        self._room.barrier.wait()
        everyones = list(self._room.sent)
        self._room.barrier.wait()
        return everyones

    def all_reduce(self, flat: Tensor) -> Work:
        self.in_backward.append(torch._C._current_graph_task_id() != -1)
        summed = torch.stack(self._exchange("all_reduce", flat, flat.clone())).sum(0)

        def wait() -> None:
            self.log.append(("wait", flat.numel()))
            flat.copy_(summed)

        return Work(wait)

    def all_gather(self, own: Tensor) -> Tensor:
        return torch.stack(self._exchange("all_gather", own, own.clone())).flatten()

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        assert sent_lengths[self.rank] == 0
        everyones = self._exchange("all_to_all", sent, sent.split(list(sent_lengths)))
        received = [parts[self.rank] for parts in everyones]
        assert [len(part) for part in received] == list(received_lengths)
        return torch.cat(received)


class Place(NamedTuple):
    """Where one of several ranks is."""

    rank: int
    world: FakeCommunicator
    workers: WorkerGrid | None


def on_ranks(n_ranks: int, n_workers: int | None, work: Callable[[Place], Any]) -> list[Any]:
    """Results of ``work`` on each of several ranks, as threads; an error on one of them ends all.

    Args:
        n_ranks: number of threads.
        n_workers: number of ranks that store a layer's inverses; None: there is no grid of workers.
        work: called with the place of each rank.
    """
    n_groups = n_ranks // (n_workers or n_ranks)
    world = Room(n_ranks)
    rows = [Room(n_ranks // n_groups) for _ in range(n_groups)]
    columns = [Room(n_groups) for _ in range(n_ranks // n_groups)]
    results: list[Any] = [None] * n_ranks

    def run(rank: int) -> None:
        column, row = divmod(rank, n_groups)
        grid = WorkerGrid(
            FakeCommunicator(len(columns), column, rows[row]), FakeCommunicator(n_groups, row, columns[column])
        )
        try:
            results[rank] = work(
                Place(rank, FakeCommunicator(n_ranks, rank, world), None if n_workers is None else grid)
            )
        except BaseException as error:
            results[rank] = error
            for room in (world, *rows, *columns):
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
