"""Which rank computes which rows of a sharded model's directions, and what has to travel for that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_thor.distributed.assignment import FactorShapes, product_cost, sign_cost
from lightning_thor.layers.base import Layer
from lightning_thor.linalg.block_diagonal import BlockPartition
from lightning_thor.preconditioning.grouping import FactorPair


class RowBlocks(NamedTuple):
    """A layer, or one parameter of it, and the factor whose blocks say which of its rows belong together.

    Rows are those of the parameters' first dimension, counted from the first one that is the layer's own.
    """

    layer: Layer
    kept: FactorPair
    side: str | None
    """``"A"`` or ``"G"``: the factor that lies along the rows; None where all rows belong together."""
    n_rows: int
    entries: int = 1
    """How many coordinates of that factor one row takes: more than one where a norm's scale has several dimensions."""
    is_polar: bool = False
    """Whether its direction is to be polar, for which all rows belong together."""

    @property
    def factors(self) -> FactorShapes:
        """How its factors are cut."""
        return self.layer.A, self.layer.G

    @property
    def blocks(self) -> BlockPartition | None:
        """The blocks along the rows."""
        return self.layer.A if self.side == "A" else self.layer.G if self.side == "G" else None

    @property
    def unit(self) -> int:
        """How many rows belong together: a block's, or those of a group where there are several."""
        blocks = self.blocks
        if blocks is None:
            return self.n_rows
        return max(1, (blocks.size if blocks.groups == 1 else blocks.width) // self.entries)

    @property
    def cost_of_a_row(self) -> float:
        """Multiplications that the products with the blocks take for each row."""
        return product_cost(self.factors) / self.n_rows

    def rows_in(self, parameter: nn.Parameter, start: int, stop: int) -> tuple[int, int]:
        """Where rows ``start`` to ``stop`` lie in one of the layer's parameters."""
        if self.layer.param_slice is not None:
            return self.layer.param_slice.start + start, self.layer.param_slice.start + stop
        # The bias of a weight [in, out] that is not cut has as many rows as it has itself.
        return (0, parameter.shape[0]) if self.side is None else (start, stop)

    def cuts(self, rows_of_a_process: int) -> list[int]:
        """Where it is to be cut, from 0 to ``n_rows``: no unit in two, and runs of one process's rows not at all.

        >>> from lightning_thor.layers.discovery import discover_layers
        >>> layers, _ = discover_layers(nn.Linear(2, 12, bias=False), block_size=4, precondition_bias=False)
        >>> [one] = row_blocks_of(layers[""], (None, torch.empty(1, 3, 4, 4)))
        >>> one.cuts(6), one.cuts(3), one.cuts(4)
        ([0, 4, 8, 12], [0, 4, 8, 12], [0, 4, 8, 12])
        """
        first_row = 0 if self.layer.param_slice is None else self.layer.param_slice.start
        first_border = rows_of_a_process - first_row % rows_of_a_process
        cuts = {0, self.n_rows}
        for border in range(first_border, self.n_rows, rows_of_a_process):
            below = border // self.unit * self.unit
            cuts |= {below, below if below == border else min(below + self.unit, self.n_rows)}
        return sorted(cuts)


def row_blocks_of(layer: Layer, kept: FactorPair, *, is_polar: bool = False) -> Iterator[RowBlocks]:
    """What belongs together in a layer's natural direction ``G⁻¹ grad A⁻¹``.

    A factor along the rows is block-diagonal, and the other one acts within each row. Norms are divisions, so their
    scale and their shift are apart as well.

    Args:
        layer: one with curvature.
        kept: of it.
        is_polar: its direction is to be polar, for which all of it belongs together.
    """
    if layer.A is not None:
        part, weight = layer.param_slice, layer.parameters[0]
        uncut = is_polar or (layer.kind.row_factor == "A" and layer.with_bias)
        n_rows = weight.shape[0] if part is None else part.stop - part.start
        yield RowBlocks(layer, kept, None if uncut else layer.kind.row_factor, n_rows, is_polar=is_polar)
        return
    begin, (_, G) = 0, kept
    for p in layer.parameters:
        n = p.numel()
        own = replace(layer, parameters=(p,), G=layer.G._replace(width=n, n_blocks=n))
        yield RowBlocks(own, (None, G[:, begin : begin + n]), "G", p.shape[0], n // p.shape[0])
        begin += n


def layer_of_rows(row_blocks: RowBlocks, start: int, stop: int) -> tuple[Layer, FactorPair]:
    """Rows ``start`` to ``stop`` of a layer (borders of its units) as a layer of their own, and what is kept of them.

    Its parameters are mere names: new, without storage, in the shape of the rows.
    """
    layer, (A_kept, G_kept), blocks = row_blocks.layer, row_blocks.kept, row_blocks.blocks
    A, G = layer.A, layer.G
    if blocks is not None:
        width = (stop - start) * row_blocks.entries
        place = slice(start * row_blocks.entries // row_blocks.unit, -(-stop * row_blocks.entries // row_blocks.unit))
        # Groups of a convolution have an A and a G each; the parts of a fused linear layer share their A.
        if row_blocks.side == "G" or G.groups == blocks.groups > 1:
            G, G_kept = _some_of(G, G_kept, place, width)
        if A is not None and A_kept is not None and (row_blocks.side == "A" or A.groups == blocks.groups > 1):
            A, A_kept = _some_of(A, A_kept, place, width)
    rows = [row_blocks.rows_in(p, start, stop) for p in layer.parameters]
    shapes = [(end - begin, *p.shape[1:]) for p, (begin, end) in zip(layer.parameters, rows, strict=True)]
    names = _names(shapes, layer.parameters)
    use = replace(layer.uses[0], param_slice=None)
    return replace(layer, uses=(use,), parameters=names, A=A, G=G), (A_kept, G_kept)


def _some_of(blocks: BlockPartition, kept: Tensor, place: slice, width: int) -> tuple[BlockPartition, Tensor]:
    """Some groups of a factor, or some blocks of the only one; a view."""
    if blocks.groups > 1:
        return blocks._replace(groups=place.stop - place.start), kept[place]
    return blocks._replace(width=width, n_blocks=place.stop - place.start), kept[:, place]


def _names(shapes: Iterable[tuple[int, ...]], of: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    return tuple(
        nn.Parameter(torch.empty(shape, dtype=p.dtype, device="meta"), requires_grad=False)
        for shape, p in zip(shapes, of, strict=True)
    )


class RowRange(NamedTuple):
    """Rows of a layer whose direction one process computes."""

    of: RowBlocks
    start: int
    stop: int
    owner: int

    @property
    def cost(self) -> float:
        """Multiplications, about."""
        if self.of.is_polar:
            return 2 * product_cost(self.of.factors) + sign_cost(self.of.factors)
        return (self.stop - self.start) * self.of.cost_of_a_row


class RowTransfer(NamedTuple):
    """Rows of one parameter that lie on one process and belong to a run of another one, or of its own."""

    run: int
    parameter: int
    """Of the run's layer, counted from 0."""
    start: int
    """In the parameter, as is ``stop``."""
    stop: int
    holder: int
    owner: int


def rows_of_a_process(n_rows: int, n_processes: int) -> int:
    """How many rows each process holds, but for the last ones that do (``fully_shard``: `torch.chunk`)."""
    return -(-n_rows // n_processes)


def assign_rows(layers: Sequence[RowBlocks], n_processes: int) -> list[RowRange]:
    """Who computes what, for all layers; the same on all processes.

    A unit goes to the process that holds most of its rows, and of several that hold as many to the one that has least
    to do so far. What cannot be cut goes, the most expensive first, to whoever has least to do.
    """
    loads = [0.0] * n_processes
    runs: list[RowRange] = []
    for layer in layers:
        if layer.side is not None:
            runs += _runs_of(layer, n_processes, loads)
    whole = [RowRange(layer, 0, layer.n_rows, 0) for layer in layers if layer.side is None]
    for run in sorted(whole, key=lambda run: run.cost, reverse=True):
        owner = loads.index(min(loads))
        loads[owner] += run.cost
        runs.append(run._replace(owner=owner))
    return runs


def _runs_of(layer: RowBlocks, n_processes: int, loads: list[float]) -> list[RowRange]:
    weight = layer.layer.parameters[0]
    held = rows_of_a_process(weight.shape[0], n_processes)
    cuts = layer.cuts(held)
    runs: list[RowRange] = []
    for start, stop in pairwise(cuts):
        first, last = layer.rows_in(weight, start, stop)
        holders = range(first // held, (last - 1) // held + 1)
        rows = {holder: min(last, (holder + 1) * held) - max(first, holder * held) for holder in holders}
        owner = min((holder for holder in holders if rows[holder] == max(rows.values())), key=lambda one: loads[one])
        loads[owner] += (stop - start) * layer.cost_of_a_row
        if runs and runs[-1].owner == owner:
            runs[-1] = runs[-1]._replace(stop=stop)
        else:
            runs.append(RowRange(layer, start, stop, owner))
    return runs


def pieces_of(runs: Sequence[RowRange], n_processes: int) -> list[RowTransfer]:
    """What each run needs from each process, in the order of the runs, their parameters and rows."""
    pieces: list[RowTransfer] = []
    for index, run in enumerate(runs):
        for number, p in enumerate(run.of.layer.parameters):
            start, stop = run.of.rows_in(p, run.start, run.stop)
            held = rows_of_a_process(p.shape[0], n_processes)
            pieces += [
                RowTransfer(index, number, max(start, holder * held), min(stop, (holder + 1) * held), holder, run.owner)
                for holder in range(start // held, (stop - 1) // held + 1)
            ]
    return pieces


def n_numbers(piece: RowTransfer, parameter: nn.Parameter) -> int:
    """How many numbers a piece of ``parameter`` has."""
    return (piece.stop - piece.start) * (parameter.numel() // parameter.shape[0])
