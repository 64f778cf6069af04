"""From gradients to natural and to polar directions of descent, and to the eigenbasis and back."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_thor.linalg.dtypes import wide
from lightning_thor.linalg.matrix_sign import msign
from lightning_thor.preconditioning.grouping import LayerGroup, Matrices, SingleLayer, Tensors

Unit = float | Tensor


MSIGN_CHUNK_NUMEL = 2**24
"""Of all matrices that are made polar at once: enough to fill a device, and a bound on the memory."""


DIRECTION_CHUNK_NUMEL = {"cpu": 2**21}
"""Of natural directions, before they are used: what is still in the processor's cache then, and whose memory the next
ones find there. A device that is not named makes all at once, since it takes longer to be told more often."""


def natural(
    batches: Iterable[LayerGroup], grads: Tensors, *, roots: bool, unit: Unit = 1.0
) -> dict[nn.Parameter, Tensor]:
    """``G⁻¹ grad A⁻¹`` of each layer, and copies of the gradients of other parameters.

    Args:
        batches: all layers with curvature.
        grads: by parameter; nothing in it is changed.
        roots: whether roots of the inverses are kept.
        unit: what output gradients were divided by to be rows of G, see `FactorState.gradient_unit`.
    """
    parts = natural_in_parts(batches, grads, roots=roots, unit=unit)
    return {p: one for part in parts for p, one in part.items()}


def natural_in_parts(
    batches: Iterable[LayerGroup], grads: Tensors, *, roots: bool, unit: Unit = 1.0
) -> Iterator[dict[nn.Parameter, Tensor]]:
    """What `natural` gives, about `DIRECTION_CHUNK_NUMEL` entries at a time; each parameter once."""
    directions: dict[nn.Parameter, Tensor] = {}
    rest, n_entries = dict(grads), 0
    # All of them are looked at before anything is used.
    for batch in list(_complete(batches, grads)):
        own = [p for layer in batch.layers for p in layer.parameters]
        at_once = DIRECTION_CHUNK_NUMEL.get(batch.kept[0][1].device.type, math.inf)
        # A batch of a parameter that is there already (the parts of an attention) goes with it.
        if n_entries >= at_once and not any(p in directions for p in own):
            yield directions
            directions, n_entries = {}, 0
        _put_natural(directions, batch, grads, roots, unit)
        for p in own:
            rest.pop(p, None)
            n_entries += p.numel()
    directions.update(_copies(rest))
    yield directions


def _put_natural(
    directions: dict[nn.Parameter, Tensor], batch: LayerGroup, grads: Tensors, roots: bool, unit: Unit
) -> None:
    # A function, so that nothing holds what it made when the part is used up.
    matrices = _over(batch.to_matrices(grads), unit)
    found = _whiten_again(batch, _whiten(batch, matrices)) if roots else batch.product(matrices)
    batch.put(directions, _in_units(found, unit), grads)


def _over(matrices: Matrices, unit: Unit) -> Matrices:
    """``matrices`` over ``unit``; new where that is not 1."""
    if not isinstance(unit, Tensor) and unit == 1.0:
        return matrices
    return matrices / unit if isinstance(matrices, Tensor) else [matrix / unit for matrix in matrices]


def _in_units(direction: Tensor, unit: Unit) -> Tensor:
    """``direction`` over ``unit``, or over less where that would be out of range; in place."""
    if isinstance(unit, Tensor) or unit != 1.0:
        room = torch.finfo(direction.dtype).max / 2 / direction.abs().amax()
        direction.mul_((1.0 / torch.as_tensor(unit).to(direction)).minimum(room))
    return direction


def polar(
    batches: Iterable[LayerGroup], momenta: Tensors, *, names: Container[str], unit: Unit = 1.0
) -> dict[nn.Parameter, Tensor]:
    """``Wᵀ msign(W M Vᵀ) V`` of each layer that is in ``names``: steepest descent in the spectral norm, whitened.

    That is ``G^-½ msign(G^-½ M A^-½) A^-½`` for whichever roots W and V: another pair is ``Q W`` and ``P V`` with
    orthogonal Q and P, and ``msign(Q X Pᵀ) = Q msign(X) Pᵀ``. The other layers get their natural direction, and
    parameters without curvature a copy.

    Args:
        batches: all layers with curvature; roots are kept of them.
        momenta: by parameter; nothing in it is changed.
        names: of the layers that are to be polar: of a batch all or none.
        unit: what output gradients were divided by to be rows of G, see `FactorState.gradient_unit`.
    """
    directions: dict[nn.Parameter, Tensor] = {}
    of_shape: dict[torch.Size, list[tuple[LayerGroup, Tensor]]] = {}
    for batch in _complete(batches, momenta):
        matrices = _whiten(batch, _over(batch.to_matrices(momenta), unit))
        if batch.layers[0].name in names:
            of_shape.setdefault(matrices.shape[-2:], []).append((batch, matrices))
        else:
            batch.put(directions, _in_units(_whiten_again(batch, matrices), unit), momenta)
    for members in of_shape.values():
        flat = [matrices.flatten(0, -3) for _, matrices in members]
        signs = _signs(torch.cat(flat)).split([len(matrices) for matrices in flat])
        for (batch, matrices), sign in zip(members, signs, strict=True):
            direction = _whiten_again(batch, sign.view(matrices.shape))
            batch.put(directions, _in_units(direction, unit), momenta)
    return _with_others(directions, momenta)


def to_eigenbasis(batches: Iterable[LayerGroup], grads: Tensors, *, back: bool = False) -> dict[nn.Parameter, Tensor]:
    """``Q_Gᵀ grad Q_A`` of each layer, with the eigenvectors of its blocks as columns, and copies of the gradients of
    other parameters: in these coordinates A ⊗ G is diagonal, as far as its blocks go.

    Args:
        batches: all layers with curvature; eigenvectors are kept of them.
        grads: by parameter; nothing in it is changed.
        back: from there, ``Q_G X Q_Aᵀ``.
    """
    directions: dict[nn.Parameter, Tensor] = {}
    for batch in _complete(batches, grads):
        found = batch.product(batch.to_matrices(grads), transposed=(back, not back))
        batch.put(directions, found, grads)
    return _with_others(directions, grads)


def _whiten(batch: LayerGroup, matrices: Matrices) -> Tensor:
    """``W M Vᵀ``."""
    return batch.product(matrices, transposed=(True, False))


def _whiten_again(batch: LayerGroup, matrices: Tensor) -> Tensor:
    """``Wᵀ X V``."""
    return batch.product(matrices, transposed=(False, True))


def _signs(matrices: Tensor) -> Tensor:
    """`msign` of ``[n, rows, columns]``, at most `MSIGN_CHUNK_NUMEL` entries at once (or one matrix that has more)."""
    at_once = max(1, MSIGN_CHUNK_NUMEL // matrices[0].numel())
    signs = [msign(some) for some in matrices.split(at_once)]
    return signs[0] if len(signs) == 1 else torch.cat(signs)


def _complete(batches: Iterable[LayerGroup], grads: Tensors) -> Iterator[LayerGroup]:
    """The layers of which all gradients are there; not those that others precondition, or none.

    Raises:
        ValueError: a gradient is not whole.
    """
    for batch in batches:
        there = [layer.is_preconditioned and all(p in grads for p in layer.parameters) for layer in batch.layers]
        for layer, is_there in zip(batch.layers, there, strict=True):
            shards = [
                p for p in layer.parameters if is_there and layer.param_slice is None and grads[p].shape != p.shape
            ]
            if shards:
                raise ValueError(
                    f"The gradient of {layer.name!r} is {list(grads[shards[0]].shape)}, a shard of its weight "
                    f"{list(shards[0].shape)}. Give Thor preconditioner=ShardedCurvature(curvature), of "
                    'lightning_thor.fsdp.sharded_curvature; under a Trainer strategy="thor_fsdp2" does so.'
                )
        if all(there):
            yield batch
            continue
        for layer, kept, is_there in zip(batch.layers, batch.kept, there, strict=True):
            if is_there:
                yield SingleLayer([layer], [kept])


def _with_others(directions: dict[nn.Parameter, Tensor], grads: Tensors) -> dict[nn.Parameter, Tensor]:
    """Copies of those of ``grads`` that have no direction with them."""
    return directions | _copies({p: grad for p, grad in grads.items() if p not in directions})


def _copies(grads: Tensors) -> dict[nn.Parameter, Tensor]:
    """Those of one shape in one operation; in at least float32, as all directions."""
    alike: dict[tuple[torch.Size, torch.dtype], list[nn.Parameter]] = {}
    for p, grad in grads.items():
        alike.setdefault((grad.shape, grad.dtype), []).append(p)
    copies: dict[nn.Parameter, Tensor] = {}
    for (_, dtype), members in alike.items():
        together = torch.stack([grads[p] for p in members])
        copies.update(zip(members, together.to(wide(dtype)).unbind(), strict=True))
    return copies
