"""Curvature for a model whose weights are sharded: each process computes the directions of some rows, for all."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.distributed.communicator import Communicator
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.fsdp.row_partition import (
    RowBlocks,
    RowTransfer,
    assign_rows,
    layer_of_rows,
    n_numbers,
    pieces_of,
    row_blocks_of,
    rows_of_a_process,
)
from lightning_thor.linalg.dtypes import message_dtype, wide
from lightning_thor.preconditioning.grouping import Directions, LayerGroup, Tensors, group_layers
from lightning_thor.preconditioning.modes import MODES


class LocalTransfer(NamedTuple):
    """Rows of a parameter on their way to the process that computes their direction, and back."""

    parameter: nn.Parameter
    piece: RowTransfer
    name: nn.Parameter | None
    """Of the rows' run, if it is this process's."""
    length: int
    dtype: torch.dtype


class RowExchangePlan(NamedTuple):
    """Who does what with the shards of some parameters, as one process sees it."""

    batches: list[LayerGroup]
    """The runs whose directions this process computes."""
    starts: dict[nn.Parameter, int]
    """Of those: where in the parameter each begins, by name."""
    leaving: list[LocalTransfer]
    """What this process holds and another one computes, in the order of those."""
    arriving: list[LocalTransfer]
    """What another one holds and this process computes, in the order of those."""
    staying: list[LocalTransfer]
    sent_lengths: list[int]
    received_lengths: list[int]
    dtype: torch.dtype | None
    """Of the message; None if nothing has to travel between any processes."""


class ShardedCurvature:
    """What a `Thor` preconditions with where ``fully_shard`` (FSDP2) shards its parameters along their first dimension.

    Factors and inverses are those of ``curvature``, whole on each process. A direction is computed once: blocks of a
    factor along the rows of a weight by the process that holds most of their rows, polar directions by one process for
    each layer. One message per step brings all rows there, another one their directions back, and neither is sent if no
    block lies on two processes. Nothing is ever gathered on all of them.

    Args:
        curvature: of the sharded model.
        exchange: the processes over which it is sharded; None for all ranks of the default group.

    Raises:
        ValueError: the curvature is of ``mode="adam"``, whose coordinates mix rows of different processes.
    """

    def __init__(self, curvature: Curvature, communicator: Communicator | None = None) -> None:
        if MODES[curvature.mode].change_basis is not None:
            raise ValueError(
                f'mode="{curvature.mode}" does not go with sharded parameters: its second moments are in coordinates '
                'that mix rows of several ranks. Take strategy="thor_ddp"; thor_fsdp2 has mode="natural" or "polar".'
            )
        self.curvature = curvature
        self._communicator = communicator or ProcessGroupCommunicator()
        self._plans: dict[tuple[bool, frozenset[nn.Parameter]], RowExchangePlan] = {}

    def update(self) -> None:
        """As `Curvature.update`."""
        self.curvature.update()

    def precondition(self, grads: Tensors) -> Directions:
        """As `Curvature.precondition`, of this rank's part of each gradient; of the same parameters on all ranks."""
        (directions,) = self.directions(grads)
        return directions

    def directions(self, tensors: Tensors, mode: str = "natural") -> list[Directions]:
        """As `Curvature.directions`, of this rank's parts, as one part."""
        self.curvature.check_that_it_serves(mode)
        return [self._directions(tensors, mode)]

    @torch.no_grad()
    def _directions(self, shards: Tensors, mode: str) -> Directions:
        is_polar, directions_of = MODES[mode].uses_matrix_sign, MODES[mode].directions
        assert directions_of is not None
        key = is_polar, frozenset(shards)
        if key not in self._plans:
            self._plans[key] = self._plan(shards, is_polar)
        plan, curvature = self._plans[key], self.curvature
        arrived = self._swapped(
            plan, [self._rows(shards[one.parameter], one) for one in plan.leaving], plan.arriving, back=False
        )
        stayed = [self._rows(shards[one.parameter], one) for one in plan.staying]
        runs = _put_together([*plan.arriving, *plan.staying], [*arrived, *stayed])
        with torch.autocast(curvature.stacks.flat_sums.device.type, enabled=False):
            parts = directions_of(curvature.grouped(plan.batches), runs)
            directions = {name: direction for part in parts for name, direction in part.items()}
        returned = self._swapped(
            plan, [_rows_of_a_run(directions, one, plan) for one in plan.arriving], plan.leaving, back=True
        )
        remained = [_rows_of_a_run(directions, one, plan) for one in plan.staying]
        return self._shards_of([*plan.leaving, *plan.staying], [*returned, *remained], shards)

    def _rows(self, shard: Tensor, parcel: LocalTransfer) -> Tensor:
        """A parcel's rows, of what of its parameter lies here; a view."""
        held = rows_of_a_process(parcel.parameter.shape[0], self._communicator.world_size)
        first = held * self._communicator.rank
        return shard[parcel.piece.start - first : parcel.piece.stop - first]

    def _swapped(
        self, plan: RowExchangePlan, sent: list[Tensor], expected: list[LocalTransfer], *, back: bool
    ) -> list[Tensor]:
        """What comes for ``expected`` while ``sent`` leaves: one message, if any at all."""
        if plan.dtype is None:
            return []
        device = self.curvature.stacks.flat_sums.device
        none = torch.empty(0, dtype=plan.dtype, device=device)
        flat = torch.cat([none, *(rows.flatten() for rows in sent)])
        lengths = (plan.sent_lengths, plan.received_lengths)
        received = self._communicator.all_to_all(flat, *(reversed(lengths) if back else lengths))
        parts = received.split([one.length for one in expected])
        return [
            part.view(-1, *one.parameter.shape[1:]).to(wide(one.dtype) if back else one.dtype)
            for one, part in zip(expected, parts, strict=True)
        ]

    def _shards_of(
        self, parcels: Sequence[LocalTransfer], rows: Sequence[Tensor], shards: Mapping[nn.Parameter, Tensor]
    ) -> dict[nn.Parameter, Tensor]:
        """Directions of all that lies here, copies of the gradient where there are none."""
        directions: dict[nn.Parameter, Tensor] = {}
        for one, direction in zip(parcels, rows, strict=True):
            shard = shards[one.parameter]
            if len(direction) == len(shard):
                directions[one.parameter] = direction
                continue
            if one.parameter not in directions:
                directions[one.parameter] = shard.to(wide(shard.dtype), copy=True)
            self._rows(directions[one.parameter], one).copy_(direction)
        rest = {p: shard for p, shard in shards.items() if p not in directions}
        directions.update((p, shard.to(wide(shard.dtype), copy=True)) for p, shard in rest.items())
        return directions

    def _plan(self, shards: Mapping[nn.Parameter, Tensor], is_polar: bool) -> RowExchangePlan:
        n, own = self._communicator.world_size, self._communicator.rank
        runs = assign_rows(row_blocks_of_layers(self.curvature, shards, is_polar=is_polar), n)
        own_runs = {
            index: layer_of_rows(run.of, run.start, run.stop) for index, run in enumerate(runs) if run.owner == own
        }
        starts: dict[nn.Parameter, int] = {}
        parcels: list[LocalTransfer] = []
        travelling: set[torch.dtype] = set()
        for piece in pieces_of(runs, n):
            run = runs[piece.run]
            p = run.of.layer.parameters[piece.parameter]
            if piece.holder != piece.owner:
                travelling.add(shards[p].dtype)
            if own in (piece.holder, piece.owner):
                name = own_runs[piece.run][0].parameters[piece.parameter] if piece.owner == own else None
                parcels.append(LocalTransfer(p, piece, name, n_numbers(piece, p), shards[p].dtype))
                if name is not None:
                    starts[name] = run.of.rows_in(p, run.start, run.stop)[0]
        leaving = sorted((one for one in parcels if one.piece.owner != own), key=lambda one: one.piece.owner)
        arriving = sorted((one for one in parcels if one.piece.holder != own), key=lambda one: one.piece.holder)
        batches = group_layers(
            [layer for layer, _ in own_runs.values()],
            [kept for _, kept in own_runs.values()],
            self.curvature.polar_layers,
        )
        return RowExchangePlan(
            list(batches),
            starts,
            leaving,
            arriving,
            [one for one in parcels if one.piece.owner == one.piece.holder],
            [sum(one.length for one in leaving if one.piece.owner == other) for other in range(n)],
            [sum(one.length for one in arriving if one.piece.holder == other) for other in range(n)],
            message_dtype(travelling) if travelling else None,
        )


