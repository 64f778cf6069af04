"""Directions shared out: each group of processes makes those of its layers, and one message brings all to all."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_thor.distributed.assignment import assign_greedily, inversion_cost, product_cost, sign_cost
from lightning_thor.distributed.communicator import Communicator, all_gather_uneven, uneven_layout
from lightning_thor.layers.base import Layer
from lightning_thor.linalg.dtypes import message_dtype, wide

Directions = dict[nn.Parameter, Tensor]


STEPS_PER_REFRESH = 10.0
"""How many steps an inverse serves: the default interval. Of another one only the balance suffers."""


class SharedDirections:
    """Which layers' inverses a process keeps, and how it gets the directions that others make with theirs.

    Layers go to groups by cost, the largest first; those that have a parameter in common (parts of a packed one, a
    table and the output layer tied to it) go together. All processes must be given gradients of the same parameters,
    as they are under DDP.

    Args:
        exchange: one process of each group; alone, this process makes all directions.
        layers: those with curvature, by name.
        products: how many times a direction multiplies a layer's matrix by what is kept of both its factors.
        polar: names of the layers that are to be polar.

    Attributes:
        own: the numbers of the layers of this process's group, in order.
    """

    def __init__(
        self, communicator: Communicator, layers: Mapping[str, Layer], *, products: int, polar: Container[str]
    ) -> None:
        self._communicator = communicator
        costs = [_cost(layer, products, name in polar) for name, layer in layers.items()]
        units = _units(list(layers.values()))
        groups = assign_greedily([sum(costs[layer] for layer in unit) for unit in units], communicator.world_size)
        members: list[list[int]] = [[] for _ in range(communicator.world_size)]
        for unit, group in zip(units, groups, strict=True):
            members[group - 1] += unit
        self.own = sorted(members[communicator.rank])
        # Ordered, unlike sets.
        parameters = [layer.parameters for layer in layers.values()]
        self._parameters = [dict.fromkeys(p for layer in group for p in parameters[layer]) for group in members]
        self._elsewhere = set().union(*self._parameters) - self._parameters[communicator.rank].keys()

    def own_grads(self, grads: Mapping[nn.Parameter, Tensor]) -> Mapping[nn.Parameter, Tensor]:
        """Those of ``grads`` whose directions this process makes: its layers', and of parameters without curvature."""
        return {p: grad for p, grad in grads.items() if p not in self._elsewhere} if self._elsewhere else grads

    def all_gather_uneven(
        self, parts: Iterable[Directions], grads: Mapping[nn.Parameter, Tensor]
    ) -> Iterator[Directions]:
        """The parts of the directions of `own_grads`, as they come, if this process is alone; else one that has those
        of the others too, bitwise the same on all processes, by one message in the widest dtype of the gradients, or in
        float32 where that is float16, which directions may leave."""
        if self._communicator.world_size == 1:
            yield from parts
            return
        directions: Directions = {}
        for part in parts:
            directions.update(part)
        given = [[p for p in parameters if p in grads] for parameters in self._parameters]
        travelling = [grads[p].dtype for group in given for p in group]
        if travelling:
            dtype = message_dtype(travelling)
            own = [directions[p].flatten().to(dtype) for p in given[self._communicator.rank]]
            places = uneven_layout([sum(p.numel() for p in group) for group in given])
            device = next(iter(grads.values())).device
            message = torch.cat(own or [torch.empty(0, dtype=dtype, device=device)])
            flat = all_gather_uneven(message, places, self._communicator)
            for start, group in zip(places.starts, given, strict=True):
                for p in group:
                    directions[p] = flat[start : start + p.numel()].view(p.shape).to(wide(grads[p].dtype))
                    start += p.numel()
        yield directions

    def add_up_(self, count: Tensor, before: Tensor) -> None:
        """Let ``count``, which rose from ``before`` by what happened to own layers, rise by what did to all layers."""
        if self._communicator.world_size > 1:
            risen = (count - before).view(1)
            self._communicator.all_reduce(risen).wait()
            count.copy_(before + risen[0])


def _cost(layer: Layer, products: int, is_polar: bool) -> float:
    """Multiplications of one step's direction, and of its part of a refresh."""
    cut = layer.A, layer.G
    inversions = (inversion_cost(layer.A) + inversion_cost(layer.G)) / STEPS_PER_REFRESH
    return product_cost(cut) * products + (sign_cost(cut) if is_polar else 0.0) + inversions


def _units(layers: Sequence[Layer]) -> list[list[int]]:
    """The layers, together where they have a parameter in common."""
    units: list[tuple[list[int], set[nn.Parameter]]] = []
    for index, layer in enumerate(layers):
        members, parameters, apart = [index], set(layer.parameters), []
        for unit in units:
            if parameters.isdisjoint(unit[1]):
                apart.append(unit)
            else:
                members, parameters = unit[0] + members, parameters | unit[1]
        units = [*apart, (members, parameters)]
    return [members for members, _ in units]
