"""All blocks of one size, of all layers: one tensor each for their sums, averages and inverses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_thor.factors.damping import DampingRule, split_damping
from lightning_thor.factors.tied_embedding import add_table_factors_
from lightning_thor.linalg.block_diagonal import BlockPartition
from lightning_thor.linalg.decompositions import INVERSE, Decomposition, traces
from lightning_thor.linalg.packing import pack, packed_numel, unpack

Index = Tensor | slice
"""Which of several blocks, by their numbers."""


class BlockBatch:
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

    def store_inverses(
        self,
        place: Index,
        kept: Index,
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


def put(into: Tensor, place: Index, part: Tensor) -> None:
    """``into[place] = part`` where ``part`` is what lay there, changed: a view of a slice still does."""
    if not isinstance(place, slice):
        into[place] = part


def clear(tensor: Tensor, place: Index) -> None:
    """``tensor[place] = 0``, which would wait for the device where ``place`` is a tensor: a number has to go there."""
    if isinstance(place, slice):
        tensor[place].zero_()
    else:
        tensor.index_fill_(0, place, 0.0)


Solve = Callable[[Mapping[int, tuple[Tensor, Tensor]]], Mapping[int, tuple[Tensor, Tensor]]]
"""By block size: ``(blocks, damping)`` to ``(inverses, succeeded)``."""


SMALLEST_POWER = 0.8
"""A factor counts if its mean damped eigenvalue is at least this power of the smallest normal number (10⁻³⁰)."""


N_COUNTS = 4
"""How many numbers are counted of each layer."""


class BlockIndex(NamedTuple):
    """Some of the layers: where their counts and, unless they are only probed, their blocks lie."""

    layers: Index
    places: dict[int, Index]
    """By block size: which blocks of the stack."""
    kept: dict[int, tuple[Index, Index]]
    """Those of them whose inverses are kept: which blocks of the stack, and which inverses."""
    outputs: list[int]
    """Output layers among them that a table is folded into."""
    numbers: list[int]
    """All of them, in order."""


class FactorState:
    """Factors of layers 0, 1, ...: layer ``i`` has A as factor ``2 i`` and G as factor ``2 i + 1``.

    Args:
        cuts: ``(A, G)`` of each layer; A is None where there is no input factor.
        dtype: of everything here, at least float32.
        device: of everything here.
        folds: ``(table, output)``: layers whose weight is the same one ``[vocabulary, width]``, an embedding's and a
            linear layer's; see `lightning_thor.factors.tied_embedding`.
        keeping: what is kept of each block wherever an inverse is spoken of here.
    """

    def __init__(
        self,
        cuts: Sequence[tuple[BlockPartition | None, BlockPartition]],
        dtype: torch.dtype,
        device: torch.device,
        tied: Sequence[tuple[int, int]] = (),
        *,
        decomposition: Decomposition = INVERSE,
    ) -> None:
        factors = [factor for cut in cuts for factor in cut]
        by_size: dict[int, list[int]] = {}
        # Those of layers that are cut alike lie together, all A and then all G, so that products take them as one.
        first = {cut: layer for layer, cut in reversed(list(enumerate(cuts)))}
        for index in sorted(range(len(factors)), key=lambda index: (first[cuts[index // 2]], index % 2, index)):
            blocks = factors[index]
            if blocks is not None:
                by_size.setdefault(blocks.size, []).append(index)
        lengths = {
            size: sum(_n_blocks(factors[index]) for index in members) * size * size for size, members in by_size.items()
        }
        self.dtype = dtype
        self.decomposition = decomposition
        self._factors = factors
        self._tables = {output: table for table, output in tied}
        self.flat_sums = torch.zeros(sum(lengths.values()) + N_COUNTS * len(cuts), dtype=dtype, device=device)
        """What is summed over micro-batches and processes: blocks by size, then what is counted of each layer."""
        *segments, counts = self.flat_sums.split([*lengths.values(), N_COUNTS * len(cuts)])
        self._counts: Tensor = counts.view(len(cuts), N_COUNTS)
        self._counted: dict[int, list[float]] = {}
        """By layer: what is to be added to these, on the host; it goes to the device in one piece."""
        self.stacks: dict[int, BlockBatch] = {}
        self._slots: dict[int, tuple[int, slice]] = {}
        for (size, members), segment in zip(by_size.items(), segments, strict=True):
            owners = [index for index in members for _ in range(_n_blocks(factors[index]))]
            self.stacks[size] = BlockBatch(segment.view(-1, size, size), torch.tensor(owners, device=device))
            start = 0
            for index in members:
                stop = start + _n_blocks(factors[index])
                self._slots[index] = size, slice(start, stop)
                start = stop
        self.sums = [
            None if blocks is None else self.blocks_of(index, "sums").view(blocks.sums_shape)
            for index, blocks in enumerate(factors)
        ]
        """By factor: the sums of its open window, as `add_covariance_` takes them."""
        widths = [1 if blocks is None else blocks.groups * blocks.width for blocks in factors]
        self._widths = torch.tensor(widths, dtype=dtype, device=device)
        self._has_A = torch.tensor([A is not None for A, _ in cuts], dtype=torch.bool, device=device)
        self.updates = torch.zeros(len(cuts), dtype=dtype, device=device)
        """How many windows each layer's average holds."""
        self.positions = torch.ones(len(cuts), dtype=dtype, device=device)
        """Rows per sample of each layer, as last seen."""
        self.failed_inversions = torch.zeros((), dtype=torch.int64, device=device)
        self.rejected_windows = torch.zeros((), dtype=torch.int64, device=device)
        self.last_damping = torch.zeros(len(factors), dtype=dtype, device=device)
        """What was added to each factor's eigenvalues when it was last inverted; 0: it never was."""
        self.tied_averages = {
            output: [self.blocks_of(2 * table + side, "average").clone() for side in (0, 1)]
            for output, table in self._tables.items()
        }
        """By output layer: the averages of its table, A and G, when it was last inverted."""
        self.gradient_unit: float | Tensor | None = None
        """What output gradients are divided by to be rows of G: a power of two, so that squares of them are in the
        range of their dtype; 1, unless the first ones were below 10⁻⁵ or above 10⁵. None until those were seen; a
        tensor as long as the host does not know it."""
        self.set_inverse_owner(range(len(cuts)))

    def change_unit_(self, unit: Tensor) -> None:
        """Bring the open window's sums of G to another unit of gradients."""
        if self.gradient_unit is not None:
            ratio = self.gradient_unit / unit
            for sums in self.sums[1::2]:
                assert sums is not None
                sums.mul_(ratio).mul_(ratio)
        self.gradient_unit = unit

    def set_inverse_owner(self, layers: Iterable[int]) -> None:
        """Keep the inverses of these layers alone; the identity until they are inverted."""
        self.has_inverse = set(layers)
        self._selections: dict[tuple[tuple[int, ...], tuple[int, ...]], BlockIndex] = {}
        self._kept_slots: dict[int, tuple[int, slice]] = {}
        n_kept = dict.fromkeys(self.stacks, 0)
        for factor, (size, place) in self._slots.items():
            if factor // 2 in self.has_inverse:
                start = n_kept[size]
                n_kept[size] += place.stop - place.start
                self._kept_slots[factor] = size, slice(start, n_kept[size])
        for size, stack in self.stacks.items():
            stack.keep(n_kept[size])

    @property
    def counts(self) -> Tensor:
        """Of each layer: rows, samples, and the traces of A and of G if it is only probed; else how many numbers its
        inputs and gradients had, and where in backward it came (see `lightning_thor.distributed.factor_reducer`).
        ``[layers, 4]``"""
        self._put_counts(self._counted)
        return self._counts

    def count(self, layer: int, *numbers: float | Tensor) -> None:
        """Add to the first of a layer's `counts`. Numbers of the host wait there, for one operation costs as much as
        all of them together."""
        waiting = self._counted.setdefault(layer, [0.0] * N_COUNTS)
        for column, number in enumerate(numbers):
            if isinstance(number, Tensor):
                self._counts[layer, column] += number
            else:
                waiting[column] += number

    def _put_counts(self, layers: Iterable[int]) -> None:
        """Bring what was counted of these layers to the device; no device sync."""
        counted = {layer: self._counted.pop(layer) for layer in list(layers) if layer in self._counted}
        if not counted:
            return
        start, stop = min(counted), max(counted) + 1
        none = [0.0] * N_COUNTS
        numbers = [counted.get(layer, none) for layer in range(start, stop)]
        # Only from pinned memory does a copy to a GPU not wait for what the GPU still has to do.
        new = torch.tensor(numbers, dtype=self.dtype, pin_memory=self._counts.is_cuda)
        self._counts[start:stop] += new.to(self._counts.device, non_blocking=True)

    def clear_window(self) -> None:
        """Nothing was observed."""
        self.flat_sums.zero_()
        self._counted.clear()

    def take_window(self, other: FactorState) -> None:
        """Bring the open window to that of other stacks of the same layers."""
        self.flat_sums.copy_(other.flat_sums)
        self.gradient_unit = other.gradient_unit
        self._counted = {layer: list(numbers) for layer, numbers in other._counted.items()}

    def blocks_of(self, factor: int, kind: str) -> Tensor:
        """View of one factor's ``"sums"``, ``"average"`` or ``"inverse"``: ``[groups, n_blocks, size, size]``."""
        size, place = (self._kept_slots if kind == "inverse" else self._slots)[factor]
        tensor: Tensor = getattr(self.stacks[size], kind)
        blocks = self._factors[factor]
        assert blocks is not None
        return tensor[place].view(blocks.shape)

    def inverted_of(self, factor: int) -> Tensor:
        """View of which blocks of a factor have ever been inverted: ``[groups * n_blocks]``."""
        size, place = self._kept_slots[factor]
        return self.stacks[size].inverted[place]

    def select(self, layers: tuple[int, ...], probed: tuple[int, ...] = ()) -> BlockIndex:
        """Where ``layers`` lie, and others that are only ``probed``; remembered, since the same ones come again."""
        if (layers, probed) not in self._selections:
            places = self._places(layers, self._slots)
            kept = [layer for layer in layers if layer in self.has_inverse]
            blocks, inverses = self._places(kept, self._slots), self._places(kept, self._kept_slots)
            self._selections[layers, probed] = BlockIndex(
                self._index(sorted(layers + probed)),
                places,
                {size: (blocks[size], inverses[size]) for size in blocks},
                [layer for layer in layers if layer in self._tables],
                sorted(layers + probed),
            )
        return self._selections[layers, probed]

    def _places(self, layers: Sequence[int], slots: Mapping[int, tuple[int, slice]]) -> dict[int, Index]:
        """By block size: which places of ``slots`` the factors of some layers have."""
        places: dict[int, list[int]] = {}
        for factor in (factor for layer in layers for factor in (2 * layer, 2 * layer + 1) if factor in slots):
            size, place = slots[factor]
            places.setdefault(size, []).extend(range(place.start, place.stop))
        return {size: self._index(sorted(blocks)) for size, blocks in places.items()}

    def _index(self, numbers: list[int]) -> Index:
        """A slice where that is possible: it copies nothing."""
        start, stop = numbers[0], numbers[-1] + 1
        if stop - start == len(numbers):
            return slice(start, stop)
        return torch.tensor(numbers, device=self.flat_sums.device)

    def window_of(self, selection: BlockIndex) -> Tensor:
        """The open window of some layers as one flat tensor that may travel: a triangle of each block, then counts."""
        # Of no other layers: what they are still to count is added up on the host, and so rounded once.
        self._put_counts(selection.numbers)
        blocks = [pack(self.stacks[size].sums[place]).flatten() for size, place in selection.places.items()]
        return torch.cat([*blocks, self._counts[selection.layers].flatten()])

    def set_window_(self, selection: BlockIndex, flat: Tensor) -> None:
        """Put what `window_of` gave, after it was summed, in the place of those layers' window."""
        counts = self.counts[selection.layers]
        lengths = [
            len(self.stacks[size].owners[place]) * packed_numel(size) for size, place in selection.places.items()
        ]
        *parts, summed = flat.split([*lengths, counts.numel()])
        for (size, place), part in zip(selection.places.items(), parts, strict=True):
            self.stacks[size].sums[place] = unpack(part.view(-1, packed_numel(size)), size)
        self.counts[selection.layers] = summed.view(counts.shape)

    def packed_bytes(self, layer: int) -> int:
        """How many bytes `window_of` takes for one layer."""
        numbers = sum(_n_blocks(blocks) * packed_numel(blocks.size) for blocks in self._cut(layer))
        numbers += N_COUNTS
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
        clear(self.counts, layers)
        traces = [self._damped_trace(trace, layers, rule, damping) for trace in (old, new)]
        return torch.where(none, 0.0, traces[0]), torch.where(silent, torch.nan, traces[1])

    def _damped_trace(self, trace: Tensor, layers: Index, rule: DampingRule, damping: float) -> Tensor:
        """tr(F + λI) from the traces of A and of G, ``[n, 2]``."""
        widths, has_A = self._widths.view(-1, 2)[layers], self._has_A[layers]
        added = self._dampings(trace / widths, layers, rule, damping)
        parts = torch.stack([trace, widths * added], dim=1)
        # A layer without A has the diagonal of its own Fisher matrix as G.
        return torch.where(has_A[:, None], parts[..., 0], 1.0).mul(parts[..., 1]).sum(1)

    def _dampings(self, means: Tensor, layers: Index, rule: DampingRule, damping: float) -> Tensor:
        """What is added to the eigenvalues of A and of G whose means these are, both ``[n, 2]``."""
        # That of "trace" has no unit; that of the others is in the units of the Fisher matrix, which has G's.
        unit = 1.0 if rule == "trace" or self.gradient_unit is None else self.gradient_unit
        is_one = not isinstance(unit, Tensor) and unit == 1.0
        own: Any = damping
        if not is_one:
            limits, factor = torch.finfo(self.dtype), torch.as_tensor(unit, device=means.device).double()
            own = (damping / factor / factor).clamp(limits.tiny, limits.max).to(self.dtype)
        added_A, added_G = split_damping(rule, own, means[:, 0], means[:, 1], self.positions[layers])
        if rule == "sqrt" and not is_one:
            added_A, added_G = added_A * unit, added_G / unit
        if rule != "trace":
            added_G = torch.where(self._has_A[layers], added_G, own)
        added = torch.stack([added_A, added_G], dim=1)
        return added if is_one else added.clamp_min(torch.finfo(self.dtype).tiny)

    def update_ema(self, selection: BlockIndex, averaging: float) -> None:
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
            put(stack.average, place, average)
            clear(stack.sums, place)
        self.counts.zero_()

    def invert(self, selection: BlockIndex, rule: DampingRule, damping: float, solve: Solve) -> None:
        """New inverses of the selected layers' averages; no device sync.

        What becomes of a block that fails: `BlockBatch.store_inverses`; it is counted.

        Args:
            selection: the layers; of those whose inverses are not kept it is only noted what would be added.
            rule, damping: what is added to eigenvalues, see `split_damping`.
            solve: what inverts: `damped_inverses` for each size, or
                `lightning_thor.distributed.shared_inversions.SharedInversions`.
        """
        for output in selection.outputs:
            for side, copy in enumerate(self.tied_averages[output]):
                copy.copy_(self.blocks_of(2 * self._tables[output] + side, "average"))
        averages, updates = self._folded(), self.updates
        if self._tables:
            updates = updates.clone()
            for output, table in self._tables.items():
                updates[output] = torch.maximum(updates[output], updates[table])
        means = self._factor_traces(averages, selection) / self._widths
        dampings = self._dampings(means.view(-1, 2), slice(None), rule, damping)
        # A factor of zeros (a dead layer) says nothing: under the trace rule its damping is zero too. One of so small
        # numbers that directions could leave the range of their dtype says as little.
        least = torch.finfo(self.dtype).tiny ** SMALLEST_POWER
        observed = (updates > 0)[:, None] & (dampings > 0) & ((means.view(-1, 2) + dampings).abs() >= least)
        added = self.last_damping.view(-1, 2)
        added[selection.layers] = torch.where(observed, dampings, added)[selection.layers]
        now = torch.where(observed, dampings, 0.0).flatten()
        self.failed_inversions += self._solve(selection, averages, now, means, solve)

    def recompute_inverses(self, layers: Sequence[int]) -> Tensor:
        """The inverses of layers that had them elsewhere, from their averages and what was added to them there.

        They are those that `invert` made then, since averages change only in steps in which the layer is inverted. But
        where it kept an older inverse, that is lost: a block that fails again gets the identity over its mean damped
        eigenvalue, one of a factor of zeros the identity over what was last added.

        Returns:
            How many blocks failed.
        """
        selection = self.select(tuple(layers))
        for size, (_, inverses) in selection.kept.items():
            self.stacks[size].inverted[inverses] = False
            self.stacks[size].inverse[inverses] = 0.0
        averages = self._folded()
        means = self._factor_traces(averages, selection) / self._widths

        def solve(problems: Mapping[int, tuple[Tensor, Tensor]]) -> Mapping[int, tuple[Tensor, Tensor]]:
            return {size: self.decomposition.make(*problem) for size, problem in problems.items()}

        return self._solve(selection, averages, self.last_damping, means, solve)

    def _solve(
        self, selection: BlockIndex, averages: Mapping[int, Tensor], added: Tensor, means: Tensor, solve: Solve
    ) -> Tensor:
        """Inverses of ``averages``, of those selected layers whose inverses are kept; how many blocks failed."""
        problems = {
            size: (averages[size][place], added[self.stacks[size].owners[place]])
            for size, (place, _) in selection.kept.items()
        }
        solutions = solve(problems)
        failed = torch.zeros_like(self.failed_inversions)
        for size, (place, kept) in selection.kept.items():
            stack = self.stacks[size]
            failed += stack.store_inverses(place, kept, solutions[size], added, means, power=self.decomposition.power)
        return failed

    def n_bytes(self, layer: int) -> int:
        """Memory of one layer: window sums, averages, and inverses if they are kept, in bytes."""
        numbers = [_n_blocks(blocks) * blocks.size**2 for blocks in self._cut(layer)]
        copies = sum(copy.numel() for copy in self.tied_averages.get(layer, []))
        return ((3 if layer in self.has_inverse else 2) * sum(numbers) + copies) * self.flat_sums.element_size()

    def _cut(self, layer: int) -> list[BlockPartition]:
        """How the factors of a layer are cut."""
        return [blocks for blocks in self._factors[2 * layer : 2 * layer + 2] if blocks is not None]

    def _folded(self) -> dict[int, Tensor]:
        """What is inverted, by block size: the averages, those of `folded` tables in them."""
        averages = {size: stack.average for size, stack in self.stacks.items()}
        for size in {self._slots[2 * output + side][0] for output in self._tables for side in (0, 1)}:
            averages[size] = averages[size].clone()
        for output, (D, G_table) in self.tied_averages.items():
            A, G = (self._view(averages, 2 * output + side) for side in (0, 1))
            cut = self._factors[2 * output + 1]
            assert cut is not None
            add_table_factors_(A, G, D, G_table, cut)
        return averages

    def _view(self, tensors: Mapping[int, Tensor], factor: int) -> Tensor:
        """One factor's blocks among all of them by size: ``[groups, n_blocks, size, size]``."""
        (size, place), blocks = self._slots[factor], self._factors[factor]
        assert blocks is not None
        return tensors[size][place].view(blocks.shape)

    def _factor_traces(self, tensors: Mapping[int, Tensor], selection: BlockIndex) -> Tensor:
        """Traces of the selected layers' factors, zero for the others, from their blocks by size."""
        total = torch.zeros(len(self._factors), dtype=self.dtype, device=self.flat_sums.device)
        for size, place in selection.places.items():
            stack = self.stacks[size]
            total.index_add_(0, stack.owners[place], traces(tensors[size][place]))
        return total


def _weight(averaging: float, n_windows: Tensor) -> Tensor:
    """Of the n-th window in an exponential average without bias: Adam's correction (Kingma & Ba 2015)."""
    return (1.0 - averaging) / (1.0 - averaging**n_windows)


def _n_blocks(blocks: BlockPartition | None) -> int:
    return 0 if blocks is None else blocks.groups * blocks.n_blocks
