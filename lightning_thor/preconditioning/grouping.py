"""Layers of one form as a batch: products with their blocks in a few operations, whatever the number of layers.

A GPU is told what to do one operation at a time, and telling takes longer than doing where tensors are small; so the
number of operations counts there, more than that of multiplications.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_thor.layers.base import Layer
from lightning_thor.linalg.block_diagonal import UNBATCHED_DEVICES, columns_product
from lightning_thor.linalg.dtypes import wide
from lightning_thor.linalg.memory import adjacent_runs, as_stacked_view

FactorPair = tuple[Tensor | None, Tensor]
"""Of one layer ``(A⁻¹, G⁻¹)``, or the roots ``(V, W)`` with ``VᵀV = A⁻¹`` and ``WᵀW = G⁻¹``, or their eigenvectors, as
columns."""


Tensors = Mapping[nn.Parameter, Tensor]


Matrices = Tensor | Sequence[Tensor]
"""One for each layer of a batch."""


ROW_CHUNK_NUMEL = {"cpu": 2**22}
"""Of a weight's rows. A device that is not named makes all at once."""


class LayerGroup(Protocol):
    """Some layers whose directions are made together."""

    layers: Sequence[Layer]
    kept: Sequence[FactorPair]

    def to_matrices(self, tensors: Tensors) -> Matrices:
        """What there is of their parameters, as a matrix for each layer; may be views."""

    def product(self, matrices: Matrices, *, transposed: tuple[bool, bool] = (False, False)) -> Tensor:
        """``G X A`` of each matrix X, with what is kept of A and G, or with the transpose of either; new."""

    def put(self, directions: dict[nn.Parameter, Tensor], matrices: Tensor, tensors: Tensors) -> None:
        """Matrices as directions of the parameters, in the shapes of ``tensors`` and their dtypes, but at least
        float32."""


class DenseGroup:
    """Weights ``[out, ...]`` of one shape, with whole blocks on both sides: one product from the left for all."""

    def __init__(self, layers: Sequence[Layer], kept: Sequence[FactorPair]) -> None:
        self.layers, self.kept = layers, kept
        A = [A.view(A.shape[1:]) for A, _ in kept if A is not None]
        self._A, self._A_transposed = A, [one.mT for one in A]
        self._G = as_stacked_view([G for _, G in kept]).flatten(0, 2)

    def to_matrices(self, tensors: Tensors) -> Matrices:
        dtype = self._G.dtype
        return [tensors[layer.parameters[0]].to(dtype).flatten(1) for layer in self.layers]

    def product(self, matrices: Matrices, *, transposed: tuple[bool, bool] = (False, False)) -> Tensor:
        A, G = self._A_transposed if transposed[0] else self._A, self._G.mT if transposed[1] else self._G
        (n_A, size, _), rows, columns = A[0].shape, *matrices[0].shape
        halfway = G.new_empty(len(A), rows, n_A, size)
        # From the right layer by layer, each block's product straight to its columns: those of all layers have no
        # common stride, and to bring them together first would take another pass.
        for matrix, factor, place in zip(matrices, A, halfway, strict=True):
            columns_product(matrix.view(rows, n_A, size), factor, into=place)
        return torch.bmm(G, halfway.view(len(G), -1, columns)).view(len(A), rows, columns)

    def put(self, directions: dict[nn.Parameter, Tensor], matrices: Tensor, tensors: Tensors) -> None:
        for layer, matrix in zip(self.layers, matrices.unbind(), strict=True):
            (p,) = layer.parameters
            directions[p] = matrix.view(tensors[p].shape).to(wide(tensors[p].dtype))


