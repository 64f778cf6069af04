"""From gradients to natural and to polar directions of descent, and to the eigenbasis and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_thor.linalg.dtypes import wide
from lightning_thor.linalg.matrix_sign import msign, part_length
from lightning_thor.preconditioning.grouping import (
    Directions,
    GroupedLayers,
    LayerGroup,
    Matrices,
    SingleLayer,
    Tensors,
    Unit,
)

MSIGN_CHUNK_NUMEL = 2**24
"""Entries of the matrices whose sign is computed at once: enough to fill a device, and a bound on the memory."""

DIRECTION_CHUNK_NUMEL = {"cpu": 2**21}
"""By type of device: entries of natural directions that make a part, which the optimizer uses while it is in the
processor's cache, and whose memory the next part takes. On other devices one part has all, in fewer kernel launches."""


def natural(stored: GroupedLayers, tensors: Tensors) -> Iterator[Directions]:
    """Yield ``G⁻¹ grad A⁻¹`` of each layer and copies of other parameters' gradients, in parts.

    A part has about `DIRECTION_CHUNK_NUMEL` entries; each parameter is in one part.

    Args:
        stored: all layers with curvature; their inverses or roots.
        tensors: gradients by parameter, unchanged.

    Yields:
        Directions by parameter: new tensors in the shapes of ``tensors``, in at least float32.

    Raises:
        ValueError: a gradient is a shard of its parameter; nothing was yielded then.
    """
    groups, directions, numel = complete_groups(stored.groups, tensors), Directions(), 0
    for group in groups:
        limit = DIRECTION_CHUNK_NUMEL.get(group.device_type, math.inf)
        # The projections of a packed attention weight are layers of one parameter: they stay in one part.
        if numel >= limit and directions.keys().isdisjoint(group.parameters):
            yield directions
            directions, numel = {}, 0
        group.put(directions, _precondition(group, tensors, stored), tensors)
        numel += group.numel
    directions.update(copies_of_others(groups, tensors))
    yield directions


def _precondition(group: LayerGroup, tensors: Tensors, stored: GroupedLayers) -> Tensor:
    # A function, so that no variable of `natural` holds the memory of a part that is used up.
    scaled = isinstance(stored.unit, Tensor) or stored.unit != 1.0
    matrices = group.to_matrices(tensors)
    if scaled:
        matrices = _divide(matrices, stored.unit)
    for transposed in stored.decomposition.products:
        matrices = group.product(matrices, transposed)
    assert isinstance(matrices, Tensor)
    return _divide_within_range_(matrices, stored.unit) if scaled else matrices


def polar(stored: GroupedLayers, tensors: Tensors) -> Iterator[Directions]:
    """Yield ``Wᵀ msign(W M Vᵀ) V`` of each polar layer, as one part: steepest descent in the whitened spectral norm,
    of each part of the rows (of the columns, where these are fewer) for itself, see `part_length`, and of each of fused
    parts.

    It equals ``G^-½ msign(G^-½ M A^-½) A^-½`` for any roots W of G⁻¹ and V of A⁻¹: every other pair is ``Q W`` and
    ``P V`` with orthogonal Q and P, and ``msign(Q X Pᵀ) = Q msign(X) Pᵀ``. Other layers have their natural direction,
    parameters without curvature a copy.

    Args:
        stored: all layers with curvature; roots of their inverses.
        tensors: momenta M by parameter, unchanged.

    Yields:
        Directions by parameter, as of `natural`.
    """
    groups, (whiten, whiten_again) = complete_groups(stored.groups, tensors), stored.decomposition.products
    directions = copies_of_others(groups, tensors)
    by_shape: dict[torch.Size, list[tuple[LayerGroup, torch.Size, torch.Size, Tensor]]] = {}
    for group in groups:
        if group.layers[0].name in stored.polar_layers:
            whitened = group.product(_divide(group.to_matrices(tensors), stored.unit), whiten)
            # A matrix for each of fused parts.
            matrices = whitened.unflatten(-2, (-1, group.layers[0].G.width))
            parts = _in_parts(matrices, group)
            by_shape.setdefault(parts.shape[1:], []).append((group, whitened.shape, matrices.shape, parts))
        else:
            group.put(directions, _precondition(group, tensors, stored), tensors)
    for members in by_shape.values():
        signs = _msign_in_chunks(torch.cat([parts for *_, parts in members])).split([len(p) for *_, p in members])
        for (group, whole, shape, _), sign in zip(members, signs, strict=True):
            direction = group.product(_put_together(sign, shape).reshape(whole), whiten_again)
            group.put(directions, _divide_within_range_(direction, stored.unit), tensors)
    yield directions