def row_blocks_of_layers(
    curvature: Curvature, parameters: Container[nn.Parameter], *, is_polar: bool
) -> list[RowBlocks]:
    """What is to be shared out: of all layers whose parameters are there.

    Args:
        curvature: of the model.
        parameters: those of which there are gradients.
        is_polar: for polar directions, of the layers that have them.
    """
    parts: list[RowBlocks] = []
    for name, layer in curvature.layers.items():
        if layer.is_preconditioned and all(p in parameters for p in layer.parameters):
            parts += row_blocks_of(
                layer, curvature.inverses_of(name), is_polar=is_polar and name in curvature.polar_layers
            )
    return parts


def _put_together(parcels: Sequence[LocalTransfer], rows: Sequence[Tensor]) -> dict[nn.Parameter, Tensor]:
    """All rows of each run, by its name."""
    found: dict[nn.Parameter, list[tuple[int, Tensor]]] = {}
    for one, part in zip(parcels, rows, strict=True):
        assert one.name is not None
        found.setdefault(one.name, []).append((one.piece.start, part))
    return {
        name: parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in sorted(parts, key=lambda x: x[0])])
        for name, parts in found.items()
    }


def _rows_of_a_run(directions: Mapping[nn.Parameter, Tensor], parcel: LocalTransfer, plan: RowExchangePlan) -> Tensor:
    assert parcel.name is not None
    start = plan.starts[parcel.name]
    return directions[parcel.name][parcel.piece.start - start : parcel.piece.stop - start]
