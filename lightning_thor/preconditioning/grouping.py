"""Groups of layers with equal shapes: products with their stored factors, in few operations for many layers.

Where tensors are small, a GPU's step is bound by kernel launches: there the number of operations counts for more than
the number of multiplications.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_thor.layers.base import Layer
from lightning_thor.linalg.block_diagonal import UNBATCHED_DEVICES, columns_product
from lightning_thor.linalg.decompositions import Decomposition
from lightning_thor.linalg.dtypes import wide
from lightning_thor.linalg.memory import adjacent_runs, as_stacked_view

FactorPair = tuple[Tensor | None, Tensor]
"""What is stored of a layer's A and G, each ``[groups, n_blocks, size, size]``: inverses, roots V and W with
``VᵀV = A⁻¹`` and ``WᵀW = G⁻¹``, or eigenvectors as columns. None for a layer without A."""

Tensors = Mapping[nn.Parameter, Tensor]
"""Gradients, momenta or moments by parameter."""

Directions = dict[nn.Parameter, Tensor]

Matrices = Tensor | Sequence[Tensor]
"""A matrix ``[out, in]`` (``[groups, out, in]`` of a `SingleLayer`) for each layer of a group."""

Transposed = tuple[bool, bool]
"""Whether a product takes the transpose of the stored A, and of the stored G."""

Unit = float | Tensor
"""What output gradients were divided by to be rows of G, see `FactorState.gradient_unit`."""

ROW_CHUNK_NUMEL = {"cpu": 2**22}
"""By type of device: entries of a weight that are multiplied at once; on other devices all of them."""

COPIED_NUMEL = 2**22
"""Largest weights that are copied to be multiplied together: a GPU then takes no longer to copy one, in 4-byte numbers,
than to launch the product that is saved."""

COPIED_LAUNCHES = 4
"""Kernel launches of a product of layers that are copied: two copies, and one product from each side."""


class LayerGroup(ABC):
    """Layers whose directions are computed together.

    Args:
        layers: layers with curvature, all alike (see `group_type_of`).
        pairs: what is stored of each layer's factors.
    """

    def __init__(self, layers: Sequence[Layer], pairs: Sequence[FactorPair]) -> None:
        self.layers, self.pairs = layers, pairs
        self.device_type = pairs[0][1].device.type
        self.is_preconditioned = all(layer.is_preconditioned for layer in layers)
        self.parameters: dict[nn.Parameter, str | None] = {
            p: layer.name if layer.param_slice is None else None for layer in layers for p in layer.parameters
        }
        """Name of the layer by parameter; None where the layer has a slice of the parameter."""
        self.numel = sum(p.numel() for p in self.parameters)

    @abstractmethod
    def to_matrices(self, tensors: Tensors) -> Matrices:
        """Return the tensors of this group's parameters as one matrix per layer, possibly views."""

    @abstractmethod
    def product(self, matrices: Matrices, transposed: Transposed = (False, False)) -> Tensor:
        """Compute ``G X A`` of each matrix X with the stored A and G: new tensor, with one result per layer."""

    @abstractmethod
    def put(self, directions: Directions, matrices: Tensor, tensors: Tensors) -> None:
        """Write a `product` into ``directions``, in the shapes of ``tensors`` and their dtypes, but at least float32;
        directions may be views of ``matrices``."""


