"""A layer with curvature: its kind, the uses of its weight, and the rows that one call adds to A and G."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_thor.linalg import block_diagonal
from lightning_thor.linalg.block_diagonal import BlockPartition
from lightning_thor.linalg.dtypes import wide


@lru_cache(maxsize=256)
def subsample(n: int, max_rows: int | None, device: torch.device) -> Tensor | None:
    """Indices of at most ``max_rows`` of ``n`` rows, evenly spread and sorted, ``[max_rows]``; None stands for all.

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
    """What one call of a layer adds to A and G; features come first, so that a factor is ``x @ x.mT``."""

    a: Tensor | None
    """Inputs ``[groups, in, n]``; None where `token_counts` holds A or the layer has no A."""
    g: Tensor
    """Gradients of the loss, as it was summed or averaged, with respect to the outputs, ``[groups, out, n]``."""
    n_rows: int | Tensor
    """Number of rows that A sums over."""
    n_samples: float
    """Number of samples (terms of the loss) that these rows belong to; not whole where rows are left out."""
    token_counts: Tensor | None = None
    """Embeddings: how often each token occurs in the input, ``[vocabulary]``; the diagonal of A, summed."""

    def to(self, device: torch.device) -> Rows:
        """Copy tensors to a device."""
        moved: dict[str, Any] = {k: one.to(device) for k, one in self._asdict().items() if isinstance(one, Tensor)}
        return self._replace(**moved)


def pick(x: Tensor, index: Tensor | None) -> Tensor:
    """Rows ``x[index]`` of ``x [n, ...]``, or all of them."""
    return x if index is None else x.index_select(0, index)


RowsFn = Callable[[Any, Tensor, Tensor, torch.dtype, int | None], Rows]
"""``(module, a, g, dtype, max_rows)`` to `Rows`, see `LayerKind.rows`."""

FactorWidths = tuple[int, int | None, int]
"""Number of groups (independent factors on each side), width of A without a bias (None: no A), width of G."""


def type_name(module: nn.Module) -> str:
    """The name of a module's type for a message, with where it comes from if torch.nn has another of that name."""
    found = type(module)
    is_another = getattr(nn, found.__name__, found) is not found
    return f"{found.__module__}.{found.__name__}" if is_another else found.__name__


