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
