"""Curvature for a model whose weights are sharded: each rank computes the directions of some blocks, for all ranks."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.distributed.communicator import Communicator
from lightning_thor.distributed.dtensor import Boxes, boxes_of
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.fsdp.box_partition import (
    LayerBlocks,
    Transfer,
    assign_parts,
    by_ranks,
    layer_blocks_of,
    transfers_of,
)
from lightning_thor.layers.base import Layer
from lightning_thor.linalg.dtypes import message_dtype, wide
from lightning_thor.preconditioning.grouping import (
    Directions,
    FactorPair,
    GroupedLayers,
    LayerGroup,
    Tensors,
    group_layers,
)
from lightning_thor.preconditioning.modes import MODES

MOST_PLANS = 128
"""Plans that are remembered, those that were used last."""


class ExchangePlan(NamedTuple):
    """What one rank computes and exchanges for the directions of some parameters."""

    groups: list[LayerGroup]
    """This rank's parts, as layers."""
    leaving: list[Transfer]
    """What this rank holds and another one owns, in the order of owners."""
    arriving: list[Transfer]
    """What another rank holds and this one owns, in the order of holders."""
    staying: list[Transfer]
    """What this rank holds and owns."""
    sent_lengths: list[int]
    """Numbers that leave for each rank, ``[world_size]``."""
    received_lengths: list[int]
    """Numbers that arrive from each rank, ``[world_size]``."""
    dtype: torch.dtype | None
    """Of the message; None if no rank sends anything."""