class RowChunkedLayer:
    """One weight ``[rows, ...]`` with whole blocks across its rows, some rows at a time: it may be many times a cache.
    The factor along the rows may be diagonal, as an embedding's is, or end in a smaller block."""

    def __init__(self, layers: Sequence[Layer], kept: Sequence[FactorPair]) -> None:
        self.layers, self.kept = layers, kept
        (layer,), ((A, G),) = layers, kept
        assert A is not None
        self._is_table = layer.kind.row_factor == "A"
        along, across = (A, G) if self._is_table else (G, A)
        self._across = across.view(across.shape[1:])
        n_rows = len(layer.parameters[0])
        self._lengths = lengths_of(n_rows, along.shape[-1], layer.parameters[0].numel() // n_rows, along.device.type)
        self._factors = _factors_of(self._lengths, along.flatten(0, 1))

    def to_matrices(self, tensors: Tensors) -> Matrices:
        return [tensors[self.layers[0].parameters[0]].to(self._across.dtype).flatten(1)]

    def product(self, matrices: Matrices, *, transposed: tuple[bool, bool] = (False, False)) -> Tensor:
        (matrix,), (n_rows, n_columns), across = matrices, matrices[0].shape, self._across
        # A table lies in memory as the transpose of X: (G X A)ᵀ = Aᵀ Xᵀ Gᵀ.
        of_across, of_along = (not transposed[1], not transposed[0]) if self._is_table else transposed
        across = across.mT if of_across else across
        product = across.new_empty(n_rows, *across.shape[:2])
        for some, place, factor in zip(
            matrix.split(self._lengths), product.split(self._lengths), self._factors, strict=True
        ):
            if len(factor) == len(some):
                columns_product(some.view(place.shape), across, into=place, scale=factor)
                continue
            # From the left first: what the product from the right is copied into is memory that there is already.
            halfway = place if place.device.type in UNBATCHED_DEVICES else torch.empty_like(place)
            shape = *factor.shape[:2], n_columns
            torch.bmm(factor.mT if of_along else factor, some.view(shape), out=halfway.view(shape))
            columns_product(halfway, across, into=place)
        return product.view(1, n_rows, n_columns)

    def put(self, directions: dict[nn.Parameter, Tensor], matrices: Tensor, tensors: Tensors) -> None:
        (p,) = self.layers[0].parameters
        directions[p] = matrices.view(tensors[p].shape).to(wide(tensors[p].dtype))


def lengths_of(n_rows: int, size: int, n_columns: int, device: str) -> list[int]:
    """How many rows are made together: those of whole blocks, and last those of a smaller one.

    >>> lengths_of(7, size=2, n_columns=2**20, device="cpu")
    [4, 2, 1]
    """
    whole = n_rows - n_rows % size
    at_once = size * max(1, ROW_CHUNK_NUMEL.get(device, n_rows * n_columns) // (size * n_columns))
    lengths = [min(at_once, whole - start) for start in range(0, whole, at_once)]
    return lengths + [n_rows - whole] * (whole < n_rows)


def _factors_of(lengths: Sequence[int], along: Tensor) -> list[Tensor]:
    """What of the blocks ``along`` the rows is for each of the lengths, ``[n, size, size]``; of a diagonal one
    ``[rows, 1, 1]``."""
    size, factors, start = along.shape[-1], [], 0
    for length in lengths:
        height = min(size, length)
        factors.append(along[start // size :, :height, :height][: length // height])
        start += length
    return factors


class NormGroup:
    """The parameters of norms of one shape, whose factor is diagonal: one division for all."""

    def __init__(self, layers: Sequence[Layer], kept: Sequence[FactorPair]) -> None:
        self.layers, self.kept = layers, kept
        self._parameters = [p for layer in layers for p in layer.parameters]
        self._G = as_stacked_view([G for _, G in kept]).view(len(self._parameters), *self._parameters[0].shape)

    def to_matrices(self, tensors: Tensors) -> Matrices:
        return torch.stack([tensors[p].to(self._G.dtype) for p in self._parameters])

    def product(self, matrices: Matrices, *, transposed: tuple[bool, bool] = (False, False)) -> Tensor:
        assert isinstance(matrices, Tensor)
        return matrices * self._G

    def put(self, directions: dict[nn.Parameter, Tensor], matrices: Tensor, tensors: Tensors) -> None:
        for p, direction in zip(self._parameters, matrices.unbind(), strict=True):
            directions[p] = direction.to(wide(tensors[p].dtype))


class SingleLayer:
    """A layer of any form."""

    def __init__(self, layers: Sequence[Layer], kept: Sequence[FactorPair]) -> None:
        self.layers, self.kept = layers, kept

    def to_matrices(self, tensors: Tensors) -> Matrices:
        (layer,), ((_, G),) = self.layers, self.kept
        own = [layer.slice_of(tensors[p]) for p in layer.parameters]
        return layer.to_matrix(own, G.dtype)[None]

    def product(self, matrices: Matrices, *, transposed: tuple[bool, bool] = (False, False)) -> Tensor:
        (layer,), ((A, G),) = self.layers, self.kept
        A = None if A is None else A.mT if transposed[0] else A
        return layer.product(G.mT if transposed[1] else G, matrices[0], A)[None]

    def put(self, directions: dict[nn.Parameter, Tensor], matrices: Tensor, tensors: Tensors) -> None:
        (layer,) = self.layers
        found = layer.from_matrix(matrices[0], [layer.slice_of(tensors[p]) for p in layer.parameters])
        for p, direction in zip(layer.parameters, found, strict=True):
            if layer.param_slice is None:
                directions[p] = direction
                continue
            if p not in directions:
                directions[p] = tensors[p].to(wide(tensors[p].dtype), copy=True)
            layer.slice_of(directions[p]).copy_(direction)


Form = Callable[[Sequence[Layer], Sequence[FactorPair]], LayerGroup]


OF_ONE_LAYER = (SingleLayer, RowChunkedLayer)


def group_layers(
    layers: Sequence[Layer], kept: Sequence[FactorPair], apart: Callable[[Layer], Hashable] = lambda layer: None
) -> Iterator[LayerGroup]:
    """All of ``layers``, in batches as large as can be.

    Args:
        layers: any, with curvature.
        kept: of each; those of one form make a batch as far as they lie one after the other in memory.
        apart: layers for which it gives other values are in other batches.
    """
    forms: dict[Hashable, tuple[Form, list[int]]] = {}
    for index, layer in enumerate(layers):
        form, key = form_of(layer, kept[index])
        forms.setdefault(index if form in OF_ONE_LAYER else (key, apart(layer)), (form, []))[1].append(index)
    for form, members in forms.values():
        for run in adjacent_runs([kept[index][1] for index in members]):
            chosen = [members[place] for place in run]
            yield form([layers[index] for index in chosen], [kept[index] for index in chosen])


def form_of(layer: Layer, kept: FactorPair) -> tuple[Form, Hashable]:
    """Which kind of batch a layer can be in, and what the others in it must have in common with it."""
    (A_kept, G_kept), (A, G), p = kept, (layer.A, layer.G), layer.parameters[0]
    key = A, G, p.shape, len(layer.parameters), G_kept.dtype
    if layer.param_slice is None and A is None and G_kept.is_contiguous():
        same = all(one.shape == p.shape for one in layer.parameters)
        return (NormGroup if same else SingleLayer), key
    whole = layer.param_slice is None and len(layer.parameters) == 1
    if not whole or A is None or A_kept is None or not (A_kept.is_contiguous() and G_kept.is_contiguous()):
        return SingleLayer, key
    is_table = layer.kind.row_factor == "A"
    along, across = (A, G) if is_table else (G, A)
    if not layer.kind.is_flat or A.groups > 1 or across.padding or across.size == 1:
        return SingleLayer, key
    alone = G_kept.device.type in UNBATCHED_DEVICES or is_table or along.padding or along.size == 1
    return (RowChunkedLayer if alone else DenseGroup), key
