"""Shared directions: each group of processes computes its layers' directions, and one message gathers them all."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_thor.distributed.assignment import assign_greedily, inversion_cost, product_cost, sign_cost
from lightning_thor.distributed.communicator import Communicator, all_gather_uneven, uneven_layout
from lightning_thor.layers.base import Layer
from lightning_thor.linalg.dtypes import message_dtype, wide
from lightning_thor.preconditioning.grouping import Directions

STEPS_PER_REFRESH = 10.0
"""Steps that an inverse serves: the default interval up to step 1,000. With another one only the balance suffers."""


class SharedDirections:
    """Assigns each layer to a group of processes, which store its inverses and make its direction for all.

    Layers go to groups greedily by their cost; layers that have a parameter in common (slices of a packed one, a table
    and the output layer tied to it) go together. All processes must have gradients of the same parameters, as they have
    under DDP.

    Args:
        communicator: of one process of each group; where it has this process alone, this makes all directions.
        layers: all layers with curvature, by name.
        products: number of products of a layer's matrix with the stored blocks of both its factors in one direction.
        polar: names of the layers whose directions are polar.

    Attributes:
        own: indices of this group's layers, in order.
        group_of: the group of each layer, by its index.
    """

    def __init__(
        self, communicator: Communicator, layers: Mapping[str, Layer], *, products: int, polar: Container[str]
    ) -> None:
        self._communicator = communicator
        self._world_size, self._rank = communicator.world_size, communicator.rank
        parameters = [layer.parameters for layer in layers.values()]
        costs = [_cost(layer, products, name in polar) for name, layer in layers.items()]
        tied = _tied(parameters)
        owners = assign_greedily([sum(costs[layer] for layer in some) for some in tied], self._world_size)
        members: list[list[int]] = [[] for _ in range(self._world_size)]
        for some, owner in zip(tied, owners, strict=True):
            members[owner] += some
        self.own = sorted(members[self._rank])
        self.group_of = {layer: group for group, some in enumerate(members) for layer in some}
        # Ordered, unlike sets: all processes must read the message alike.
        self._parameters = [dict.fromkeys(p for layer in group for p in parameters[layer]) for group in members]
        self._elsewhere = set().union(*self._parameters) - self._parameters[self._rank].keys()

    def own_grads(self, grads: Mapping[nn.Parameter, Tensor]) -> Mapping[nn.Parameter, Tensor]:
        """Select from all ``grads`` the ones whose directions this process computes: of its layers, and of parameters
        without curvature."""
        return {p: grad for p, grad in grads.items() if p not in self._elsewhere} if self._elsewhere else grads

    def all_gather_uneven(
        self, parts: Iterable[Directions], grads: Mapping[nn.Parameter, Tensor]
    ) -> Iterator[Directions]:
        """Gather the directions of all processes by one message, in the widest dtype of the gradients, but in float32
        where that is float16, whose range directions may leave.

        Args:
            parts: directions of `own_grads`, some at a time.
            grads: of all parameters.

        Yields:
            ``parts``, if this process is alone; otherwise the directions of all parameters at once, bitwise the same on
            all processes.
        """
        if self._world_size == 1:
            yield from parts
            return
        directions: Directions = {}
        for part in parts:
            directions.update(part)
        sent = [[p for p in parameters if p in grads] for parameters in self._parameters]
        dtypes = [grads[p].dtype for group in sent for p in group]
        if dtypes:
            dtype, device = message_dtype(dtypes), next(iter(grads.values())).device
            own = [directions[p].flatten().to(dtype) for p in sent[self._rank]]
            layout = uneven_layout([sum(p.numel() for p in group) for group in sent])
            message = torch.cat(own or [torch.empty(0, dtype=dtype, device=device)])
            flat = all_gather_uneven(message, layout, self._communicator)
            for start, group in zip(layout.starts, sent, strict=True):
                for p in group:
                    directions[p] = flat[start : start + p.numel()].view(p.shape).to(wide(grads[p].dtype))
                    start += p.numel()
        yield directions

    def add_up_(self, count: Tensor, before: Tensor) -> None:
        """``count = before + all_reduce(count - before)``: what was counted for this group's layers, for all layers.

        Args:
            count: 0-dimensional; changed in place.
            before: its earlier value, which was the same on all processes.
        """
        if self._world_size > 1:
            count.copy_(before + self.sum_((count - before).view(1))[0])

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the groups, in place, of a tensor that is contiguous."""
        self._communicator.all_reduce(tensor).wait()
        return tensor


def _cost(layer: Layer, products: int, is_polar: bool) -> float:
    """Multiplications of one step's direction, and of its part of a refresh."""
    factors = layer.A, layer.G
    inversions = (inversion_cost(layer.A) + inversion_cost(layer.G)) / STEPS_PER_REFRESH
    return product_cost(factors) * products + (sign_cost(factors) if is_polar else 0.0) + inversions


def _tied(parameters: Sequence[Iterable[nn.Parameter]]) -> list[list[int]]:
    """The indices of layers, given the parameters of each, together where they have a parameter in common."""
    groups: dict[int, list[int]] = {}
    """By the last index in them."""
    group_with: dict[nn.Parameter, list[int]] = {}
    for index, own in enumerate(parameters):
        members = [index]
        for last in sorted({group_with[p][-1] for p in own if p in group_with}):
            members = groups.pop(last) + members
        groups[index] = members
        group_with.update((p, members) for layer in members for p in parameters[layer])
    return list(groups.values())
