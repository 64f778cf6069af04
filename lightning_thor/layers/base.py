"""A layer with curvature: its uses, its rows, and how its gradient is a matrix ``[groups, out, in]``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_thor.linalg import block_diagonal
from lightning_thor.linalg.block_diagonal import BlockPartition
from lightning_thor.linalg.dtypes import wide


@lru_cache(maxsize=256)
def subsample(n: int, max_rows: int | None, device: torch.device) -> Tensor | None:
    """Indices of at most ``max_rows`` of ``n`` rows, spread evenly; None stands for all.

    A multiplicative sequence by the golden ratio rather than every k-th row: a stride that divides the length of a
    sequence would see the same few positions for ever.

    >>> subsample(10, 3, torch.device("cpu")), subsample(3, 10, torch.device("cpu"))
    (tensor([0, 4, 7]), None)
    """
    if max_rows is None or n <= max_rows:
        return None
    step = max(1, round(n * 0.6180339887498949)) | 1
    while math.gcd(step, n) != 1:
        step += 2
    # In order, or picking them takes up to twice as long.
    return (torch.arange(max_rows, dtype=torch.int64, device=device) * step % n).sort().values


class Rows(NamedTuple):
    """What one call of a layer contributes to its statistics; features first, so that a factor is ``x @ x.mT``."""

    a: Tensor | None
    """Inputs ``[groups, in, n]``; None where A is given by `token_counts` or does not exist."""
    g: Tensor
    """Output gradients of the loss as it was summed or averaged, ``[groups, out, n]``."""
    n_rows: int | Tensor
    """How many rows A was summed over."""
    n_samples: float
    """How many samples these rows belong to: the terms of the loss that they saw. Not whole where rows are left out."""
    token_counts: Tensor | None = None
    """Embeddings: how often each token stood in the input, ``[vocabulary]``: the diagonal of A, summed."""


class Squares(NamedTuple):
    """The sums of squares of `Rows`: the traces of what they add to A and G."""

    a: Tensor | None
    g: Tensor
    n_rows: int | Tensor
    n_samples: float


def _pick(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def squares_of(rows: Rows) -> Squares:
    """The squares of rows that are there."""
    a = rows.token_counts if rows.a is None else rows.a.square()
    return Squares(None if a is None else a.sum(), rows.g.square().sum(), rows.n_rows, rows.n_samples)


RowsOf = Callable[[Any, Tensor, Tensor, torch.dtype, int | None], Rows]


SquaresOf = Callable[[Any, Tensor, Tensor, torch.dtype, int | None], Squares]


@dataclass(frozen=True)
class ModuleUse:
    """A module through which a weight is used; tied weights have several."""

    name: str
    module: nn.Module
    weight_name: str = "weight"
    param_slice: slice | None = None
    """Which rows of the parameter, where several weights are packed into one."""
    attention: nn.MultiheadAttention | None = None
    """What uses the weight without calling the module."""
    role: str = ""
    """In ``attention``: see `lightning_thor.layers.attention.ROLES`."""

    @property
    def trains(self) -> bool:
        # Read at each call: layers are frozen during training.
        return self.weight.requires_grad

    @property
    def weight(self) -> Tensor:
        """The parameter as it is now: whole, or sharded outside of a forward pass."""
        weight: Tensor = getattr(self.module, self.weight_name)
        return weight


def attention_uses(uses: Iterable[ModuleUse]) -> dict[nn.MultiheadAttention, dict[str, str]]:
    """Of the uses inside attentions: their names, by attention and role."""
    attentions: dict[nn.MultiheadAttention, dict[str, str]] = {}
    for use in uses:
        if use.attention is not None:
            attentions.setdefault(use.attention, {})[use.role] = use.name
    return attentions


@dataclass(frozen=True)
class Layer:
    """A weight whose gradient, as a matrix ``[groups, out, in]``, is preconditioned to ``G⁻¹ @ grad @ A⁻¹``.

    A may have one group where G has several: a linear layer whose outputs are a concatenation.
    """

    uses: tuple[ModuleUse, ...]
    parameters: tuple[nn.Parameter, ...]
    A: BlockPartition | None
    """None: no input factor (the scale and shift of a norm have the diagonal of their own Fisher matrix as G)."""
    G: BlockPartition
    kind: LayerKind
    rows_of: RowsOf
    squares_of: SquaresOf | None = None
    """Of the same rows, where that is cheaper without making them."""
    tied_to: str | None = None
    """The layer that preconditions the weight with these statistics too: an embedding tied to an output layer."""
    is_left_out: bool = False
    """Whether training has shown that its statistics are not those of its weight."""

    @property
    def is_preconditioned(self) -> bool:
        """True if its parameters have directions of its own."""
        return self.tied_to is None and not self.is_left_out

    @property
    def name(self) -> str:
        return self.uses[0].name

    @property
    def module(self) -> nn.Module:
        return self.uses[0].module

    @property
    def param_slice(self) -> slice | None:
        """Which rows of the parameters, where several layers are packed into one; None: all."""
        return self.uses[0].param_slice

    @property
    def with_bias(self) -> bool:
        """True if the bias is the last column of the matrix: the homogeneous coordinate of A."""
        return self.kind.takes_bias and len(self.parameters) == 2

    def observe(
        self, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None, module: nn.Module | None = None
    ) -> Rows:
        """One call of ``module`` (None: of the first that uses the weight) as rows, in the groups of A and G, with a
        row of ones under the inputs if the bias belongs to A."""
        seen = self.rows_of(module or self.module, a, g, dtype, max_rows)
        shape = self.G.groups, self.G.width, seen.g.shape[-1]
        if seen.g.shape != shape:
            seen = seen._replace(g=seen.g.reshape(shape))
        if not self.with_bias or seen.a is None:
            return seen
        ones = seen.a.new_ones(seen.a.shape[0], 1, seen.a.shape[2])
        return seen._replace(a=torch.cat([seen.a, ones], dim=1))

    def squares(
        self, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None, module: nn.Module | None = None
    ) -> Squares:
        """The sums of squares of what `observe` would give."""
        if self.squares_of is None:
            return squares_of(self.observe(a, g, dtype, max_rows, module))
        seen = self.squares_of(module or self.module, a, g, dtype, max_rows)
        if not self.with_bias or seen.a is None or self.A is None:
            return seen
        return seen._replace(a=seen.a + self.A.groups * seen.n_rows)

    def slice_of(self, tensor: Tensor) -> Tensor:
        """View of this layer's part of something in the shape of one of its parameters."""
        return tensor if self.param_slice is None else tensor[self.param_slice]

    def to_matrix(self, grads: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Gradients (one for each parameter) as one matrix ``[groups, out, in]``; not a copy where none is needed."""
        return self.kind.to_matrix(self, [grad.to(dtype) for grad in grads])

    def product(self, left: Tensor, matrix: Tensor, right: Tensor | None) -> Tensor:
        """``left @ matrix @ right`` with block-diagonal ``left``, cut as G, and ``right``, cut as A; new."""
        matrix = block_diagonal.left_product(left, matrix, self.G)
        if self.A is None or right is None:
            return matrix
        by_input = matrix.reshape(self.A.groups, -1, self.A.width)
        return block_diagonal.right_product(by_input, right, self.A).reshape(matrix.shape)

    def from_matrix(self, matrix: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
        """A matrix as directions, contiguous, in the shapes and dtypes of ``grads``, but at least float32."""
        return [
            direction.reshape(grad.shape).to(wide(grad.dtype)).contiguous()
            for direction, grad in zip(self.kind.from_matrix(self, matrix), grads, strict=True)
        ]


class LayerKind(NamedTuple):
    """How the gradients of a layer's parameters are a matrix ``[groups, out, in]``, and back."""

    name: str
    to_matrix: Callable[[Layer, Sequence[Tensor]], Tensor]
    from_matrix: Callable[[Layer, Tensor], Sequence[Tensor]]
    takes_bias: bool = False
    """Whether a bias can be the matrix's last column."""
    is_matrix: bool = False
    """Whether it maps vectors to vectors, so that its singular values mean something."""
    rows: str | None = None
    """The factor, ``"A"`` or ``"G"``, that lies along the first dimension of the parameters; None: neither, or both."""
