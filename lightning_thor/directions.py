"""From gradients to natural and to polar directions of descent, and to the eigenbasis and back."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from lightning_thor.layer import Layer
from lightning_thor.polar import msign

Kept = tuple[Tensor | None, Tensor]
"""Of one layer ``(A⁻¹, G⁻¹)``, or the roots ``(V, W)`` with ``VᵀV = A⁻¹`` and ``WᵀW = G⁻¹``, or their eigenvectors, as
columns."""

MAX_ENTRIES = 2**24
"""Of all matrices that are made polar at once: enough to fill a device, and a bound on the memory."""


def natural(
    layers: Iterable[Layer], kept: Iterable[Kept], grads: Mapping[nn.Parameter, Tensor], *, roots: bool
) -> dict[nn.Parameter, Tensor]:
    """``G⁻¹ grad A⁻¹`` of each layer, and copies of the gradients of other parameters.

    Args:
        layers: those with curvature.
        kept: of each layer.
        grads: by parameter; nothing in it is changed.
        roots: whether ``kept`` are roots.
    """
    directions: dict[nn.Parameter, Tensor] = {}
    for layer, own, (A, G) in _complete(layers, kept, grads):
        found = _natural_by_roots(layer, own, (A, G)) if roots else layer.precondition(own, A, G)
        _put(directions, layer, found, grads)
    return _with_others(directions, grads)


def polar(
    layers: Iterable[Layer],
    kept: Iterable[Kept],
    momenta: Mapping[nn.Parameter, Tensor],
    *,
    names: Container[str],
) -> dict[nn.Parameter, Tensor]:
    """``Wᵀ msign(W M Vᵀ) V`` of each layer that is in ``names``: steepest descent in the spectral norm, whitened.

    That is ``G^-½ msign(G^-½ M A^-½) A^-½`` for whichever roots W and V: another pair is ``Q W`` and ``P V`` with
    orthogonal Q and P, and ``msign(Q X Pᵀ) = Q msign(X) Pᵀ``. The other layers get their natural direction, and
    parameters without curvature a copy.

    Args:
        layers: those with curvature.
        kept: the roots of each layer.
        momenta: by parameter; nothing in it is changed.
        names: of the layers that are to be polar.
    """
    directions: dict[nn.Parameter, Tensor] = {}
    of_shape: dict[tuple[int, int], list[tuple[Layer, list[Tensor], Kept]]] = {}
    for layer, own, roots in _complete(layers, kept, momenta):
        if layer.A is not None and layer.name in names:
            of_shape.setdefault((layer.G.width, layer.A.width), []).append((layer, own, roots))
        else:
            _put(directions, layer, _natural_by_roots(layer, own, roots), momenta)
    for shape, members in of_shape.items():
        for batch in _batches(members, shape):
            whitened = [_whiten(layer, own, roots) for layer, own, roots in batch]
            signs = msign(torch.cat(whitened)).split([len(matrix) for matrix in whitened])
            for (layer, own, roots), sign in zip(batch, signs, strict=True):
                _put(directions, layer, _whiten_again(layer, sign, own, roots), momenta)
    return _with_others(directions, momenta)


def to_eigenbasis(
    layers: Iterable[Layer], kept: Iterable[Kept], grads: Mapping[nn.Parameter, Tensor], *, back: bool = False
) -> dict[nn.Parameter, Tensor]:
    """``Q_Gᵀ grad Q_A`` of each layer, with the eigenvectors of its blocks as columns, and copies of the gradients of
    other parameters: in these coordinates A ⊗ G is diagonal, as far as its blocks go.

    Args:
        layers: those with curvature.
        kept: the eigenvectors of each layer.
        grads: by parameter; nothing in it is changed.
        back: from there, ``Q_G X Q_Aᵀ``.
    """
    directions: dict[nn.Parameter, Tensor] = {}
    for layer, own, (Q_A, Q_G) in _complete(layers, kept, grads):
        matrix = layer.to_matrix(own, Q_G.dtype)
        left, right = (Q_G, None if Q_A is None else Q_A.mT) if back else (Q_G.mT, Q_A)
        _put(directions, layer, layer.from_matrix(layer.product(left, matrix, right), own), grads)
    return _with_others(directions, grads)


def _natural_by_roots(layer: Layer, own: Sequence[Tensor], roots: Kept) -> list[Tensor]:
    return _whiten_again(layer, _whiten(layer, own, roots), own, roots)


def _whiten(layer: Layer, own: Sequence[Tensor], roots: Kept) -> Tensor:
    """``W M Vᵀ``."""
    V, W = roots
    return layer.product(W, layer.to_matrix(own, W.dtype), None if V is None else V.mT)


def _whiten_again(layer: Layer, matrix: Tensor, own: Sequence[Tensor], roots: Kept) -> list[Tensor]:
    """``Wᵀ X V``, in the shapes and dtypes of ``own``."""
    V, W = roots
    return layer.from_matrix(layer.product(W.mT, matrix, V), own)


def _complete(
    layers: Iterable[Layer], kept: Iterable[Kept], grads: Mapping[nn.Parameter, Tensor]
) -> Iterator[tuple[Layer, list[Tensor], Kept]]:
    """The layers of which all gradients are there, with their parts of them; not those that others precondition.

    Raises:
        ValueError: a gradient is not whole.
    """
    for layer, factors in zip(layers, kept, strict=True):
        own = [layer.own_part(grads[p]) for p in layer.parameters if p in grads]
        if len(own) == len(layer.parameters) and layer.folded_into is None:
            if layer.part is None and any(grad.shape != p.shape for grad, p in zip(own, layer.parameters, strict=True)):
                raise ValueError(
                    f"The gradient of {layer.name!r} is {list(own[0].shape)}, a shard of its weight "
                    f"{list(layer.parameters[0].shape)}. Give Thor preconditioner=ShardedCurvature(curvature), of "
                    'lightning_thor.sharded; under a Trainer strategy="thor_fsdp2" does so.'
                )
            yield layer, own, factors


def _put(
    directions: dict[nn.Parameter, Tensor], layer: Layer, found: Sequence[Tensor], grads: Mapping[nn.Parameter, Tensor]
) -> None:
    """The directions of a layer's parameters, or of its parts of them, to those of the others."""
    for p, direction in zip(layer.parameters, found, strict=True):
        if layer.part is None:
            directions[p] = direction
            continue
        if p not in directions:
            directions[p] = grads[p].clone()
        layer.own_part(directions[p]).copy_(direction)


def _batches(
    members: Sequence[tuple[Layer, list[Tensor], Kept]], shape: tuple[int, int]
) -> Iterator[list[tuple[Layer, list[Tensor], Kept]]]:
    """``members`` in order, in lists of at most `MAX_ENTRIES` entries (or a single layer that has more)."""
    most = max(layer.G.groups for layer, _, _ in members)
    n = max(1, MAX_ENTRIES // (most * shape[0] * shape[1]))
    rest = iter(members)
    while batch := list(islice(rest, n)):
        yield batch


def _with_others(
    directions: dict[nn.Parameter, Tensor], grads: Mapping[nn.Parameter, Tensor]
) -> dict[nn.Parameter, Tensor]:
    directions.update((p, grad.clone()) for p, grad in grads.items() if p not in directions)
    return directions