class DenseGroup(LayerGroup):
    """Weights ``[out, ...]`` of one shape without padding: one product from the left for all layers, and one from the
    right if they are many and small."""

    def __init__(self, layers: Sequence[Layer], pairs: Sequence[FactorPair]) -> None:
        super().__init__(layers, pairs)
        own = [A for A, _ in pairs if A is not None]
        self._G = as_stacked_view([G for _, G in pairs]).flatten(0, 2)
        self._is_copied = (
            len(layers) + 1 > COPIED_LAUNCHES
            and self.numel <= COPIED_NUMEL * len(layers)
            and adjacent_runs(own) == [list(range(len(own)))]
        )
        """Whether the layers are copied together for the product from the right: the blocks' columns of several
        weights have no common stride."""
        self._A = [as_stacked_view(own).flatten(0, 2)] if self._is_copied else [A.view(A.shape[1:]) for A in own]
        """Blocks of all layers, or of each."""
        self._A_transposed = [A.mT for A in self._A]

    def to_matrices(self, tensors: Tensors) -> Matrices:
        dtype, own = self._G.dtype, [tensors[layer.parameters[0]].flatten(1) for layer in self.layers]
        if self._is_copied and own[0].dtype != dtype:
            return torch.stack(own).to(dtype)
        return [matrix if matrix.dtype == dtype else matrix.to(dtype) for matrix in own]

    def product(self, matrices: Matrices, transposed: Transposed = (False, False)) -> Tensor:
        A, G = self._A_transposed if transposed[0] else self._A, self._G.mT if transposed[1] else self._G
        n, size, (n_rows, n_columns) = len(self.layers), A[0].shape[-1], matrices[0].shape
        in_blocks = [matrix.view(n_rows, -1, size) for matrix in matrices]
        if self._is_copied:
            columns = torch.stack([matrix.transpose(0, 1) for matrix in in_blocks])
            halfway = torch.bmm(columns.flatten(0, 1), A[0]).view(columns.shape).transpose(1, 2).reshape(n, n_rows, -1)
        else:
            halfway = G.new_empty(n, n_rows, n_columns // size, size)
            for matrix, factor, out in zip(in_blocks, A, halfway, strict=True):
                columns_product(matrix, factor, into=out)
        return torch.bmm(G, halfway.view(len(G), -1, n_columns)).view(n, n_rows, n_columns)

    def put(self, directions: Directions, matrices: Tensor, tensors: Tensors) -> None:
        for layer, matrix in zip(self.layers, matrices.unbind(), strict=True):
            (p,) = layer.parameters
            like = tensors[p]
            own = matrix if like.dim() == 2 else matrix.view(like.shape)
            directions[p] = own if own.dtype == like.dtype else own.to(wide(like.dtype))


class RowChunkedLayer(LayerGroup):
    """One weight ``[rows, ...]``, multiplied in chunks of rows, since it may be many times a cache.

    The factor across its rows has whole blocks; the factor along the rows may be diagonal, as an embedding's, or end in
    a smaller block, as may each of several groups (fused parts).
    """

    def __init__(self, layers: Sequence[Layer], pairs: Sequence[FactorPair]) -> None:
        super().__init__(layers, pairs)
        (layer,), ((A, G),) = layers, pairs
        assert A is not None
        (self._parameter,) = layer.parameters
        self._is_table = layer.kind.row_factor == "A"
        along, across = (A, G) if self._is_table else (G, A)
        self._across = across.view(across.shape[1:])
        size, n_groups, row_numel = along.shape[-1], len(along), self.numel // len(self._parameter)
        is_one = len(self._parameter) // n_groups % size == 0
        groups = along.flatten(0, 1)[None] if is_one else along
        n_rows = len(self._parameter) // len(groups)
        n_whole = n_rows - n_rows % size
        length = size * max(1, ROW_CHUNK_NUMEL.get(self.device_type, self.numel) // (size * row_numel))
        self._lengths: list[int] = []
        self._factors: list[tuple[Tensor, bool]] = []
        """Of each chunk the blocks along its rows, ``[n, size, size]``, and whether they are numbers."""
        for blocks in groups:
            for start, stop in pairwise(sorted({*range(0, n_whole, length), n_whole, n_rows})):
                height = min(size, stop - start)
                own = blocks[start // size :, :height, :height][: (stop - start) // height]
                self._lengths.append(stop - start)
                self._factors.append((own, height == 1))
        n_blocks = [len(self._across), *(len(own) for own, is_diagonal in self._factors if not is_diagonal)]
        self._is_small = n_blocks == [1, 1] and len(self._factors) == 1
        """Whether A and G are one block each."""

    def to_matrices(self, tensors: Tensors) -> Matrices:
        own, dtype = tensors[self._parameter].flatten(1), self._across.dtype
        return [own if own.dtype == dtype else own.to(dtype)]

    def product(self, matrices: Matrices, transposed: Transposed = (False, False)) -> Tensor:
        (matrix,), (n_rows, n_columns), across = matrices, matrices[0].shape, self._across
        # A table's parameter is the transpose of X: (G X A)ᵀ = Aᵀ Xᵀ Gᵀ.
        transpose_across, transpose_along = (not transposed[1], not transposed[0]) if self._is_table else transposed
        across = across.mT if transpose_across else across
        if self._is_small:
            along = self._factors[0][0].mT if transpose_along else self._factors[0][0]
            return torch.mm(torch.mm(along[0], matrix), across[0])[None]
        product = across.new_empty(n_rows, *across.shape[:2])
        inputs: Sequence[Tensor] = [matrix]
        outputs: Sequence[Tensor] = [product]
        if len(self._lengths) > 1:  # views cost as much as small products
            inputs, outputs = matrix.split(self._lengths), product.split(self._lengths)
        for rows, out, (along, is_diagonal) in zip(inputs, outputs, self._factors, strict=True):
            if is_diagonal:
                columns_product(rows.view(out.shape), across, into=out, scale=along)
                continue
            # From the left first: the product from the right is then copied into memory that is allocated already.
            halfway = out if self.device_type in UNBATCHED_DEVICES else torch.empty_like(out)
            shape = *along.shape[:2], n_columns
            torch.bmm(along.mT if transpose_along else along, rows.view(shape), out=halfway.view(shape))
            columns_product(halfway, across, into=out)
        return product.view(1, n_rows, n_columns)

    def put(self, directions: Directions, matrices: Tensor, tensors: Tensors) -> None:
        like = tensors[self._parameter]
        own = matrices.view(like.shape)
        directions[self._parameter] = own if own.dtype == like.dtype else own.to(wide(like.dtype))


class NormGroup(LayerGroup):
    """Scales and shifts of norms of one shape, whose factor G is diagonal: one elementwise product for all."""

    def __init__(self, layers: Sequence[Layer], pairs: Sequence[FactorPair]) -> None:
        super().__init__(layers, pairs)
        self._parameters = [p for layer in layers for p in layer.parameters]
        self._G = as_stacked_view([G for _, G in pairs]).view(len(self._parameters), *self._parameters[0].shape)

    def to_matrices(self, tensors: Tensors) -> Matrices:
        own, dtype = [tensors[p] for p in self._parameters], self._G.dtype
        return torch.stack([x if x.dtype == dtype else x.to(dtype) for x in own])

    def product(self, matrices: Matrices, transposed: Transposed = (False, False)) -> Tensor:
        assert isinstance(matrices, Tensor)
        return matrices * self._G

    def put(self, directions: Directions, matrices: Tensor, tensors: Tensors) -> None:
        for p, direction in zip(self._parameters, matrices.unbind(), strict=True):
            dtype = tensors[p].dtype
            directions[p] = direction if direction.dtype == dtype else direction.to(wide(dtype))


class SingleLayer(LayerGroup):
    """One layer of any kind and shape."""

    def __init__(self, layers: Sequence[Layer], pairs: Sequence[FactorPair]) -> None:
        super().__init__(layers, pairs)
        self._layer, self._pair = layers[0], pairs[0]

    def to_matrices(self, tensors: Tensors) -> Matrices:
        layer = self._layer
        own = [layer.slice_of(tensors[p]) for p in layer.parameters]
        return layer.to_matrix(own, self._pair[1].dtype)[None]

    def product(self, matrices: Matrices, transposed: Transposed = (False, False)) -> Tensor:
        A, G = self._pair
        A = None if A is None else A.mT if transposed[0] else A
        return self._layer.product(G.mT if transposed[1] else G, matrices[0], A)[None]

    def put(self, directions: Directions, matrices: Tensor, tensors: Tensors) -> None:
        layer = self._layer
        found = layer.from_matrix(matrices[0], [layer.slice_of(tensors[p]) for p in layer.parameters])
        for p, direction in zip(layer.parameters, found, strict=True):
            if layer.param_slice is None:
                directions[p] = direction
                continue
            if p not in directions:
                directions[p] = tensors[p].to(wide(tensors[p].dtype), copy=True)
            layer.slice_of(directions[p]).copy_(direction)


class StackedLayers(SingleLayer):
    """The experts of one three-dimensional parameter, each of them a layer, multiplied as one layer with groups."""

    def __init__(self, layers: Sequence[Layer], pairs: Sequence[FactorPair]) -> None:
        super().__init__(layers, pairs)
        first, n = layers[0], len(layers)
        assert first.A is not None
        use = replace(first.uses[0], param_slice=None)
        A, G = (as_stacked_view(list(side)).flatten(0, 1) for side in _sides(pairs))
        A_of_all, G_of_all = (one._replace(groups=n * one.groups) for one in (first.A, first.G))
        self._layer, self._pair = replace(first, uses=(use,), A=A_of_all, G=G_of_all), (A, G)


def _sides(pairs: Iterable[FactorPair]) -> tuple[list[Tensor], list[Tensor]]:
    """What is stored of all A, and of all G, of layers that have both."""
    return [A for A, _ in pairs if A is not None], [G for _, G in pairs]


class GroupedLayers(NamedTuple):
    """All layers with curvature in groups, and what their directions depend on beside them."""

    groups: Sequence[LayerGroup]
    decomposition: Decomposition
    """What the pairs of all groups are."""
    polar_layers: Container[str] = ()
    """Names of the layers with polar directions; a group has either such layers alone or none."""
    unit: Unit = 1.0


def group_layers(
    layers: Sequence[Layer], pairs: Sequence[FactorPair], polar_layers: Container[str] = ()
) -> Iterator[LayerGroup]:
    """Group layers that are alike and whose stored G are adjacent in memory.

    Args:
        layers: layers with curvature.
        pairs: what is stored of each layer's factors.
        polar_layers: names of the layers that share no group with others.

    Yields:
        Groups, as large as possible; each layer is in one.
    """
    alike: dict[Hashable, tuple[type[LayerGroup], list[int]]] = {}
    for index, layer in enumerate(layers):
        group_type, key = group_type_of(layer, pairs[index])
        is_alone = group_type in (SingleLayer, RowChunkedLayer)
        alike.setdefault(index if is_alone else (key, layer.name in polar_layers), (group_type, []))[1].append(index)
    for group_type, members in alike.values():
        members_pairs = [pairs[index] for index in members]
        if group_type is StackedLayers:
            whole = [[*range(len(layers[members[0]].parameters[0]))]]
            is_whole = all(adjacent_runs(side, everywhere=True) == whole for side in _sides(members_pairs))
            runs = whole if is_whole else [[n] for n in range(len(members))]
            group_type = StackedLayers if is_whole else SingleLayer
        else:
            runs = adjacent_runs([G for _, G in members_pairs])
        for run in runs:
            yield group_type([layers[members[n]] for n in run], [members_pairs[n] for n in run])


def group_type_of(layer: Layer, pair: FactorPair) -> tuple[type[LayerGroup], Hashable]:
    """Find the fastest kind of group for a layer, and a key that is equal for all layers that can share the group."""
    (stored_A, stored_G), (A, G), p = pair, (layer.A, layer.G), layer.parameters[0]
    key = A, G, p.shape, len(layer.parameters), stored_G.dtype
    if layer.param_slice is None and A is None and stored_G.is_contiguous():
        same = all(one.shape == p.shape for one in layer.parameters)
        return (NormGroup if same else SingleLayer), key
    if layer.param_slice is not None and p.dim() == 3:
        return StackedLayers, (*key, p)
    is_whole = layer.param_slice is None and len(layer.parameters) == 1
    if not is_whole or A is None or stored_A is None or not (stored_A.is_contiguous() and stored_G.is_contiguous()):
        return SingleLayer, key
    is_table = layer.kind.row_factor == "A"
    along, across = (A, G) if is_table else (G, A)
    if not layer.kind.is_flat or A.groups > 1 or across.padding or across.size == 1:
        return SingleLayer, key
    is_alone = stored_G.device.type in UNBATCHED_DEVICES or is_table or along.padding or along.size == 1
    return (RowChunkedLayer if is_alone else DenseGroup), key