class ShardedCurvature:
    """What a `Thor` preconditions with where its parameters are sharded: by ``fully_shard`` (FSDP2) over all ranks or
    within replicas (HSDP), by tensor parallelism, or by both.

    Factors and inverses are those of ``curvature``, whole on each rank; with ``inverse_workers`` (of
    `lightning_thor.ThorModelParallelStrategy`) a layer's inverses are on some ranks. Each direction is computed once in
    a replica: a block of G times a block of A by the rank that holds most of its part of the weight, or by that rank's
    neighbour which stores the inverses; polar directions of a layer by one rank. One message per step sends the parts
    of weights that another rank needs, another one sends their directions back, and neither is sent if nobody needs
    any. No rank gathers all gradients.

    Args:
        curvature: of the sharded model.
        communicator: all ranks of the default group, which None stands for.
        boxes_of: returns the boxes of a parameter that ranks have; by default those of a DTensor, and of another tensor
            all of it.
    """

    def __init__(
        self,
        curvature: Curvature,
        communicator: Communicator | None = None,
        boxes_of: Callable[[nn.Parameter], Boxes] = boxes_of,
    ) -> None:
        if not isinstance(curvature, Curvature):
            raise TypeError(
                "ShardedCurvature takes a curvature, ShardedCurvature(Curvature(model)), got a "
                f"{type(curvature).__name__}."
            )
        self.curvature = curvature
        self._communicator = curvature.timed(communicator or ProcessGroupCommunicator())
        self._boxes_of = boxes_of
        self._plans: dict[tuple[bool, int, frozenset[nn.Parameter]], ExchangePlan] = {}

    @property
    def fan_in(self) -> dict[nn.Parameter, int]:
        """As of `Curvature`."""
        return self.curvature.fan_in

    @property
    def weight_of(self) -> dict[nn.Parameter, nn.Parameter]:
        """As of `Curvature`."""
        return self.curvature.weight_of

    def update(self) -> None:
        """As `Curvature.update`."""
        self.curvature.update()

    def forget(self) -> None:
        """As `Curvature.forget`."""
        self.curvature.forget()

    def due_parameters(self) -> set[nn.Parameter]:
        """As `Curvature.due_parameters`."""
        return self.curvature.due_parameters()

    @property
    def gradient_unit(self) -> float | Tensor:
        """As `Curvature.gradient_unit`."""
        return self.curvature.gradient_unit

    def precondition(self, grads: Tensors, mode: str = "natural") -> Directions:
        """As `Curvature.precondition`, of shards.

        Args:
            grads: this rank's shard of each gradient, of the same parameters on all ranks; nothing in it is changed.
            mode: name of a mode that the curvature serves.

        Returns:
            This rank's shard of each direction.
        """
        (directions,) = self.directions(grads, mode)
        return directions

    @torch.no_grad()
    def directions(self, tensors: Tensors, mode: str = "natural") -> list[Directions]:
        """As `precondition`, in one part, like `Curvature.directions`."""
        directions_of = MODES[mode].directions
        assert directions_of is not None, f"{mode} mode has a change of basis"

        def compute(stored: GroupedLayers, own: Tensors) -> Directions:
            return {p: direction for some in directions_of(stored, own) for p, direction in some.items()}

        return [self._compute(mode, compute, tensors)]

    @torch.no_grad()
    def change_basis(self, tensors: Tensors, mode: str = "adam", *, back: bool = False) -> Directions:
        """As `Curvature.change_basis`, of shards: the new coordinates of a shard are where the shard is.

        Args:
            tensors: this rank's shards, of the same parameters on all ranks.
            mode: as of `precondition`.
            back: take tensors from these coordinates instead.

        Returns:
            This rank's shard of each tensor in the other coordinates.
        """
        change = MODES[mode].change_basis
        assert change is not None, f"{mode} mode has no change of basis"
        return self._compute(mode, partial(change, back=back), tensors)

    def _compute(
        self, mode: str, compute: Callable[[GroupedLayers, Tensors], Directions], shards: Tensors
    ) -> Directions:
        """Exchange boxes of the shards, compute something of whole blocks, and exchange the results."""
        self.curvature.check_that_it_serves(mode)
        is_polar = MODES[mode].uses_matrix_sign
        # A layer that is left out or included later makes a new plan, as does one that some steps do not use.
        key = is_polar, self.curvature.n_changes, frozenset(shards)
        plan, curvature = self._plans.pop(key, None) or self._plan(shards, is_polar), self.curvature
        self._plans[key] = plan
        if len(self._plans) > MOST_PLANS:
            del self._plans[next(iter(self._plans))]
        arrived = self._exchange(plan, _held(plan.leaving, shards), plan.arriving, shards)
        parts = _assembled(plan, [*arrived, *_held(plan.staying, shards)])
        with torch.autocast(curvature.factors.device.type, enabled=False), curvature.part("directions"):
            directions = compute(curvature.grouped(plan.groups), parts)
        returned = self._exchange(plan, _owned(plan.arriving, directions), plan.leaving, shards, back=True)
        return _to_shards(plan, [*returned, *_owned(plan.staying, directions)], shards)

    def _exchange(
        self, plan: ExchangePlan, sent: list[Tensor], expected: list[Transfer], shards: Tensors, *, back: bool = False
    ) -> list[Tensor]:
        """Send boxes and receive the expected ones, or their directions (``back``): one message, or none at all."""
        if plan.dtype is None:
            return []
        none = torch.empty(0, dtype=plan.dtype, device=self.curvature.factors.device)
        # Directions of bfloat16 are float32 here, and a rank that sends nothing would not know it.
        message = torch.cat([none, *(some.flatten() for some in sent)]).to(plan.dtype)
        lengths = (plan.sent_lengths, plan.received_lengths)
        received = self._communicator.all_to_all(message, *(reversed(lengths) if back else lengths))
        found = []
        for one, some in zip(expected, received.split([one.numel for one in expected]), strict=True):
            dtype = shards[one.parameter].dtype
            found.append(some.view(one.shape).to(wide(dtype) if back else dtype))
        return found

    def _plan(self, shards: Tensors, is_polar: bool) -> ExchangePlan:
        world_size, rank = self._communicator.world_size, self._communicator.rank
        boxes = {p: self._boxes_of(p) for p in shards}
        layers = layer_blocks_of_layers(self.curvature, shards, is_polar=is_polar)
        parts = [part for some in by_ranks(layers, boxes) for part in assign_parts(some, boxes)]
        own = [one for one in parts if one.owner == rank]
        groups = group_layers([one.layer for one in own], [one.pair for one in own], self.curvature.polar_layers)
        transfers = transfers_of(parts, boxes)
        moving = [one for one in transfers if one.holder != one.owner]
        leaving = sorted((one for one in moving if one.holder == rank), key=lambda one: one.owner)
        arriving = sorted((one for one in moving if one.owner == rank), key=lambda one: one.holder)
        dtypes = {shards[one.parameter].dtype for one in moving}
        return ExchangePlan(
            groups=list(groups),
            leaving=leaving,
            arriving=arriving,
            staying=[one for one in transfers if one.holder == one.owner == rank],
            sent_lengths=[sum(one.numel for one in leaving if one.owner == other) for other in range(world_size)],
            received_lengths=[sum(one.numel for one in arriving if one.holder == other) for other in range(world_size)],
            dtype=message_dtype(dtypes) if dtypes else None,
        )


