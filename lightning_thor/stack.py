"""All blocks of one size, of all layers: one tensor each for their sums, averages and inverses."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

Places = Tensor | slice
"""Which of several blocks, by their numbers."""


class Stack:
    """Window sums and averages of all blocks, ``[n, size, size]``, and the inverses of those that are kept.

    Args:
        sums: where the sums of the open window lie.
        owners: the factor that each block belongs to, ``[n]``.
    """

    def __init__(self, sums: Tensor, owners: Tensor) -> None:
        self.sums = sums
        self.owners = owners
        self.average = torch.zeros_like(sums)
        self._n_kept = len(sums)

    def keep(self, n: int) -> None:
        """Keep inverses of ``n`` blocks, and forget those that there were."""
        self._n_kept = n
        self.__dict__.pop("inverse", None)
        self.__dict__.pop("inverted", None)

    @cached_property
    def inverse(self) -> Tensor:
        """``[kept, size, size]``; not made before it is needed, so that what is not kept never takes memory."""
        identity = torch.eye(self.sums.shape[-1], dtype=self.sums.dtype, device=self.sums.device)
        return identity.repeat(self._n_kept, 1, 1)

    @cached_property
    def inverted(self) -> Tensor:
        """Which of them have ever had an inverse, ``[kept]``; the others have the identity, or its multiple."""
        return torch.zeros(self._n_kept, dtype=torch.bool, device=self.sums.device)

    def take_inverses(
        self,
        place: Places,
        kept: Places,
        solution: tuple[Tensor, Tensor],
        added: Tensor,
        means: Tensor,
        *,
        power: float,
    ) -> Tensor:
        """Put new inverses in their place; no device sync.

        A block that failed keeps its last inverse, or before it ever had one gets the identity over its mean damped
        eigenvalue. One to whose eigenvalues nothing is added was not observed, and keeps what it has.

        Args:
            place: the blocks.
            kept: where their inverses lie among those that are kept.
            solution: ``(inverses [n, size, size], succeeded [n])``.
            added: to the eigenvalues of each factor, ``[factors]``.
            means: of the eigenvalues of each factor, ``[factors]``.
            power: of its mean damped eigenvalue that a block without an inverse has on its diagonal.

        Returns:
            How many blocks failed, of those that had been observed.
        """
        inverse, succeeded = solution
        owners, inverted = self.owners[place], self.inverted[kept]
        own, observed = added[owners], added[owners] > 0
        failed = (observed & ~succeeded).sum()
        succeeded = succeeded & observed
        last_resort = torch.where(observed, (means[owners] + own) ** power, 1.0)
        before = self.inverse[kept]
        # A block that never had an inverse has zeros beside its diagonal.
        diagonal = before.diagonal(dim1=-2, dim2=-1)
        torch.where(inverted[:, None], diagonal, last_resort[:, None], out=diagonal)
        torch.where(succeeded[:, None, None], inverse, before, out=before)
        put(self.inverse, kept, before)
        self.inverted[kept] = inverted | succeeded
        return failed


def put(into: Tensor, place: Places, part: Tensor) -> None:
    """``into[place] = part`` where ``part`` is what lay there, changed: a view of a slice still does."""
    if not isinstance(place, slice):
        into[place] = part


def clear(tensor: Tensor, place: Places) -> None:
    """``tensor[place] = 0``, which would wait for the device where ``place`` is a tensor: a number has to go there."""
    if isinstance(place, slice):
        tensor[place].zero_()
    else:
        tensor.index_fill_(0, place, 0.0)
