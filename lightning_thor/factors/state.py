"""The factors of all layers: sums of the open window, moving averages, and inverses.

All blocks of one size, of all layers, are one tensor, so that averaging, inversion and packing for other processes are
a few batched operations whatever the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_thor.factors.damping import DampingRule, split_damping
from lightning_thor.factors.layout import SIDES, BlockIndex, FactorLayout, FactorShapes, Index, Side
from lightning_thor.factors.tied_embedding import add_table_factors_
from lightning_thor.layers.base import Layer, Rows
from lightning_thor.linalg.block_diagonal import add_covariance_
from lightning_thor.linalg.decompositions import INVERSE, Decomposition, Problems, Solutions, is_finite, traces
from lightning_thor.linalg.memory import sent
from lightning_thor.linalg.packing import pack, packed_numel, unpack

Solve = Callable[[Problems], Solutions]
SMALLEST_POWER = 0.8
"""A factor counts if its mean damped eigenvalue is at least this power of the smallest normal number (10⁻³⁰)."""
ROWS_PER_TOKEN = 5
"""Where a factor has a row for each token, damping is relative to the mean of at most a 5th as many as a window has
rows. With 0.2 it adds 1 / rows to frequencies, as if each token had come once more (Laplace's rule). Otherwise a rarer
one's gradient would outweigh those of all others whenever it comes."""
ROWS, SAMPLES, ELEMENTS, BACKWARD_POSITION = range(4)
"""Columns of `FactorState.counts`."""
N_COUNTS = 4


class FactorPart(NamedTuple):
    """The blocks of a layer's A and G that one call's rows belong to, where processes share its features."""

    shapes: FactorShapes
    """Of these blocks."""
    places: tuple[slice | None, slice | None]
    """Of these blocks among all; None: all of them."""
    scales: tuple[float, float]
    """Of the rows, beside other factors."""

    def of(self, sums: Mapping[Side, Tensor]) -> dict[Side, Tensor]:
        """Views of a layer's sums."""
        found = {}
        for side, one in sums.items():
            places = self.places[SIDES.index(side)]
            found[side] = one if places is None else one[:, places] if one.dim() == 2 else one[places]
        return found


class BlockBatch:
    """All blocks of one size: window sums and averages, ``[n, size, size]``, and the inverses stored on this process.

    Args:
        sums: view of the open window's sums, ``[n, size, size]``.
        owners: the factor of each block, as a row of ``[layers, 2]`` flattened, ``[n]``.
    """

    def __init__(self, sums: Tensor, owners: Tensor) -> None:
        self.sums, self.owners = sums, owners
        self.average = torch.zeros_like(sums)

    def set_n_stored(self, n: int) -> None:
        """Drop all inverses, and store those of ``n`` blocks from now on."""
        self._n_stored = n
        self.__dict__.pop("inverse", None)

    @cached_property
    def inverse(self) -> Tensor:
        """``[n_stored, size, size]``, the identity at first; allocated at its first use."""
        identity = torch.eye(self.sums.shape[-1], dtype=self.sums.dtype, device=self.sums.device)
        return identity.repeat(self._n_stored, 1, 1)

    def store_inverses(
        self, stored: Index, inverses: Tensor, succeeded: Tensor, inverted: Tensor, last_resort: Tensor
    ) -> None:
        """Store new inverses; no device sync. A block that did not succeed keeps its last inverse; if it never had one,
        it gets a multiple of the identity.

        Args:
            stored: the rows of these inverses.
            inverses: ``[n, size, size]``.
            succeeded: bool, ``[n]``.
            inverted: whether each block was ever inverted before, ``[n]``.
            last_resort: the factor of the identity, ``[n]``.
        """
        before = self.inverse[stored]
        # A block that was never inverted has zeros beside its diagonal.
        diagonal = before.diagonal(dim1=-2, dim2=-1)
        torch.where(inverted[:, None], diagonal, last_resort[:, None], out=diagonal)
        torch.where(succeeded[:, None, None], inverses, before, out=before)
        _put(self.inverse, stored, before)


class FactorState:
    """Factors ``(layer, "A" | "G")`` of layers 0, 1, ...

    Args:
        shapes: how A and G of each layer are partitioned.
        dtype: of everything here, at least float32.
        device: of everything here.
        tied: ``(table, output)``: an embedding and a linear layer with the same weight ``[vocabulary, width]``; the
            table's factors are added to the output layer's when these are inverted.
        tables: the layers whose A is the diagonal of the frequencies of tokens.
        decomposition: what is stored of each block wherever an inverse is spoken of here.
    """

    def __init__(
        self,
        shapes: Sequence[FactorShapes],
        dtype: torch.dtype,
        device: torch.device,
        tied: Sequence[tuple[int, int]] = (),
        *,
        tables: Sequence[int] = (),
        decomposition: Decomposition = INVERSE,
    ) -> None:
        n_layers = len(shapes)
        self.dtype, self.device, self.decomposition = dtype, device, decomposition
        self.layout = FactorLayout(shapes, device)
        lengths = [n * size * size for size, n in self.layout.n_blocks.items()]
        self.flat_sums = torch.zeros(sum(lengths) + N_COUNTS * n_layers, dtype=dtype, device=device)
        """Everything that is summed over micro-batches and processes: blocks by size, then `counts`."""
        *segments, counts = self.flat_sums.split([*lengths, N_COUNTS * n_layers])
        self._counts: Tensor = counts.view(n_layers, N_COUNTS)
        self._host_counts: dict[int, list[float]] = {}
        """By layer: counts that wait on the host; one copy brings them all to the device."""
        self.batches = {
            size: BlockBatch(segment.view(-1, size, size), self.layout.owners[size])
            for size, segment in zip(self.layout.n_blocks, segments, strict=True)
        }
        self.sums: list[dict[Side, Tensor]] = [
            {side: self.blocks(layer, side, "sums").view(one.sums_shape) for side, one in self.layout.factors(layer)}
            for layer in range(n_layers)
        ]
        """By layer and side: the sums of the open window, as `add_covariance_` takes them."""
        widths = [[1 if one is None else one.groups * one.width for one in both] for both in shapes]
        self._widths = torch.tensor(widths, dtype=dtype, device=device).view(n_layers, 2)
        self._has_A = torch.tensor([A is not None for A, _ in shapes], dtype=torch.bool, device=device)
        self.updates = torch.zeros(n_layers, dtype=dtype, device=device)
        """Windows that each layer's average holds, ``[layers]``."""
        self.positions = torch.ones(n_layers, dtype=dtype, device=device)
        """Rows per sample of each layer, as last seen, ``[layers]``."""
        self.failed_inversions = torch.zeros((), dtype=torch.int64, device=device)
        self.rejected_windows = torch.zeros((), dtype=torch.int64, device=device)
        self.is_rejected = torch.zeros(n_layers, dtype=torch.bool, device=device)
        """Whether the last window that `update_ema` looked at was not finite, ``[layers]``."""
        self.last_damping = torch.zeros(n_layers, 2, dtype=dtype, device=device)
        """What was added to each factor's eigenvalues at its last inversion, ``[layers, 2]``; 0 before the first."""
        self.changes = torch.full((n_layers, 2), torch.nan, dtype=dtype, device=device)
        """Relative change of each factor in the last `update_ema` that measured it, ``[layers, 2]``; NaN before."""
        self.rows = torch.zeros(n_layers, dtype=dtype, device=device)
        """Rows of each layer in the last window that was measured so, ``[layers]``."""
        self._tables = {output: table for table, output in tied}
        self.tied_averages = {
            output: [self.blocks(table, side, "average").clone() for side in SIDES]
            for output, table in self._tables.items()
        }
        """By output layer: the averages of its table, A and G, when it was last inverted."""
        self._copies = torch.ones(n_layers, dtype=dtype, device=device)
        """How often each row of a layer is counted, ``[layers]``; see `note_copies`."""
        self._has_copies: dict[int, int] = {}
        """The same on the host, of layers for which it was noted."""
        self.rarest = torch.zeros(n_layers, dtype=dtype, device=device)
        """Of tables: 1 / tokens of the last window, ``[layers]``: the frequency of one that came once; 0 before."""
        self.tables = frozenset(tables)
        counted_by, per_row = ([[0, 0] for _ in shapes] for _ in range(2))
        for layer, side, table in [*((table, 0, table) for table in tables), *((output, 1, of) for of, output in tied)]:
            counted_by[layer][side], per_row[layer][side] = table, ROWS_PER_TOKEN * widths[layer][side]
        self._counted_by = torch.tensor(counted_by, dtype=torch.int64, device=device).view(n_layers, 2)
        """The table whose tokens a factor's rows are, ``[layers, 2]``; 0 where they are none."""
        self._per_row = torch.tensor(per_row, dtype=dtype, device=device).view(n_layers, 2)
        """`ROWS_PER_TOKEN` times the number of tokens that a factor has a row for, ``[layers, 2]``; 0 of others."""
        self.gradient_unit: float | Tensor | None = None
        """A power of two that output gradients are divided by, so that their squares stay in the range of the dtype;
        1, unless the first gradients were below 10⁻⁵ or above 10⁵. None until these were seen; a 0-dimensional tensor
        until the host knows it."""
        self.set_inverse_owner(range(n_layers))

    # ── where factors are ──

    @property
    def has_inverse(self) -> set[int]:
        """The layers whose inverses this process stores."""
        return self.layout.has_inverse

    def set_inverse_owner(self, layers: Iterable[int]) -> None:
        """Store the inverses of ``layers`` alone on this process: the identity until they are inverted."""
        self.layout.set_inverse_owner(layers)
        lengths = self.layout.n_stored
        self._all_inverted = torch.zeros(sum(lengths.values()), dtype=torch.bool, device=self.device)
        parts = self._all_inverted.split(list(lengths.values()))
        self.inverted_blocks: dict[int, Tensor] = dict(zip(lengths, parts, strict=True))
        """By block size: whether each block whose inverse is stored here has ever been inverted, ``[n_stored]``; the
        others hold a multiple of the identity."""
        for size, batch in self.batches.items():
            batch.set_n_stored(lengths[size])

    def blocks(self, layer: int, side: Side, kind: str) -> Tensor:
        """View of one factor's blocks: its ``"sums"``, ``"average"`` or ``"inverse"``, as ``kind`` says,
        ``[groups, n_blocks, size, size]``."""
        size, place = self.layout.offset(layer, side, stored=kind == "inverse")
        tensor: Tensor = getattr(self.batches[size], kind)
        return tensor[place].view(self.layout.partition(layer, side).shape)

    def inverted(self, layer: int, side: Side) -> Tensor:
        """View of whether each block of a factor has ever been inverted, ``[groups * n_blocks]``."""
        size, place = self.layout.offset(layer, side, stored=True)
        return self.inverted_blocks[size][place]

    def inverse_records(self, layer: int, side: Side) -> Tensor:
        """The inverse of each block of one factor, and 1 if it was ever inverted, else 0: ``[n, size² + 1]``, new; all
        zeros if another process stores them."""
        blocks = self.layout.partition(layer, side)
        if layer not in self.has_inverse:
            shape = blocks.groups * blocks.n_blocks, blocks.size**2 + 1
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        inverses = self.blocks(layer, side, "inverse").flatten(0, 1).flatten(1)
        return torch.cat([inverses, self.inverted(layer, side)[:, None].to(self.dtype)], dim=1)

    def n_bytes(self, layer: int) -> int:
        """Memory of one layer's window sums, averages, and inverses if they are stored here, in bytes."""
        copies = sum(copy.numel() for copy in self.tied_averages.get(layer, []))
        n_tensors = 3 if layer in self.has_inverse else 2
        return (n_tensors * self.layout.numel(layer) + copies) * self.flat_sums.element_size()

    # ── the open window ──

    @property
    def counts(self) -> Tensor:
        """Of each layer in the open window ``[layers, 4]``: rows, samples, numbers in its inputs and gradients (where
        refreshes are staggered), and its position in backward (see `lightning_thor.distributed.factor_reducer`)."""
        self._put_counts(self._host_counts)
        return self._counts

    def count(self, layer: int, rows: float | Tensor, samples: float | Tensor, elements: float) -> None:
        """Add to a layer's `counts`. Numbers of the host wait there: one operation costs as much as all together.

        Args:
            layer: its number.
            rows: rows in A's sum.
            samples: samples that they belong to.
            elements: numbers in the layer's input and gradient.
        """
        waiting = self._host_counts.setdefault(layer, [0.0] * N_COUNTS)
        for column, number in enumerate((rows, samples, elements)):
            if isinstance(number, Tensor):
                self._counts[layer, column] += number
            else:
                waiting[column] += number

    def add(
        self,
        layer: int,
        rows: Rows,
        scale: float | Tensor = 1.0,
        samples: float | Tensor = 0.0,
        elements: float = 0.0,
        part: FactorPart | None = None,
    ) -> None:
        """Add the covariances of one call's rows to the open window; no device sync.

        Args:
            layer: its number.
            rows: inputs ``[groups, in, n]`` and output gradients ``[groups, out, n]``.
            scale: of the output gradients; a number, or a 0-dimensional tensor.
            samples: samples that the rows add to `counts`.
            elements: numbers in the layer's input and gradient.
            part: the blocks that the rows belong to; None for all.
        """
        (A, G), sums, scale_A = self.layout.shapes[layer], self.sums[layer], 1.0
        if part is not None:
            (A, G), sums, scale_A, scale = part.shapes, part.of(sums), part.scales[0], scale * part.scales[1]
        if A is not None and rows.a is not None:
            add_covariance_(sums["A"], rows.a, A, scale_A)
        if rows.token_counts is not None:
            sums["A"].add_(rows.token_counts)
        add_covariance_(sums["G"], rows.g, G, scale)
        self.count(layer, rows.n_rows, samples, elements)

    def note_copies(self, layer: int, n: int) -> None:
        """Note that n processes see, and count, the same rows of a layer (tensor parallelism)."""
        if self._has_copies.get(layer, 1) != n:
            self._has_copies[layer] = n
            self._copies[layer] = n

    def _put_counts(self, layers: Iterable[int]) -> None:
        """Bring the host's counts of ``layers`` to the device; no device sync."""
        counted = {layer: self._host_counts.pop(layer) for layer in list(layers) if layer in self._host_counts}
        if not counted:
            return
        start, stop = min(counted), max(counted) + 1
        none = [0.0] * N_COUNTS
        numbers = [counted.get(layer, none) for layer in range(start, stop)]
        self._counts[start:stop] += sent(numbers, self._counts)

    def clear_window(self) -> None:
        """Empty the open window."""
        self.flat_sums.zero_()
        self._host_counts.clear()

    def clear_layer(self, layer: int) -> None:
        """Empty the open window of one ``layer``."""
        for sums in self.sums[layer].values():
            sums.zero_()
        self._counts[layer].zero_()
        self._host_counts.pop(layer, None)

    def copy_window_(self, other: FactorState) -> None:
        """Set the open window to that of another state of the same layers."""
        self.flat_sums.copy_(other.flat_sums)
        self.gradient_unit = other.gradient_unit
        self._host_counts = {layer: list(numbers) for layer, numbers in other._host_counts.items()}

    def pack_window(self, index: BlockIndex) -> Tensor:
        """The open window of the layers of ``index``, one-dimensional and new: a triangle of each block, then their
        counts."""
        # Not of other layers: what these still count on the host is added up there, and so rounded once.
        self._put_counts(index.numbers)
        blocks = [pack(self.batches[size].sums[place]).flatten() for size, place in index.blocks.items()]
        return torch.cat([*blocks, self._counts[index.layers].flatten()])

    def unpack_window_(self, index: BlockIndex, flat: Tensor) -> None:
        """Set the window of some layers to what `pack_window` returned, summed over processes."""
        counts = self.counts[index.layers]
        lengths = [len(self.batches[size].owners[place]) * packed_numel(size) for size, place in index.blocks.items()]
        *parts, summed = flat.split([*lengths, counts.numel()])
        for (size, place), part in zip(index.blocks.items(), parts, strict=True):
            self.batches[size].sums[place] = unpack(part.view(-1, packed_numel(size)), size)
        self.counts[index.layers] = summed.view(counts.shape)

    def packed_bytes(self, layer: int) -> int:
        """Bytes that `pack_window` takes for one layer."""
        return (self.layout.packed_numel(layer) + N_COUNTS) * self.flat_sums.element_size()

    def change_unit_(self, unit: Tensor) -> None:
        """Convert the open window's sums of G to another ``unit`` of gradients, 0-dimensional."""
        if self.gradient_unit is not None:
            ratio = self.gradient_unit / unit
            for sums in self.sums:
                sums["G"].mul_(ratio).mul_(ratio)
        self.gradient_unit = unit

    # ── averages ──

    def traces(self, index: BlockIndex, averaging: float, rule: DampingRule, damping: float) -> tuple[Tensor, Tensor]:
        """tr(F + λI) of some layers as it is, and as the open window would make it; no device sync.

        As in THOR's paper (AAAI 2021) tr(A ⊗ G) = tr A · tr G; λ is the product of what is added to A and to G, which
        under the absolute rules is the damping itself.

        Args:
            index: of the layers.
            averaging: see `update_ema`.
            rule: see `split_damping`.
            damping: see `split_damping`.

        Returns:
            Two tensors ``[n]``. The first is 0 for a layer that has no curvature yet; the second is not finite where
            the window is not, or is empty.
        """
        layers = index.layers
        counts = self.counts[layers][:, : SAMPLES + 1]
        old = self._factor_traces("average", index)[layers]
        batch = self._factor_traces("sums", index)[layers] / counts.clamp_min(torch.finfo(self.dtype).tiny)
        new = old.lerp(batch, _weight(averaging, self.updates[layers] + 1.0)[:, None])
        found = [self._damped_trace(trace, layers, rule, damping) for trace in (old, new)]
        none, silent = self.updates[layers] == 0, counts[:, 0] == 0
        return torch.where(none, 0.0, found[0]), torch.where(silent, torch.nan, found[1])

    def _damped_trace(self, trace: Tensor, layers: Index, rule: DampingRule, damping: float) -> Tensor:
        """tr(F + λI) from the traces of A and of G, ``[n, 2]``."""
        widths, has_A = self._widths[layers], self._has_A[layers]
        added = self._dampings(trace / widths, layers, rule, damping)
        parts = torch.stack([trace, widths * added], dim=1)
        # A layer without A has the diagonal of its own Fisher matrix as G.
        return torch.where(has_A[:, None], parts[..., 0], 1.0).mul(parts[..., 1]).sum(1)

    def update_ema(
        self, index: BlockIndex, averaging: float, wanted: Tensor | None = None, *, measures_change: bool = False
    ) -> None:
        """Take the open window of some layers into their averages, and empty it; no device sync.

        A layer that was silent, or whose statistics are not finite, keeps its average (the latter is counted). The
        n-th window has the weight ``(1 - averaging) / (1 - averaging ** n)``: an exponential average without bias
        (Adam's correction: Kingma & Ba 2015, arXiv:1412.6980).

        Args:
            index: of the layers.
            averaging: weight of the past, in [0, 1).
            wanted: bool, ``[layers]``: of which layers to take the window; None for all.
            measures_change: note in `changes` ``‖F - F_old‖ / ‖F_old‖`` (Frobenius) of the factors that had an average
                before and are taken, and in `rows` the rows of the window.
        """
        counts = self.counts[:, : SAMPLES + 1]
        # A silent layer has no rows, and a layer of which few rows were taken less than a sample.
        tiny = torch.finfo(self.dtype).tiny
        # E over rows for A, E over samples of the sum over positions for G: then A ⊗ G has the Fisher matrix's scale.
        divisors = counts.flatten().clamp_min(tiny)
        # A covariance has a number that is not finite only if its diagonal has one, so its trace tells.
        sums = self._factor_traces("sums", index)
        finite = is_finite(torch.cat([sums, self.counts], dim=1)).all(1)
        taken = finite & (counts[:, 0] > 0)
        taken = taken if wanted is None else taken & wanted
        self.is_rejected = ~finite
        self.rejected_windows += self.is_rejected.sum()
        self.updates += taken
        weight = _weight(averaging, self.updates.clamp_min(1.0))
        torch.where(taken, counts[:, 0] / counts[:, 1].clamp_min(tiny), self.positions, out=self.positions)
        if self.tables:
            # The trace of a table's sum is the number of its tokens, without those that are masked.
            torch.where(taken, self._copies / sums[:, 0].clamp_min(1.0), self.rarest, out=self.rarest)
        weight, taken = weight.repeat_interleave(2), taken.repeat_interleave(2)
        squares = weight.new_zeros(2, len(weight)) if measures_change else None
        """Of the norms of window - average and of the average, by factor."""
        is_everything = len(index.numbers) == len(self.updates)
        # Of each block, for all sizes at once.
        of_blocks = torch.stack([divisors, weight, taken.to(weight.dtype)])[:, index.owners]
        for (size, place), numbers in zip(index.blocks.items(), of_blocks.split(index.lengths, dim=1), strict=True):
            divisor, own_weight, is_taken = numbers[..., None, None]
            batch = self.batches[size]
            # Views where the place is a slice: their own memory takes all that follows.
            average, window = batch.average[place], batch.sums[place]
            window.div_(divisor)
            # where, not a weight of 0: what is left out may not be finite.
            torch.where(is_taken > 0, window, average, out=window)
            if squares is not None:
                for total, blocks in zip(squares, (window - average, average), strict=True):
                    total.index_add_(0, batch.owners[place], blocks.square().sum((-2, -1)))
            average.lerp_(window, own_weight)
            _put(batch.average, place, average)
            if not is_everything:
                _clear(batch.sums, place)
        if squares is not None:
            changes = (weight * (squares[0] / squares[1]).sqrt()).view_as(self.changes)
            is_change = (taken & (self.updates > 1).repeat_interleave(2)).view_as(changes)
            self.changes.copy_(torch.where(is_change, changes, self.changes))
            self.rows.copy_(torch.where(counts[:, 0] > 0, counts[:, 0], self.rows))
        (self.flat_sums if is_everything else self.counts).zero_()

    # ── inverses ──

    def invert(self, index: BlockIndex, rule: DampingRule, damping: float, solve: Solve) -> None:
        """Invert the averages of some layers; no device sync.

        A block that fails is counted; `_solve` says what it keeps.

        Args:
            index: of the layers; of those whose inverses are stored elsewhere only the damping is noted.
            rule: how damping is shared between A and G, see `split_damping`.
            damping: see `split_damping`.
            solve: inverts, as `lightning_thor.distributed.shared_inversions.SharedInversions` does.
        """
        updates = self.updates
        for output, table in self._tables.items():
            if output in index.numbers:
                for side, copy in zip(SIDES, self.tied_averages[output], strict=True):
                    copy.copy_(self.blocks(table, side, "average"))
            updates = updates.clone() if updates is self.updates else updates
            updates[output] = torch.maximum(updates[output], updates[table])
        averages = self._with_tables(index)
        means = self._factor_traces(averages, index) / self._widths
        dampings = self._dampings(means, slice(None), rule, damping)
        # A factor of zeros (a dead layer) says nothing: under the trace rule its damping is zero too. One of so small
        # numbers that directions could leave the range of their dtype says as little.
        least = torch.finfo(self.dtype).tiny ** SMALLEST_POWER
        observed = (updates > 0)[:, None] & (dampings > 0) & ((means + dampings).abs() >= least)
        self.last_damping[index.layers] = torch.where(observed, dampings, self.last_damping)[index.layers]
        self.failed_inversions += self._solve(index, averages, torch.where(observed, dampings, 0.0), means, solve)

    def recompute_inverses(self, layers: Sequence[int]) -> Tensor:
        """Invert again, from averages and last damping, ``layers`` whose inverses another process stored; returns how
        many blocks failed, 0-dimensional.

        They are those that `invert` made then, since averages change only in steps in which the layer is inverted. But
        where it kept an older inverse, that is lost: a block that fails again gets the identity over its mean damped
        eigenvalue, one of a factor of zeros the identity over what was last added.
        """
        index = self.layout.index(tuple(layers))
        for size, (_, stored) in index.stored.items():
            self.inverted_blocks[size][stored] = False
            self.batches[size].inverse[stored] = 0.0
        averages = self._with_tables(index)
        means = self._factor_traces(averages, index) / self._widths

        def solve(problems: Problems) -> Solutions:
            return {size: self.decomposition.make(*problem) for size, problem in problems.items()}

        return self._solve(index, averages, self.last_damping, means, solve)

    def _solve(
        self, index: BlockIndex, averages: Mapping[int, Tensor], damping: Tensor, means: Tensor, solve: Solve
    ) -> Tensor:
        """Store the inverses of ``averages`` of some layers, with ``damping [layers, 2]``; how many blocks failed.

        A block that failed keeps its last inverse; if it never had one, it gets the identity times a power of its mean
        damped eigenvalue, from ``means [layers, 2]``. A block without damping was not observed, and keeps its inverse.
        """
        own, everything = damping.flatten()[index.stored_owners], self._all_inverted
        problems = {}
        for (size, (place, _)), added in zip(index.stored.items(), own.split(index.stored_lengths), strict=True):
            problems[size] = averages[size][place], added
        solutions = solve(problems)
        if not index.stored:
            return torch.zeros_like(self.failed_inversions)
        observed = own > 0
        succeeded = torch.cat([solutions[size][1] for size in index.stored])
        failed = (observed & ~succeeded).sum()
        mean = means.flatten()[index.stored_owners]
        last_resort = torch.where(observed, (mean + own) ** self.decomposition.power, 1.0)
        succeeded, inverted = succeeded & observed, everything[index.rows]
        numbers = zip(*(one.split(index.stored_lengths) for one in (succeeded, inverted, last_resort)), strict=True)
        for (size, (_, stored)), each in zip(index.stored.items(), numbers, strict=True):
            self.batches[size].store_inverses(stored, solutions[size][0], *each)
        everything[index.rows] = inverted | succeeded
        return failed

    def _dampings(self, means: Tensor, layers: Index, rule: DampingRule, damping: float) -> Tensor:
        """What is added to the eigenvalues of A and of G, ``[n, 2]``, from their means, ``[n, 2]``."""
        if rule == "trace" and self.tables:
            means = torch.maximum(means, means * self._per_row[layers] * self.rarest[self._counted_by[layers]])
        # That of "trace" has no unit; that of the others is in the units of the Fisher matrix, which has G's.
        unit = 1.0 if rule == "trace" or self.gradient_unit is None else self.gradient_unit
        is_one = not isinstance(unit, Tensor) and unit == 1.0
        limits = torch.finfo(self.dtype)
        least = limits.tiny**SMALLEST_POWER
        own: Any = min(max(damping, least), 1.0 / least)
        if not is_one:
            factor = torch.as_tensor(unit, device=means.device).double()
            own = (damping / factor / factor).clamp(limits.tiny, limits.max).to(self.dtype)
        added_A, added_G = split_damping(rule, own, means[:, 0], means[:, 1], self.positions[layers])
        if rule == "sqrt" and not is_one:
            added_A, added_G = added_A * unit, added_G / unit
        if rule != "trace":
            added_G = torch.where(self._has_A[layers], added_G, own)
        added = torch.stack([added_A, added_G], dim=1)
        return added if is_one else added.clamp_min(limits.tiny)

    def _with_tables(self, index: BlockIndex) -> dict[int, Tensor]:
        """What is inverted of some layers, by block size: the averages, with the factors of tied tables added to their
        outputs'."""
        averages = {size: batch.average for size, batch in self.batches.items()}
        tied = [output for output in self._tables if output in index.numbers]
        for size in {self.layout.offset(output, side)[0] for output in tied for side in SIDES}:
            averages[size] = averages[size].clone()
        for output in tied:
            D, G_table = self.tied_averages[output]
            A, G = (self._blocks_in(averages, output, side) for side in SIDES)
            add_table_factors_(A, G, D, G_table, self.layout.partition(output, "G"))
        return averages

    def _blocks_in(self, tensors: Mapping[int, Tensor], layer: int, side: Side) -> Tensor:
        size, place = self.layout.offset(layer, side)
        return tensors[size][place].view(self.layout.partition(layer, side).shape)

    def _factor_traces(self, tensors: str | Mapping[int, Tensor], index: BlockIndex) -> Tensor:
        """Traces ``[layers, 2]`` of some layers' factors, 0 for the others, from their blocks by size."""
        total = torch.zeros(self._widths.numel(), dtype=self.dtype, device=self.device)
        for size, place in index.blocks.items():
            batch = self.batches[size]
            blocks: Tensor = getattr(batch, tensors) if isinstance(tensors, str) else tensors[size]
            total.index_add_(0, batch.owners[place], traces(blocks[place]))
        return total.view(-1, 2)


def factor_state_of(layers: Mapping[str, Layer], decomposition: Decomposition) -> FactorState:
    """The state for all factors of some layers, without curvature yet, on their device; in float64 if any weight is,
    else in float32.

    Args:
        layers: by name; numbered in this order.
        decomposition: what is stored of each block.

    Raises:
        ValueError: the layers are on several devices.
    """
    weights = [layer.parameters[0] for layer in layers.values()]
    devices = {weight.device for weight in weights}
    if len(devices) > 1:
        raise ValueError(
            f"The layers of one model lie on several devices ({', '.join(sorted(map(str, devices)))}); Curvature "
            "needs them on one. Build it after the model was moved, or give `parameters` of one device."
        )
    dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
    number = {name: number for number, name in enumerate(layers)}
    return FactorState(
        [(layer.A, layer.G) for layer in layers.values()],
        dtype,
        devices.pop() if devices else torch.device("cpu"),
        [(number[name], number[layer.tied_to]) for name, layer in layers.items() if layer.tied_to],
        tables=[number[name] for name, layer in layers.items() if layer.kind.diagonal == "A"],
        decomposition=decomposition,
    )


def _weight(averaging: float, n_windows: Tensor) -> Tensor:
    """Weight of the n-th window in an exponential average without bias."""
    # Not 1 - averaging ** n, of which nothing is left in float32 where averaging is nearly 1.
    return (averaging - 1.0) / torch.expm1(n_windows * (math.log(averaging) if averaging else -math.inf))


def _put(into: Tensor, place: Index, part: Tensor) -> None:
    """``into[place] = part`` where ``part`` is ``into[place]``, changed: a view of a slice still is."""
    if not isinstance(place, slice):
        into[place] = part


def _clear(tensor: Tensor, place: Index) -> None:
    """``tensor[place] = 0``, which would wait for the device where ``place`` is a tensor: a number has to go there."""
    if isinstance(place, slice):
        tensor[place].zero_()
    else:
        tensor.index_fill_(0, place, 0.0)
