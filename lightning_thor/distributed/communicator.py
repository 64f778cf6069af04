"""What curvature asks of the processes that train together; nothing here knows how they are connected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Work(Protocol):
    """A collective that has begun, such as `torch.distributed.Work`."""

    def wait(self) -> Any:
        """Return when its result may be used; on a GPU, by what follows on the current stream."""


class Communicator(Protocol):
    """A group of processes. All of them call the same methods in the same order, with tensors of the same length."""

    @property
    def world_size(self) -> int:
        """Number of processes; with 1, nothing below is called."""

    @property
    def rank(self) -> int:
        """Number of this process in the group, from 0."""

    def all_reduce(self, flat: Tensor) -> Work:
        """Begin to sum ``flat`` over the processes, in place.

        Args:
            flat: ``[n]``; not to be touched before the wait.

        Returns:
            The collective under way.
        """

    def all_gather(self, own: Tensor) -> Tensor:
        """``own`` of every process, one after the other.

        Args:
            own: ``[n]``.

        Returns:
            ``[world_size * n]``, in the order of ranks.
        """

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        """Send each process its part of ``sent``, and receive the part that each has for this one.

        Args:
            sent: one-dimensional, the parts in the order of ranks.
            sent_lengths: numbers sent to each rank.
            received_lengths: numbers received from each rank.

        Returns:
            The received parts, in the order of ranks, ``[sum(received_lengths)]``.
        """


class Done:
    """A collective that was over at once."""

    def wait(self) -> None:
        """Return."""


class SingleProcess:
    """The communicator of a process that trains alone."""

    world_size = 1
    rank = 0

    def all_reduce(self, flat: Tensor) -> Work:
        """Leave ``flat`` as it is."""
        return Done()

    def all_gather(self, own: Tensor) -> Tensor:
        """Return ``own``."""
        return own

    def all_to_all(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        """Return ``sent``."""
        return sent


class WorkerGrid(NamedTuple):
    """The row and the column of one process in a grid of all of them (KAISA: Pauloski et al. 2021, arXiv:2107.01739).

    A layer's inverses are stored on one row alone; each column has one process of every row.
    """

    inverse_workers: Communicator
    """The row: processes that store the inverses of the same layers and share out their inversion."""
    gradient_workers: Communicator
    """The column: processes that send each other the directions of their rows' layers."""


class UnevenLayout(NamedTuple):
    """Where parts of unequal lengths, one of each process, lie in what `all_gather_uneven` returns."""

    starts: list[int]
    """First number of each rank's part."""
    length: int
    """Numbers in all, padding included."""
    is_gathered: bool
    """Whether all parts are padded to one length and gathered, or summed into zeros: whichever sends fewer bytes."""


def uneven_layout(lengths: Sequence[int]) -> UnevenLayout:
    """The layout of parts with these ``lengths``.

    Args:
        lengths: numbers in the part of each rank.

    Returns:
        The layout, the same on all processes.

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
    """The parts of all processes.

    Args:
        own: this process's part, one-dimensional.
        layout: see `uneven_layout`.
        communicator: of several processes.

    Returns:
        ``[layout.length]``, the same on all processes.
    """
    length = layout.length // len(layout.starts) if layout.is_gathered else layout.length
    start = 0 if layout.is_gathered else layout.starts[communicator.rank]
    flat = own.new_zeros(length)
    flat[start : start + len(own)] = own
    if layout.is_gathered:
        return communicator.all_gather(flat)
    communicator.all_reduce(flat).wait()
    return flat
