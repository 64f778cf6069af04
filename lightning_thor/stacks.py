"""The factors of all layers as stacks: all blocks of one size, of all layers, in one tensor.

The sums of an open window lie in one flat buffer, so that one all-reduce carries them; the blocks of one size are one
slice of it, so that averaging and inversion are a few batched operations whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_thor.blocks import Blocks
from lightning_thor.damping import DampingRule, split_damping
from lightning_thor.inverse import damped_inverses, traces


class Stack:
    """All blocks of one size: their window sums, averages and inverses, each ``[n, size, size]``."""

    def __init__(self, sums: Tensor, owners: Tensor) -> None:
        self.sums = sums
        self.owners = owners
        self.average = torch.zeros_like(sums)
        self.inverse = torch.eye(sums.shape[-1], dtype=sums.dtype, device=sums.device).repeat(len(sums), 1, 1)
        self.inverted = torch.zeros(len(sums), dtype=torch.bool, device=sums.device)
        """Which blocks have ever had an inverse; the others have the identity, or its multiple."""


class FactorStacks:
    """Factors of layers 0, 1, ...: layer ``i`` has A as factor ``2 i`` and G as factor ``2 i + 1``.

    Args:
        cuts: ``(A, G)`` of each layer; A is None where there is no input factor.
        dtype: of everything here, at least float32.
        device: of everything here.
    """

    def __init__(self, cuts: Sequence[tuple[Blocks | None, Blocks]], dtype: torch.dtype, device: torch.device) -> None:
        factors = [factor for cut in cuts for factor in cut]
        by_size: dict[int, list[int]] = {}
        for index, blocks in enumerate(factors):
            if blocks is not None:
                by_size.setdefault(blocks.size, []).append(index)
        lengths = {
            size: sum(_n_blocks(factors[index]) for index in members) * size * size for size, members in by_size.items()
        }
        self.dtype = dtype
        self._factors = factors
        self.flat_sums = torch.zeros(sum(lengths.values()) + 2 * len(cuts), dtype=dtype, device=device)
        """What is summed over micro-batches and ranks: blocks by size, then rows and samples of each layer."""
        *segments, counts = self.flat_sums.split([*lengths.values(), 2 * len(cuts)])
        self.counts = counts.view(len(cuts), 2)
        self.stacks: dict[int, Stack] = {}
        self._slots: dict[int, tuple[int, slice]] = {}
        for (size, members), segment in zip(by_size.items(), segments, strict=True):
            owners = [index for index in members for _ in range(_n_blocks(factors[index]))]
            self.stacks[size] = Stack(segment.view(-1, size, size), torch.tensor(owners, device=device))
            start = 0
            for index in members:
                stop = start + _n_blocks(factors[index])
                self._slots[index] = size, slice(start, stop)
                start = stop
        widths = [1 if blocks is None else blocks.groups * blocks.width for blocks in factors]
        self._widths = torch.tensor(widths, dtype=dtype, device=device)
        self._has_A = torch.tensor([A is not None for A, _ in cuts], dtype=torch.bool, device=device)
        self.updates = torch.zeros(len(cuts), dtype=dtype, device=device)
        """How many windows each layer's average holds."""
        self.positions = torch.ones(len(cuts), dtype=dtype, device=device)
        """Rows per sample of each layer, as last seen."""
        self.failed_inversions = torch.zeros((), dtype=torch.int64, device=device)
        self.rejected_windows = torch.zeros((), dtype=torch.int64, device=device)

    def blocks_of(self, factor: int, kind: str) -> Tensor:
        """View of one factor's ``"sums"``, ``"average"`` or ``"inverse"``: ``[groups, n_blocks, size, size]``."""
        size, place = self._slots[factor]
        tensor: Tensor = getattr(self.stacks[size], kind)
        blocks = self._factors[factor]
        assert blocks is not None
        return tensor[place].view(blocks.shape)

    def inverted_of(self, factor: int) -> Tensor:
        """View of which blocks of a factor have ever been inverted: ``[groups * n_blocks]``."""
        size, place = self._slots[factor]
        return self.stacks[size].inverted[place]

    def average_window(self, averaging: float) -> None:
        """Take the window's sums into the averages, and clear them; no device sync.

        A layer that was silent, or whose statistics are not finite, keeps its average (the latter is counted). The
        n-th window has the weight ``(1 - averaging) / (1 - averaging ** n)``: an exponential average without bias.
        """
        n_rows, n_samples = self.counts.unbind(1)
        # E over rows for A, E over samples of the sum over positions for G: then A (x) G is the Fisher matrix's scale.
        per_factor = torch.stack([n_rows, n_samples], dim=1).flatten().clamp_min(1.0)
        sums = self._factor_traces("sums")
        # A covariance has a number that is not finite only if its diagonal has one, so its trace tells.
        finite = torch.isfinite(sums).view(-1, 2).all(1) & torch.isfinite(self.counts).all(1)
        taken = finite & (n_rows > 0)
        self.rejected_windows += (~finite).sum()
        updates = self.updates + taken
        weight = (1.0 - averaging) / (1.0 - averaging ** updates.clamp_min(1.0))
        self.positions.copy_(torch.where(taken, n_rows / n_samples.clamp_min(1.0), self.positions))
        self.updates.copy_(updates)
        weight, taken = weight.repeat_interleave(2), taken.repeat_interleave(2)
        for stack in self.stacks.values():
            batch = stack.sums / per_factor[stack.owners, None, None]
            # where, not a weight of 0: what is left out may not be finite.
            batch = torch.where(taken[stack.owners, None, None], batch, stack.average)
            stack.average.lerp_(batch, weight[stack.owners, None, None])
        self.flat_sums.zero_()

    def invert(self, rule: DampingRule, damping: float) -> None:
        """New inverses of all averages; no device sync.

        A block that fails keeps its last inverse, or before it ever had one gets the identity over its mean damped
        eigenvalue; the failure is counted. Layers that were never observed keep the identity.
        """
        mean_A, mean_G = (self._factor_traces("average") / self._widths).view(-1, 2).unbind(1)
        damping_A, damping_G = split_damping(rule, damping, mean_A, mean_G, self.positions)
        if rule != "trace":
            damping_G = torch.where(self._has_A, damping_G, damping)
        dampings = torch.stack([damping_A, damping_G], dim=1).flatten()
        means = torch.stack([mean_A, mean_G], dim=1).flatten()
        # A factor of zeros (a dead layer) says nothing: under the trace rule its damping is zero too.
        observed = (self.updates > 0).repeat_interleave(2) & (dampings > 0)
        for stack in self.stacks.values():
            own, observable = dampings[stack.owners], observed[stack.owners]
            inverse, succeeded = damped_inverses(stack.average, own)
            self.failed_inversions += (observable & ~succeeded).sum()
            succeeded &= observable
            last_resort = torch.where(observable, 1.0 / (means[stack.owners] + own), 1.0)
            identity = torch.eye(inverse.shape[-1], dtype=inverse.dtype, device=inverse.device)
            kept = torch.where(stack.inverted[:, None, None], stack.inverse, identity * last_resort[:, None, None])
            stack.inverse.copy_(torch.where(succeeded[:, None, None], inverse, kept))
            stack.inverted |= succeeded

    def n_bytes(self, factor: int) -> int:
        """Memory of one factor: window sums, average and inverse, in bytes."""
        blocks = self._factors[factor]
        return 0 if blocks is None else 3 * _n_blocks(blocks) * blocks.size**2 * self.flat_sums.element_size()

    def _factor_traces(self, kind: str) -> Tensor:
        total = torch.zeros(len(self._factors), dtype=self.dtype, device=self.flat_sums.device)
        for stack in self.stacks.values():
            total.index_add_(0, stack.owners, traces(getattr(stack, kind)))
        return total


def _n_blocks(blocks: Blocks | None) -> int:
    return 0 if blocks is None else blocks.groups * blocks.n_blocks
