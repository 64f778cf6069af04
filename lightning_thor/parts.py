"""Parts of unequal lengths, one of each process, brought to all of them by one message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_thor.exchange import Exchange


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
