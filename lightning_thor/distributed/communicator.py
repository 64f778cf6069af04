"""What curvature asks of the processes that train together; it knows neither ranks nor how they are connected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

Wait = Callable[[], None]


class Exchange(Protocol):
    """All processes call the same methods in the same order, with tensors of the same length."""

    @property
    def n_shares(self) -> int:
        """How many processes there are; with 1, nothing below is called."""

    @property
    def own_share(self) -> int:
        """Which of them this one is, counted from 0."""

    def start_sum(self, flat: Tensor, n_exact: int = 0) -> Wait:
        """Begin to add up ``flat`` over the processes, in place; what is returned waits for it.

        Args:
            flat: one-dimensional; not to be touched before the wait.
            n_exact: of how many numbers at the end the sum must not be rounded to fewer digits.
        """

    def gather(self, own: Tensor) -> Tensor:
        """``own`` of every process, one after the other: ``[n]`` to ``[n_shares * n]``."""

    def swap(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        """Give each process its part of ``sent``, and get what each of them has for this one.

        Args:
            sent: one-dimensional, the parts in the order of the processes.
            sent_lengths: how many numbers each process gets.
            received_lengths: how many each gives to this one.

        Returns:
            What they give, in the order of the processes.
        """


class Alone:
    """One process."""

    n_shares = 1
    own_share = 0

    def start_sum(self, flat: Tensor, n_exact: int = 0) -> Wait:
        """Nothing is to be added."""
        return lambda: None

    def gather(self, own: Tensor) -> Tensor:
        """``own``."""
        return own

    def swap(self, sent: Tensor, sent_lengths: Sequence[int], received_lengths: Sequence[int]) -> Tensor:
        """``sent``."""
        return sent


class Workers(NamedTuple):
    """The places of one process in a grid of them, for keeping a layer's inverses on some processes alone.

    The processes of a group keep the inverses of the same layers. Each group has one process in every set of receivers.
    """

    inversions: Exchange
    """Its group, which shares the inversions of its layers out."""
    directions: Exchange
    """Its receivers, one of each group, which give each other the directions of their layers."""


class Parts(NamedTuple):
    """How the parts lie in what is brought to all."""

    starts: list[int]
    """Where the part of each process begins."""
    length: int
    """How many numbers are brought to all."""
    gathers: bool
    """Whether all parts are gathered at one length, or summed into zeros: whatever takes fewer bytes."""


def parts_of(lengths: Sequence[int]) -> Parts:
    """How parts of these ``lengths``, one for each process, are best brought to all.

    >>> parts_of([4, 3])
    Parts(starts=[0, 4], length=8, gathers=True)
    >>> parts_of([9, 1, 1])
    Parts(starts=[0, 9, 10], length=11, gathers=False)
    """
    # On a ring an all-gather moves what it gives once, an all-reduce moves it twice.
    gathers = len(lengths) * max(lengths) <= 2 * sum(lengths)
    starts = [share * max(lengths) if gathers else sum(lengths[:share]) for share in range(len(lengths))]
    return Parts(starts, len(lengths) * max(lengths) if gathers else sum(lengths), gathers)


def bring_to_all(own: Tensor, parts: Parts, exchange: Exchange) -> Tensor:
    """The parts of all processes, ``[parts.length]``; the same on all of them.

    Args:
        own: this process's part, one-dimensional.
        parts: see `parts_of`.
        exchange: the processes; several.
    """
    length = parts.length // len(parts.starts) if parts.gathers else parts.length
    start = 0 if parts.gathers else parts.starts[exchange.own_share]
    flat = own.new_zeros(length)
    flat[start : start + len(own)] = own
    if parts.gathers:
        return exchange.gather(flat)
    exchange.start_sum(flat, n_exact=length)()
    return flat
