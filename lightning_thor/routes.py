"""Which process computes which rows of a sharded model's directions, and what has to travel for that."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from lightning_thor.costs import product_cost, sign_cost
from lightning_thor.runs import Cuttable


class Run(NamedTuple):
    """Rows of a layer whose direction one process computes."""

    of: Cuttable
    start: int
    stop: int
    owner: int

    @property
    def cost(self) -> float:
        """Multiplications, about."""
        if self.of.is_polar:
            return 2 * product_cost(self.of.factors) + sign_cost(self.of.factors)
        return (self.stop - self.start) * self.of.cost_of_a_row


class Piece(NamedTuple):
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


def share_out(layers: Sequence[Cuttable], n_processes: int) -> list[Run]:
    """Who computes what, for all layers; the same on all processes.

    A unit goes to the process that holds most of its rows, and of several that hold as many to the one that has least
    to do so far. What cannot be cut goes, the most expensive first, to whoever has least to do.
    """
    loads = [0.0] * n_processes
    runs: list[Run] = []
    for layer in layers:
        if layer.side is not None:
            runs += _runs_of(layer, n_processes, loads)
    whole = [Run(layer, 0, layer.n_rows, 0) for layer in layers if layer.side is None]
    for run in sorted(whole, key=lambda run: run.cost, reverse=True):
        owner = loads.index(min(loads))
        loads[owner] += run.cost
        runs.append(run._replace(owner=owner))
    return runs


def _runs_of(layer: Cuttable, n_processes: int, loads: list[float]) -> list[Run]:
    weight = layer.layer.parameters[0]
    held = rows_of_a_process(weight.shape[0], n_processes)
    cuts = layer.cuts(held)
    runs: list[Run] = []
    for start, stop in pairwise(cuts):
        first, last = layer.rows_in(weight, start, stop)
        holders = range(first // held, (last - 1) // held + 1)
        rows = {holder: min(last, (holder + 1) * held) - max(first, holder * held) for holder in holders}
        owner = min((holder for holder in holders if rows[holder] == max(rows.values())), key=lambda one: loads[one])
        loads[owner] += (stop - start) * layer.cost_of_a_row
        if runs and runs[-1].owner == owner:
            runs[-1] = runs[-1]._replace(stop=stop)
        else:
            runs.append(Run(layer, start, stop, owner))
    return runs


def pieces_of(runs: Sequence[Run], n_processes: int) -> list[Piece]:
    """What each run needs from each process, in the order of the runs, their parameters and rows."""
    pieces: list[Piece] = []
    for index, run in enumerate(runs):
        for number, p in enumerate(run.of.layer.parameters):
            start, stop = run.of.rows_in(p, run.start, run.stop)
            held = rows_of_a_process(p.shape[0], n_processes)
            pieces += [
                Piece(index, number, max(start, holder * held), min(stop, (holder + 1) * held), holder, run.owner)
                for holder in range(start // held, (stop - 1) // held + 1)
            ]
    return pieces


def n_numbers(piece: Piece, parameter: nn.Parameter) -> int:
    """How many numbers a piece of ``parameter`` has."""
    return (piece.stop - piece.start) * (parameter.numel() // parameter.shape[0])
