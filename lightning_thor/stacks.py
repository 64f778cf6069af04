"""The factors of all layers as stacks: all blocks of one size, of all layers, in one tensor.

The sums of an open window lie in one flat buffer; the blocks of one size are one slice of it, so that averaging and
inversion, and packing for the way to other processes, are a few batched operations whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_thor.blocks import Blocks, diagonal_as_blocks
from lightning_thor.damping import DampingRule, split_damping
from lightning_thor.inverse import traces
from lightning_thor.triangles import n_packed, pack, unpack

Solve = Callable[[Mapping[int, tuple[Tensor, Tensor]]], Mapping[int, tuple[Tensor, Tensor]]]
"""By block size: ``(blocks, damping)`` to ``(inverses, succeeded)``."""


MULTIPLICATIONS_PER_NUMBER = 30.0
"""How many of them, in a matrix product, take the time of reading a number a few times over (a core of an AMD EPYC)."""


class Stack:
    """All blocks of one size: their window sums, averages and inverses, each ``[n, size, size]``."""

    def __init__(self, sums: Tensor, owners: Tensor) -> None:
        self.sums = sums
        self.owners = owners
        self.average = torch.zeros_like(sums)
        self.inverse = torch.eye(sums.shape[-1], dtype=sums.dtype, device=sums.device).repeat(len(sums), 1, 1)
        self.inverted = torch.zeros(len(sums), dtype=torch.bool, device=sums.device)
        """Which blocks have ever had an inverse; the others have the identity, or its multiple."""


class Selection(NamedTuple):
    """Some of the layers: where their counts and, unless they are only probed, their blocks lie."""

    layers: Tensor | slice
    places: dict[int, Tensor | slice]
    """By block size: which blocks of the stack."""


class FactorStacks:
    """Factors of layers 0, 1, ...: layer ``i`` has A as factor ``2 i`` and G as factor ``2 i + 1``.

    Args:
        cuts: ``(A, G)`` of each layer; A is None where there is no input factor.
        dtype: of everything here, at least float32.
        device: of everything here.
        folds: ``(table, output)``: layers whose weight is the same one ``[vocabulary, width]``, an embedding's and a
            linear layer's; see `_folded`.
        roots: keep a root W, with ``WᵀW`` the inverse, wherever an inverse is spoken of here.
    """

    def __init__(
        self,
        cuts: Sequence[tuple[Blocks | None, Blocks]],
        dtype: torch.dtype,
        device: torch.device,
        folds: Sequence[tuple[int, int]] = (),
        *,
        roots: bool = False,
    ) -> None:
        factors = [factor for cut in cuts for factor in cut]
        by_size: dict[int, list[int]] = {}
        for index, blocks in enumerate(factors):
            if blocks is not None:
                by_size.setdefault(blocks.size, []).append(index)
        lengths = {
            size: sum(_n_blocks(factors[index]) for index in members) * size * size for size, members in by_size.items()
        }
        self.dtype = dtype
        self.roots = roots
        self._factors = factors
        self._folds = folds
        self.flat_sums = torch.zeros(sum(lengths.values()) + 4 * len(cuts), dtype=dtype, device=device)
        """What is summed over micro-batches and processes: blocks by size, then what is counted of each layer."""
        *segments, counts = self.flat_sums.split([*lengths.values(), 4 * len(cuts)])
        self.counts = counts.view(len(cuts), 4)
        """Of each layer: rows, samples, and the traces of A and of G if it is only probed; else how many numbers its
        inputs and gradients had, and where in backward it came (see `lightning_thor.window`)."""
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
        self._selections: dict[tuple[tuple[int, ...], tuple[int, ...]], Selection] = {}

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

    def select(self, layers: tuple[int, ...], probed: tuple[int, ...] = ()) -> Selection:
        """Where ``layers`` lie, and others that are only ``probed``; remembered, since the same ones come again."""
        if (layers, probed) not in self._selections:
            places: dict[int, list[int]] = {}
            for factor in (factor for layer in layers for factor in (2 * layer, 2 * layer + 1)):
                if factor in self._slots:
                    size, place = self._slots[factor]
                    places.setdefault(size, []).extend(range(place.start, place.stop))
            self._selections[layers, probed] = Selection(
                self._index(sorted(layers + probed)),
                {size: self._index(sorted(blocks)) for size, blocks in places.items()},
            )
        return self._selections[layers, probed]

    def _index(self, numbers: list[int]) -> Tensor | slice:
        """A slice where that is possible: it copies nothing."""
        start, stop = numbers[0], numbers[-1] + 1
        if stop - start == len(numbers):
            return slice(start, stop)
        return torch.tensor(numbers, device=self.flat_sums.device)

    def window_of(self, selection: Selection) -> Tensor:
        """The open window of some layers as one flat tensor that may travel: a triangle of each block, then counts."""
        blocks = [pack(self.stacks[size].sums[place]).flatten() for size, place in selection.places.items()]
        return torch.cat([*blocks, self.counts[selection.layers].flatten()])

    def set_window_(self, selection: Selection, flat: Tensor) -> None:
        """Put what `window_of` gave, after it was summed, in the place of those layers' window."""
        counts = self.counts[selection.layers]
        lengths = [len(self.stacks[size].owners[place]) * n_packed(size) for size, place in selection.places.items()]
        *parts, summed = flat.split([*lengths, counts.numel()])
        for (size, place), part in zip(selection.places.items(), parts, strict=True):
            self.stacks[size].sums[place] = unpack(part.view(-1, n_packed(size)), size)
        self.counts[selection.layers] = summed.view(counts.shape)

    def n_travelling_bytes(self, layer: int) -> int:
        """How many bytes `window_of` takes for one layer."""
        both = [blocks for blocks in self._factors[2 * layer : 2 * layer + 2] if blocks is not None]
        numbers = sum(_n_blocks(blocks) * n_packed(blocks.size) for blocks in both) + len(self.counts[layer])
        return numbers * self.flat_sums.element_size()

    def probe(
        self, probed: tuple[int, ...], averaging: float, rule: DampingRule, damping: float
    ) -> tuple[Tensor, Tensor]:
        """tr(F + λI) of the probed layers as it is, and as the open window would make it; their window is cleared.

        As in the paper tr(A ⊗ G) = tr A · tr G; λ is the product of what is added to A and to G, which under the
        absolute rules is the damping itself. No device sync.

        Returns:
            Two tensors ``[probed]``. The first is 0 for a layer that has no curvature yet, the second not finite where
            the window is not, or where there is none.
        """
        selection = self.select(probed)
        layers = selection.layers
        n_rows, n_samples, squares_A, squares_G = self.counts[layers].unbind(1)
        averages = {size: stack.average for size, stack in self.stacks.items()}
        old = self._factor_traces(averages, selection).view(-1, 2)[layers]
        tiny = torch.finfo(self.dtype).tiny
        means = torch.stack([squares_A / n_rows.clamp_min(tiny), squares_G / n_samples.clamp_min(tiny)], dim=1)
        self.rejected_windows += (~torch.isfinite(means).all(1)).sum()
        new = old.lerp(means, _weight(averaging, self.updates[layers] + 1.0)[:, None])
        none, silent = self.updates[layers] == 0, n_rows == 0
        self.counts[layers] = 0.0
        traces = [self._damped_trace(trace, layers, rule, damping) for trace in (old, new)]
        return torch.where(none, 0.0, traces[0]), torch.where(silent, torch.nan, traces[1])

    def _damped_trace(self, trace: Tensor, layers: Tensor | slice, rule: DampingRule, damping: float) -> Tensor:
        """tr(F + λI) from the traces of A and of G, ``[n, 2]``."""
        widths, has_A = self._widths.view(-1, 2)[layers], self._has_A[layers]
        added = self._dampings(trace / widths, layers, rule, damping)
        parts = torch.stack([trace, widths * added], dim=1)
        # A layer without A has the diagonal of its own Fisher matrix as G.
        return torch.where(has_A[:, None], parts[..., 0], 1.0).mul(parts[..., 1]).sum(1)

    def _dampings(self, means: Tensor, layers: Tensor | slice, rule: DampingRule, damping: float) -> Tensor:
        """What is added to the eigenvalues of A and of G whose means these are, both ``[n, 2]``."""
        added_A, added_G = split_damping(rule, damping, means[:, 0], means[:, 1], self.positions[layers])
        if rule != "trace":
            added_G = torch.where(self._has_A[layers], added_G, damping)
        return torch.stack([added_A, added_G], dim=1)

    def average_window(self, selection: Selection, averaging: float) -> None:
        """Take the window's sums of the selected layers into their averages, and clear them; no device sync.

        A layer that was silent, or whose statistics are not finite, keeps its average (the latter is counted). The
        n-th window has the weight ``(1 - averaging) / (1 - averaging ** n)``: an exponential average without bias.
        """
        n_rows, n_samples = self.counts[:, :2].unbind(1)
        # A silent layer has no rows, and one of which few were taken less than a sample.
        tiny = torch.finfo(self.dtype).tiny
        # E over rows for A, E over samples of the sum over positions for G: then A (x) G is the Fisher matrix's scale.
        per_factor = torch.stack([n_rows, n_samples], dim=1).flatten().clamp_min(tiny)
        sums = self._factor_traces({size: stack.sums for size, stack in self.stacks.items()}, selection)
        # A covariance has a number that is not finite only if its diagonal has one, so its trace tells.
        finite = torch.isfinite(sums).view(-1, 2).all(1) & torch.isfinite(self.counts).all(1)
        taken = finite & (n_rows > 0)
        self.rejected_windows += (~finite).sum()
        updates = self.updates + taken
        weight = _weight(averaging, updates.clamp_min(1.0))
        self.positions.copy_(torch.where(taken, n_rows / n_samples.clamp_min(tiny), self.positions))
        self.updates.copy_(updates)
        weight, taken = weight.repeat_interleave(2), taken.repeat_interleave(2)
        for size, place in selection.places.items():
            stack = self.stacks[size]
            # Views where the place is a slice: their own memory takes all that follows.
            owners, average, batch = stack.owners[place], stack.average[place], stack.sums[place]
            batch.div_(per_factor[owners, None, None])
            # where, not a weight of 0: what is left out may not be finite.
            torch.where(taken[owners, None, None], batch, average, out=batch)
            average.lerp_(batch, weight[owners, None, None])
            _put(stack.average, place, average)
            stack.sums[place] = 0.0
        self.counts.zero_()

    def invert(self, selection: Selection, rule: DampingRule, damping: float, solve: Solve) -> None:
        """New inverses of the selected layers' averages; no device sync.

        A block that fails keeps its last inverse, or before it ever had one gets the identity over its mean damped
        eigenvalue; the failure is counted. Layers that were never observed keep the identity.

        Args:
            selection: the layers.
            rule, damping: what is added to eigenvalues, see `split_damping`.
            solve: what inverts: `damped_inverses` for each size, or `lightning_thor.shares.SharedInversions`.
        """
        averages, updates = self._folded()
        means = self._factor_traces(averages, selection) / self._widths
        dampings = self._dampings(means.view(-1, 2), slice(None), rule, damping).flatten()
        # A factor of zeros (a dead layer) says nothing: under the trace rule its damping is zero too.
        observed = (updates > 0).repeat_interleave(2) & (dampings > 0)
        problems = {
            size: (averages[size][place], dampings[self.stacks[size].owners[place]])
            for size, place in selection.places.items()
        }
        solutions = solve(problems)
        for size, place in selection.places.items():
            stack, (inverse, succeeded) = self.stacks[size], solutions[size]
            owners, inverted = stack.owners[place], stack.inverted[place]
            own, observable = dampings[owners], observed[owners]
            self.failed_inversions += (observable & ~succeeded).sum()
            succeeded = succeeded & observable
            last_resort = torch.where(observable, (means[owners] + own) ** (-0.5 if self.roots else -1.0), 1.0)
            kept = stack.inverse[place]
            # A block that never had an inverse has zeros beside its diagonal.
            diagonal = kept.diagonal(dim1=-2, dim2=-1)
            torch.where(inverted[:, None], diagonal, last_resort[:, None], out=diagonal)
            torch.where(succeeded[:, None, None], inverse, kept, out=kept)
            _put(stack.inverse, place, kept)
            stack.inverted[place] = inverted | succeeded

    def refresh_costs(self, n_rows: Sequence[float], n_numbers: Sequence[float]) -> list[float]:
        """About how many multiplications a refresh of each layer takes: covariance of its rows, inversions, and passes
        over what they are taken from, by which alone a norm has its price.

        Args:
            n_rows: rows that each layer's covariance is taken of.
            n_numbers: how many numbers its inputs and gradients had.
        """
        # A Cholesky factorisation and the inverse from it run at a fraction of a matrix product's rate: about a third.
        costs = [
            0.0 if blocks is None else _n_blocks(blocks) * (n_rows[index // 2] * blocks.size**2 + 3.0 * blocks.size**3)
            for index, blocks in enumerate(self._factors)
        ]
        passes = [MULTIPLICATIONS_PER_NUMBER * n for n in n_numbers]
        return [a + g + p for a, g, p in zip(costs[::2], costs[1::2], passes, strict=True)]

    def n_bytes(self, factor: int) -> int:
        """Memory of one factor: window sums, average and inverse, in bytes."""
        blocks = self._factors[factor]
        return 0 if blocks is None else 3 * _n_blocks(blocks) * blocks.size**2 * self.flat_sums.element_size()

    def _folded(self) -> tuple[dict[int, Tensor], Tensor]:
        """What is inverted, by block size, and how many windows it is of: the averages, those of tables folded in.

        A table ``W [vocabulary, width]`` that also is the weight of an output layer has two roles, whose Fisher
        matrices add up: ``F ≈ D ⊗ Gₑ + Gₗ ⊗ Aₗ``, with ``D`` the (diagonal) frequencies of tokens and ``Gₑ`` the
        covariance of the gradients of their vectors, and ``Gₗ``, ``Aₗ`` of the output layer. The sum of two Kronecker
        products is none, so it is taken to be ``s (D + Gₗ) ⊗ (Gₑ + Aₗ)``, each product balanced first so that both of
        its factors have the same trace (t for a product of trace t²), and s such that the trace is F's, tₑ² + tₗ².

        Approximated: the cross terms ``D ⊗ Aₗ`` and ``Gₗ ⊗ Gₑ`` are none of F's, and what a sample's gradients in the
        two roles have to do with each other is left out. Where one role says nothing it is the other's own product.
        """
        averages, updates = {size: stack.average for size, stack in self.stacks.items()}, self.updates
        if not self._folds:
            return averages, updates
        sizes = {self._slots[2 * layer + side][0] for fold in self._folds for layer in fold for side in (0, 1)}
        averages.update({size: averages[size].clone() for size in sizes})
        updates, tiny = updates.clone(), torch.finfo(self.dtype).tiny

        def view(factor: int) -> tuple[Tensor, Tensor]:
            blocks, (size, place) = self._factors[factor], self._slots[factor]
            assert blocks is not None
            tensor = averages[size][place].view(blocks.shape)
            return tensor, tensor.diagonal(dim1=-2, dim2=-1).sum()

        for table, output in self._folds:
            (D, trace_D), (G_table, trace_G_table) = view(2 * table), view(2 * table + 1)
            (A, trace_A), (G, trace_G) = view(2 * output), view(2 * output + 1)
            blocks = self._factors[2 * output + 1]
            assert blocks is not None
            t_table, t_output = (trace_D * trace_G_table).sqrt(), (trace_A * trace_G).sqrt()
            # The square root of s, for each side.
            scale = (t_table.square() + t_output.square()).sqrt() / (t_table + t_output).clamp_min(tiny)
            weights = [
                torch.where(trace > 0, t * scale / trace, 0.0)
                for t, trace in ((t_table, trace_D), (t_table, trace_G_table), (t_output, trace_A), (t_output, trace_G))
            ]
            G.mul_(weights[3]).add_(diagonal_as_blocks(D.flatten(), blocks) * weights[0])
            A.mul_(weights[2]).add_(G_table * weights[1])
            updates[output] = torch.maximum(updates[output], updates[table])
        return averages, updates

    def _factor_traces(self, tensors: Mapping[int, Tensor], selection: Selection) -> Tensor:
        """Traces of the selected layers' factors, zero for the others, from their blocks by size."""
        total = torch.zeros(len(self._factors), dtype=self.dtype, device=self.flat_sums.device)
        for size, place in selection.places.items():
            stack = self.stacks[size]
            total.index_add_(0, stack.owners[place], traces(tensors[size][place]))
        return total


def _put(into: Tensor, place: Tensor | slice, part: Tensor) -> None:
    """``into[place] = part`` where ``part`` is what lay there, changed: a view of a slice still does."""
    if not isinstance(place, slice):
        into[place] = part


def _weight(averaging: float, n_windows: Tensor) -> Tensor:
    """Of the n-th window in an exponential average without bias: Adam's correction (Kingma & Ba 2015)."""
    return (1.0 - averaging) / (1.0 - averaging**n_windows)


def _n_blocks(blocks: Blocks | None) -> int:
    return 0 if blocks is None else blocks.groups * blocks.n_blocks