def change_basis(stored: GroupedLayers, tensors: Tensors, *, back: bool = False) -> Directions:
    """Compute ``Q_Gᵀ X Q_A`` of each layer, with the eigenvectors of its blocks as columns of Q_G and Q_A.

    In these coordinates A ⊗ G is diagonal within its blocks.

    Args:
        stored: all layers with curvature; eigenvectors of their blocks.
        tensors: gradients or moments by parameter, unchanged.
        back: compute ``Q_G X Q_Aᵀ``, the inverse change, instead.

    Returns:
        New tensors by parameter, in the shapes of ``tensors``; copies of parameters without curvature.
    """
    groups = complete_groups(stored.groups, tensors)
    directions = copies_of_others(groups, tensors)
    for group in groups:
        matrices = group.product(group.to_matrices(tensors), stored.decomposition.products[back])
        group.put(directions, matrices, tensors)
    return directions


def complete_groups(groups: Iterable[LayerGroup], tensors: Tensors) -> list[LayerGroup]:
    """Select the layers that are preconditioned and have all their ``tensors``; of incomplete groups one by one.

    Raises:
        ValueError: a tensor is a shard of its parameter.
    """
    complete: list[LayerGroup] = []
    for group in groups:
        if group.is_preconditioned and tensors.keys() >= group.parameters.keys():
            complete.append(group)
            continue
        complete += [
            SingleLayer([layer], [pair])
            for layer, pair in zip(group.layers, group.pairs, strict=True)
            if layer.is_preconditioned and tensors.keys() >= set(layer.parameters)
        ]
    for group in complete:
        for p, name in group.parameters.items():
            if name is not None and tensors[p].shape != p.shape:
                raise ValueError(
                    f"The gradient of {name!r} is {list(tensors[p].shape)}, a shard of its weight {list(p.shape)}. "
                    "Give Thor preconditioner=ShardedCurvature(curvature), of lightning_thor.fsdp.sharded_curvature; "
                    'under a Trainer strategy="thor_fsdp2" does so.'
                )
    return complete


def _divide(matrices: Matrices, unit: Unit) -> Matrices:
    """Divide by ``unit``; returns ``matrices`` themselves where it is 1."""
    if not isinstance(unit, Tensor) and unit == 1.0:
        return matrices
    return matrices / unit if isinstance(matrices, Tensor) else [matrix / unit for matrix in matrices]


def _divide_within_range_(direction: Tensor, unit: Unit) -> Tensor:
    """Divide by ``unit``, or by so much less that the result is in the range of the dtype."""
    if isinstance(unit, Tensor) or unit != 1.0:
        room = torch.finfo(direction.dtype).max / 2 / direction.abs().amax()
        direction.mul_((1.0 / torch.as_tensor(unit, dtype=room.dtype, device=room.device)).minimum(room))
    return direction


def _in_parts(matrices: Tensor, group: LayerGroup) -> Tensor:
    """Cut matrices ``[..., p, q]`` along their smaller side, at borders of its factor's blocks: ``[n, p', q']``."""
    A, G = group.pairs[0]
    p, q = matrices.shape[-2:]
    if p <= q:
        return matrices.reshape(-1, part_length(p, *G.shape[1:3]), q)
    assert A is not None
    columns: Tensor = matrices.unflatten(-1, (-1, part_length(q, *A.shape[1:3])))
    return columns.movedim(-2, -3).flatten(0, -3)


def _put_together(parts: Tensor, shape: torch.Size) -> Tensor:
    """The matrices of ``shape`` whose parts `_in_parts` made."""
    p, q = shape[-2:]
    if p <= q:
        return parts.view(shape)
    return parts.view(*shape[:-2], -1, p, parts.shape[-1]).movedim(-3, -2).flatten(-2)


def _msign_in_chunks(matrices: Tensor) -> Tensor:
    """Compute `msign` of ``[n, rows, columns]``, `MSIGN_CHUNK_NUMEL` entries or one larger matrix at a time."""
    length = max(1, MSIGN_CHUNK_NUMEL // matrices[0].numel())
    signs = [msign(chunk) for chunk in matrices.split(length)]
    return signs[0] if len(signs) == 1 else torch.cat(signs)


def copies_of_others(groups: Iterable[LayerGroup], tensors: Tensors) -> Directions:
    """Copy the tensors of parameters that are in no group, in at least float32; equal shapes by one operation."""
    taken = {p for group in groups for p in group.parameters}
    alike: dict[tuple[torch.Size, torch.dtype], list[nn.Parameter]] = {}
    for p, tensor in tensors.items():
        if p not in taken:
            alike.setdefault((tensor.shape, tensor.dtype), []).append(p)
    copies: Directions = {}
    for (_, dtype), members in alike.items():
        together = torch.stack([tensors[p] for p in members])
        copies.update(zip(members, together.to(wide(dtype)).unbind(), strict=True))
    return copies