def layer_blocks_of_layers(
    curvature: Curvature, parameters: Container[nn.Parameter], *, is_polar: bool
) -> list[LayerBlocks]:
    """`layer_blocks_of` each layer of ``curvature`` whose parameters all have gradients, thus are among ``parameters``;
    ``is_polar`` says whether polar layers have polar directions."""
    stored = curvature.factors.has_inverse
    return [
        layer_blocks
        for number, (name, layer) in enumerate(curvature.layers.items())
        if layer.is_preconditioned and all(p in parameters for p in layer.parameters)
        for layer_blocks in layer_blocks_of(
            layer,
            curvature.inverses_of(name) if number in stored else _stored_elsewhere(layer),
            is_polar=is_polar and name in curvature.polar_layers,
            workers=curvature.workers_of(name),
        )
    ]


def _stored_elsewhere(layer: Layer) -> FactorPair:
    """In place of the blocks of a layer that another rank stores: tensors of their shapes, without memory."""
    A, G = (None if one is None else torch.empty(one.shape, device="meta") for one in (layer.A, layer.G))
    assert G is not None
    return A, G


def _held(transfers: Sequence[Transfer], shards: Tensors) -> list[Tensor]:
    """The box of each transfer in this rank's shards; views."""
    return [one.in_shard.of(shards[one.parameter]) for one in transfers]


def _owned(transfers: Sequence[Transfer], directions: Tensors) -> list[Tensor]:
    """The box of each transfer in the directions of this rank's parts; views."""
    return [one.in_part.of(directions[one.placeholder]) for one in transfers]


def _assembled(plan: ExchangePlan, boxes: Sequence[Tensor]) -> Directions:
    """All of this rank's parts, by placeholder.

    ``boxes`` are of ``plan.arriving``, then of ``plan.staying``.
    """
    found: Directions = {}
    for one, some in zip([*plan.arriving, *plan.staying], boxes, strict=True):
        p = one.placeholder
        if some.shape == p.shape:
            found[p] = some
            continue
        if p not in found:
            found[p] = some.new_empty(p.shape)
        one.in_part.of(found[p]).copy_(some)
    return found


def _to_shards(plan: ExchangePlan, boxes: Sequence[Tensor], shards: Tensors) -> Directions:
    """Directions of this rank's shards; copies of the gradients where there is no direction.

    ``boxes`` are directions of ``plan.leaving``, then of ``plan.staying``.
    """
    directions: Directions = {}
    for one, direction in zip([*plan.leaving, *plan.staying], boxes, strict=True):
        p = one.parameter
        if direction.shape == shards[p].shape:
            directions[p] = direction
            continue
        if p not in directions:
            directions[p] = shards[p].to(wide(shards[p].dtype), copy=True)
        one.in_shard.of(directions[p]).copy_(direction)
    rest = {p: shard for p, shard in shards.items() if p not in directions}
    directions.update((p, shard.to(wide(shard.dtype), copy=True)) for p, shard in rest.items())
    return directions
