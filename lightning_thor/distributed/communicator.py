"""What curvature needs of the processes that train together, whatever connects them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Work(Protocol):
    """A collective that has begun, such as `torch.distributed.Work`."""

    def wait(self) -> Any:
        """Return when the result may be used; on a GPU, by later operations of the current stream."""


class Communicator(Protocol):
    """A group of processes. All of them call the same methods in the same order, with tensors of equal lengths."""

    @property
    def world_size(self) -> int:
        """Number of processes; with 1, no method below is called."""

    @property
    def rank(self) -> int:
        """Number of this process in the group, from 0."""

    def all_reduce(self, flat: Tensor) -> Work:
        """Begin to sum ``flat`` ``[n]`` over the processes, in place; it must not be touched before the wait."""

    def all_gather(self, own: Tensor) -> Tensor:
        """Concatenate ``own`` ``[n]`` of all processes in the order of ranks: ``[world_size * n]``."""

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        """Send a part of ``sent`` to each process, and receive a part from each.

        Args:
            sent: ``[sum(sent_lengths)]``, the parts in the order of ranks.
            sent_lengths: numbers sent to each rank, ``[world_size]``.
            received_lengths: numbers received from each rank, ``[world_size]``.

        Returns:
            The received parts in the order of ranks, ``[sum(received_lengths)]``.
        """


class Done:
    """A collective that was over at once."""

    def wait(self) -> None:
        pass


class SingleProcess:
    """The communicator of a process that trains alone: its collectives change nothing."""

    world_size, rank = 1, 0

    def all_reduce(self, flat: Tensor) -> Work:
        return Done()

    def all_gather(self, own: Tensor) -> Tensor:
        return own

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        return sent


class TimedCommunicator:
    """A communicator whose calls, and waits for them, are within a context that ``measured`` returns."""

    def __init__(self, communicator: Communicator, measured: Callable[[], AbstractContextManager[None]]) -> None:
        self._communicator, self._measured = communicator, measured

    @property
    def world_size(self) -> int:
        return self._communicator.world_size

    @property
    def rank(self) -> int:
        return self._communicator.rank

    def all_reduce(self, flat: Tensor) -> Work:
        with self._measured():
            return _TimedWork(self._communicator.all_reduce(flat), self._measured)

    def all_gather(self, own: Tensor) -> Tensor:
        with self._measured():
            return self._communicator.all_gather(own)

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        with self._measured():
            return self._communicator.all_to_all(sent, sent_lengths, received_lengths)


class _TimedWork(NamedTuple):
    work: Work
    measured: Callable[[], AbstractContextManager[None]]

    def wait(self) -> None:
        with self.measured():
            self.work.wait()


class WorkerGrid(NamedTuple):
    """The row and the column of this process in a grid of all (KAISA: Pauloski et al. 2021, arXiv:2107.01739).

    One row alone stores a layer's inverses; each column has one process of every row.
    """

    inverse_workers: Communicator
    """The row: processes that store the inverses of the same layers and share their inversion."""
    gradient_workers: Communicator
    """The column: processes that send each other the directions of their rows' layers."""
    columns: Sequence[Sequence[int]] | None = None
    """The ranks of all columns, each in the order of rows, where weights are sharded: parts of weights then go to the
    process of the column that stores the layer's inverses, see `lightning_thor.ShardedCurvature`. None where weights
    are whole, and so are the directions that the column sends."""


class UnevenLayout(NamedTuple):
    """Where the parts of all processes, of unequal lengths, are in the result of `all_gather_uneven`."""

    starts: list[int]
    """First number of each rank's part, ``[world_size]``."""
    length: int
    """Numbers in all, padding included."""
    is_gathered: bool
    """Whether parts are padded to one length and gathered, or summed into zeros: whichever sends fewer bytes."""


def uneven_layout(lengths: Sequence[int]) -> UnevenLayout:
    """Lay out one part of each rank, of these ``lengths`` ``[world_size]``; the same on all processes.

    >>> uneven_layout([4, 3])
    UnevenLayout(starts=[0, 4], length=8, is_gathered=True)
    >>> uneven_layout([9, 1, 1])
    UnevenLayout(starts=[0, 9, 10], length=11, is_gathered=False)
    """
    # On a ring an all-gather sends each part once, an all-reduce sends it twice.
    is_gathered = len(lengths) * max(lengths) <= 2 * sum(lengths)
    starts = [rank * max(lengths) if is_gathered else sum(lengths[:rank]) for rank in range(len(lengths))]
    return UnevenLayout(starts, len(lengths) * max(lengths) if is_gathered else sum(lengths), is_gathered)


def all_gather_uneven(own: Tensor, layout: UnevenLayout, communicator: Communicator) -> Tensor:
    """Gather parts of unequal lengths: ``[layout.length]``, bitwise the same on all processes.

    Args:
        own: this process's part, ``[n]``.
        layout: of the parts.
        communicator: several processes.
    """
    length = layout.length // len(layout.starts) if layout.is_gathered else layout.length
    start = 0 if layout.is_gathered else layout.starts[communicator.rank]
    flat = own.new_zeros(length)
    flat[start : start + len(own)] = own
    if layout.is_gathered:
        return communicator.all_gather(flat)
    communicator.all_reduce(flat).wait()
    return flat