class LayerKind:
    """Everything that is known of one kind of layer. `lightning_thor.layers.registry` lists the instances.

    A kind overrides what differs from the default: a weight ``[out, ...]`` that is the matrix when flattened, with a
    bias ``[out]`` that can be the matrix's last column.

    Args:
        *types: of modules that it serves, their subclasses included; the type of a library that is not
            imported here is named by ``"module.qualname"``.
    """

    weight_name: str = "weight"
    """Name of the module's parameter that is the weight; the others, but for a bias, take plain momentum."""
    takes_bias: bool = True
    """A bias ``[out]`` can be the matrix's last column, the homogeneous coordinate of A."""
    is_matrix: bool = True
    """The weight maps vectors to vectors, so that its singular values mean something (polar mode)."""
    row_factor: Literal["A", "G"] | None = "G"
    """The factor along the first dimension of the weight; None: neither, or unknown."""
    is_flat: bool = True
    """``weight.flatten(1)`` is the matrix (`row_factor` G) or its transpose (A), if there is one group."""
    diagonal: Literal["A", "G"] | None = None
    """The factor that is diagonal, whatever the block size."""
    methods: tuple[str, ...] = ("forward",)
    """Of a module, what `rows` relies on: one that overrides them has no curvature, unless its type is registered."""
    owns_all_parameters: bool = False
    """All parameters of the module belong to the layer (norms); otherwise the weight, and a bias if it is taken."""
    is_linear: bool = False
    """A product with the last dimension of the input, whose outputs may be a concatenation of several (`fused`)."""
    checks_pairs: bool = False
    """Pairs are compared once with the weight's gradient: a user's forward may do more than multiply by the weight."""
    needs_returned: bool = False
    """g is the gradient of the module's output, not of its product with the weight."""
    in_attention: LayerKind | None = None
    """The kind of such a weight inside `nn.MultiheadAttention`, which uses it without calling the module."""
    ties_to: LayerKind | None = None
    """The kind of layer that may share the weight and precondition it with the statistics of both."""

    def __init__(self, *types: type[nn.Module] | str) -> None:
        self.types = types

    def rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """One call of a module as rows (K-FAC-expand): ``g @ a.mT`` is the gradient of the weight's matrix.

        Args:
            module: the one that was called.
            a: its input.
            g: the gradient of its output.
            dtype: of the rows.
            max_rows: about how many rows to take; None takes all.
        """
        raise NotImplementedError

    def reduced_rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """As `rows`, but one row per sample (K-FAC-reduce: Eschenhagen et al. 2023, arXiv:2311.00636); by default as
        `rows`, for kinds that the paper has no rule for. A kind that sets this to None has no curvature with
        ``statistics="reduce"``."""
        return self.rows(module, a, g, dtype, max_rows)

    def loss_terms(self, module: Any, g: Tensor) -> int:
        """Number of terms that the mean of the loss is taken to have, by the output's gradient ``g`` (or the output):
        by default one for each position, that is for all dimensions but the last."""
        return g.numel() // max(g.shape[-1], 1)

    def factor_widths(self, module: Any, shape: torch.Size) -> FactorWidths:
        """The widths of the factors of a module whose weight has this shape."""
        return 1, shape[1:].numel(), shape[0]

    def computed_shape(self, module: nn.Module) -> torch.Size | None:
        """The shape of a weight that the module computes at each call, without computing it, from a parameter of this
        shape (``weight_norm``, ``spectral_norm``, pruning); None: such a weight has no curvature."""
        return None

    def of_weight(self, module: Any, weight: Tensor) -> LayerKind:
        """The kind of one weight of a module; this one, unless the module's weights are of several kinds."""
        return self

    def n_parts(self, module: Any, shape: torch.Size) -> int:
        """How many equal parts the outputs of a weight of this shape are a concatenation of."""
        return 1

    def to_matrix(self, layer: Layer, grads: Sequence[Tensor]) -> Tensor:
        """Gradients of a layer's parameters as a matrix ``[groups, out, in]``, a view where possible."""
        weight = grads[0].reshape(layer.G.groups, layer.G.width, -1)
        if not layer.with_bias:
            return weight
        return torch.cat([weight, grads[1].reshape(layer.G.groups, layer.G.width, 1)], dim=2)

    def from_matrix(self, layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
        """The inverse of `to_matrix`: one tensor for each parameter, with its numbers in its order, of any shape."""
        return [matrix[..., :-1], matrix[..., -1]] if layer.with_bias else [matrix]

    def fits(self, module: Any, a: Tensor, g: Tensor, *, is_whole: bool = True) -> bool:
        """False if ``a`` and ``g`` cannot be an input and an output's gradient of the weight.

        Args:
            module: the one that was called.
            a: its input.
            g: the gradient of its output.
            is_whole: False if ``a`` may be the result of `subsample_input`.
        """
        return True

    def subsample_input(self, a: Tensor, max_rows: int | None) -> Tensor:
        """The part of an input ``a`` that `rows` needs: the rows that it will take, or all."""
        return a

    def unsupported_reason(self, module: Any, base: type[nn.Module]) -> str | None:
        """Why a module has no curvature although it is of this kind, or None.

        Args:
            module: of a type that this kind serves.
            base: the registered type.
        """
        for method in self.methods:
            if getattr(type(module), method, None) is not getattr(base, method, None) or method in vars(module):
                return f"{type_name(module)} has a {method} of its own, which may not be {base.__name__}'s"
        return None


@dataclass(frozen=True)
class ModuleUse:
    """A module through which a weight is used; tied weights have several."""

    name: str
    module: nn.Module
    weight_name: str = "weight"
    param_slice: slice | None = None
    """The rows of the parameter that are this weight, where one parameter packs several."""
    caller: nn.Module | None = None
    """The attention, recurrent layer or other module that multiplies by the weight without calling a module."""
    role: str = ""
    """The weight's part in ``caller``: one of `lightning_thor.layers.attention.ROLES`, the parameter's name, or see
    `lightning_thor.layers.matrices.role_of`."""
    is_computed: bool = False
    """The module may compute its weight at each call, from this parameter of the same shape."""

    @property
    def trains(self) -> bool:
        # Read at each call: layers are frozen during training.
        return self.weight.requires_grad

    @property
    def weight(self) -> Tensor:
        """The parameter as it is now: whole, or sharded outside of a forward pass."""
        try:
            weight: Tensor = attrgetter(self.weight_name)(self.module)
        except AttributeError:  # what computed the weight was removed
            weight = self.module.weight  # type: ignore[assignment]
        return weight


def uses_by_caller(uses: Iterable[ModuleUse]) -> dict[nn.Module, dict[str, str]]:
    """Names of the uses inside modules that multiply by weights without calling a module, by these and by role."""
    callers: dict[nn.Module, dict[str, str]] = {}
    for use in uses:
        if use.caller is not None:
            callers.setdefault(use.caller, {})[use.role] = use.name
    return callers


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
    rows_of: RowsFn
    """The kind's rows, or others in their place: see `lightning_thor.layers.registry.KfacApprox`."""
    loss_terms: Callable[[Any, Tensor], int]
    """``(module, output or its gradient)`` to the number of terms that the mean of the loss is taken to have."""
    tied_to: str | None = None
    """Name of the layer that preconditions the weight with these statistics too: an embedding tied to an output
    layer."""
    is_left_out: bool = False
    """True once training has shown that its statistics do not belong to the weight."""
    masks_rows: bool = False
    """Inputs of rows whose gradient is 0 count as zeros: rows that the loss leaves out are not part of A."""

    @property
    def is_preconditioned(self) -> bool:
        """True if its parameters have directions of their own."""
        return self.tied_to is None and not self.is_left_out

    @property
    def name(self) -> str:
        return self.uses[0].name

    @property
    def module(self) -> nn.Module:
        return self.uses[0].module

    @property
    def is_within_its_module(self) -> bool:
        """True if the module's own forward shows the products with the weight (recurrent layers, own matrices,
        lookups), attentions aside."""
        return self.uses[0].caller is self.module and not isinstance(self.module, nn.MultiheadAttention)

    @property
    def had_none_before(self) -> bool:
        """True if it had no curvature in former versions: their checkpoints lack it."""
        return self.is_within_its_module or self.uses[0].is_computed

    @property
    def param_slice(self) -> slice | None:
        """The rows of the parameters that are this layer's, where several layers are packed into one; None: all."""
        return self.uses[0].param_slice

    @property
    def with_bias(self) -> bool:
        """True if the bias is the last column of the matrix: the homogeneous coordinate of A."""
        return self.kind.takes_bias and len(self.parameters) == 2

    def needs_returned(self, use: ModuleUse) -> bool:
        """Whether g is the gradient of the module's output: its product is unknown, or not with the parameter."""
        return self.kind.needs_returned or use.is_computed

    def observe(
        self, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None, module: nn.Module | None = None
    ) -> Rows:
        """One call of a module as rows, in the groups of A and G; ones follow the inputs if the bias belongs to A.

        Args:
            a: the module's input.
            g: the gradient of its output.
            dtype: of the rows.
            max_rows: about how many rows to take; None takes all.
            module: one that uses the weight; None: the first.
        """
        seen = self.rows_of(module or self.module, a, g, dtype, max_rows)
        shape = self.G.groups, self.G.width, seen.g.shape[-1]
        if seen.g.shape != shape:
            seen = seen._replace(g=seen.g.reshape(shape))
        inputs = seen.a
        if inputs is None:
            is_masked_table = self.masks_rows and seen.token_counts is not None
            return self._without_masked_tokens(seen, a) if is_masked_table else seen
        if self.with_bias:
            inputs = torch.cat([inputs, inputs.new_ones(inputs.shape[0], 1, inputs.shape[2])], dim=1)
        if self.masks_rows:
            # A convolution's groups have rows of their own, the parts of a fused linear layer have not.
            mask = seen.g.any(1, keepdim=True)
            inputs = inputs.where(mask if len(mask) == len(inputs) else mask.any(0), 0.0)
        return seen._replace(a=inputs)

    def _without_masked_tokens(self, seen: Rows, tokens: Tensor) -> Rows:
        """The rows of a table, in which tokens without a gradient count as none, and are counted among the rows."""
        assert seen.token_counts is not None
        has_gradient = seen.g.any(1).flatten().to(seen.g.dtype)
        counts = torch.zeros_like(seen.token_counts).index_add_(0, tokens.detach().reshape(-1), has_gradient)
        return seen._replace(token_counts=counts, n_rows=seen.g.shape[-1])

    def subsample_input(self, a: Tensor, max_rows: int | None) -> Tensor:
        """The part of an input ``a`` that `observe` needs: the rows that it will take, or all."""
        return self.kind.subsample_input(a, max_rows) if self.rows_of == self.kind.rows else a

    def slice_of(self, tensor: Tensor) -> Tensor:
        """View of this layer's rows of a tensor in the shape of one of its parameters."""
        return tensor if self.param_slice is None else tensor[self.param_slice]

    def to_matrix(self, grads: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Gradients, one for each parameter, as one matrix ``[groups, out, in]``; a view where possible."""
        return self.kind.to_matrix(self, [grad.to(dtype) for grad in grads])

    def product(self, left: Tensor, matrix: Tensor, right: Tensor | None) -> Tensor:
        """``blockdiag(left) @ matrix @ blockdiag(right)``, a new tensor ``[groups, out, in]``.

        Args:
            left: blocks in the partition of G, ``[groups, n_blocks, size, size]``.
            matrix: ``[groups, out, in]``.
            right: blocks in the partition of A; None for the identity.
        """
        matrix = block_diagonal.left_product(left, matrix, self.G)
        if self.A is None or right is None:
            return matrix
        by_input = matrix.reshape(self.A.groups, -1, self.A.width)
        return block_diagonal.right_product(by_input, right, self.A).reshape(matrix.shape)

    def from_matrix(self, matrix: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
        """A matrix ``[groups, out, in]`` as one contiguous direction for each parameter, in the shapes and dtypes of
        ``grads``, but at least float32."""
        return [
            direction.reshape(grad.shape).to(wide(grad.dtype)).contiguous()
            for direction, grad in zip(self.kind.from_matrix(self, matrix), grads, strict=True)
        ]


def weight_of(layers: Iterable[Layer]) -> dict[nn.Parameter, nn.Parameter]:
    """The weight that a further parameter of a layer has its direction with: of biases within A, and of norms'
    shifts."""
    return {p: layer.parameters[0] for layer in layers if layer.is_preconditioned for p in layer.parameters[1:]}


def fan_in(model: nn.Module, layers: Iterable[Layer]) -> dict[nn.Parameter, int]:
    """The number of inputs that each output of a weight adds up, without a bias, where its shape does not tell.

    Of layers with an A it is the width of A, of an embedding, which picks one row of its weight for each token, 1. Of a
    parameter with three or more dimensions that is no convolution's (a stack of matrices, one for each expert or head;
    a table of positions) it is taken to be the largest of them but the first: their product would be the inputs of all
    outputs together.
    """
    stacks = {
        p: max(p.shape[1:])
        for module in model.modules()
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear)
        for p in module.parameters(recurse=False)
        if not is_lazy(p) and p.dim() > 2
    }
    found: dict[nn.Parameter, int] = {}
    for layer in layers:
        if layer.A is not None and layer.is_preconditioned:
            n = 1 if layer.kind.diagonal == "A" else layer.A.width - layer.with_bias
            found[layer.parameters[0]] = max(n, found.get(layer.parameters[0], 0))
    return stacks | found
