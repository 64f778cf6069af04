"""Which layers have curvature, and how: one table from module types to the cut, the rows and the matrix form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_thor import blocks, rows, thor_rows
from lightning_thor.blocks import Blocks

RowsOf = Callable[[Any, Tensor, Tensor, torch.dtype, int | None], rows.Rows]
SquaresOf = Callable[[Any, Tensor, Tensor, torch.dtype, int | None], rows.Squares]


@dataclass(frozen=True)
class Layer:
    """A module whose gradient, as a matrix ``[groups, out, in]``, is preconditioned to ``G⁻¹ @ grad @ A⁻¹``."""

    name: str
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    A: Blocks | None
    """None: no input factor (the scale and shift of a norm have the diagonal of their own Fisher matrix as G)."""
    G: Blocks
    kind: Kind
    rows_of: RowsOf
    squares_of: SquaresOf | None = None
    """Of the same rows, where that is cheaper without making them."""

    @property
    def with_bias(self) -> bool:
        """True if the bias is the last column of the matrix: the homogeneous coordinate of A."""
        return self.kind in (LINEAR, CONVOLUTION) and len(self.parameters) == 2

    def observe(self, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> rows.Rows:
        """One call of the module as rows, with a row of ones under the inputs if the bias belongs to A."""
        seen = self.rows_of(self.module, a, g, dtype, max_rows)
        if not self.with_bias or seen.a is None:
            return seen
        ones = seen.a.new_ones(seen.a.shape[0], 1, seen.a.shape[2])
        return seen._replace(a=torch.cat([seen.a, ones], dim=1))

    def squares(self, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> rows.Squares:
        """The sums of squares of what `observe` would give."""
        if self.squares_of is None:
            return rows.squares_of(self.observe(a, g, dtype, max_rows))
        seen = self.squares_of(self.module, a, g, dtype, max_rows)
        return seen._replace(a=seen.a + self.G.groups * seen.n_rows) if self.with_bias and seen.a is not None else seen

    def precondition(self, grads: Sequence[Tensor], A_inverse: Tensor | None, G_inverse: Tensor) -> list[Tensor]:
        """``G⁻¹ @ grad @ A⁻¹``, new and contiguous, in the shapes and dtypes of ``grads`` (one for each parameter)."""
        matrix = self.kind.to_matrix(self, [grad.to(G_inverse.dtype) for grad in grads])
        matrix = blocks.left_product(G_inverse, matrix, self.G)
        if self.A is not None and A_inverse is not None:
            matrix = blocks.right_product(matrix, A_inverse, self.A)
        return [
            direction.reshape(grad.shape).to(grad.dtype).contiguous()
            for direction, grad in zip(self.kind.from_matrix(self, matrix), grads, strict=True)
        ]


class Kind(NamedTuple):
    """One line of the table."""

    name: str
    to_matrix: Callable[[Layer, Sequence[Tensor]], Tensor]
    from_matrix: Callable[[Layer, Tensor], Sequence[Tensor]]


def _weight_to_matrix(layer: Layer, grads: Sequence[Tensor]) -> Tensor:
    weight = grads[0].reshape(layer.G.groups, layer.G.width, -1)
    if not layer.with_bias:
        return weight
    return torch.cat([weight, grads[1].reshape(layer.G.groups, layer.G.width, 1)], dim=2)


def _matrix_to_weight(layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
    return [matrix[..., :-1], matrix[..., -1]] if layer.with_bias else [matrix]


def _table_to_matrix(layer: Layer, grads: Sequence[Tensor]) -> Tensor:
    return grads[0].T[None]


def _matrix_to_table(layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
    return [matrix[0].T]


def _vectors_to_matrix(layer: Layer, grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads])[None, :, None]


def _matrix_to_vectors(layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
    return matrix.flatten().chunk(len(layer.parameters))


def _transposed_to_matrix(layer: Layer, grads: Sequence[Tensor]) -> Tensor:
    assert layer.A is not None
    return grads[0].reshape(layer.A.groups, layer.A.width, -1).mT


def _matrix_to_transposed(layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
    return [matrix.mT]


LINEAR = Kind("linear", _weight_to_matrix, _matrix_to_weight)
CONVOLUTION = Kind("convolution", _weight_to_matrix, _matrix_to_weight)
TRANSPOSED = Kind("transposed convolution", _transposed_to_matrix, _matrix_to_transposed)
EMBEDDING = Kind("embedding", _table_to_matrix, _matrix_to_table)
LAYER_NORM = Kind("layer norm", _vectors_to_matrix, _matrix_to_vectors)
RMS_NORM = Kind("rms norm", _vectors_to_matrix, _matrix_to_vectors)
GROUP_NORM = Kind("group norm", _vectors_to_matrix, _matrix_to_vectors)
BATCH_NORM = Kind("batch norm", _vectors_to_matrix, _matrix_to_vectors)
NORMS = (LAYER_NORM, RMS_NORM, GROUP_NORM, BATCH_NORM)

# isinstance, not type: FSDP2, LoRA and torch's own Linear subclasses swap or extend classes.
KINDS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Kind], ...] = (
    (nn.Linear, LINEAR),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONVOLUTION),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), TRANSPOSED),
    (nn.Embedding, EMBEDDING),
    (nn.LayerNorm, LAYER_NORM),
    (nn.RMSNorm, RMS_NORM),
    (nn.GroupNorm, GROUP_NORM),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), BATCH_NORM),
)


class Statistics(NamedTuple):
    """What is gathered from each kind of layer: a named choice of functions."""

    rows: Mapping[str, RowsOf]
    """By kind; a kind that is not here has no curvature."""
    loss_terms: Callable[[nn.Module, Tensor], int] = rows.loss_terms
    """Over how many terms the mean of the loss is taken to be, from a module and its output's gradient."""
    cut: Callable[[int, int | None, int], Blocks] = blocks.cut
    """``(width, block_size, groups)`` to blocks, for all factors but the diagonal ones."""
    squares: Mapping[str, SquaresOf] = MappingProxyType({})
    """By kind: how the sums of squares of rows are found without making the rows, where that is cheaper."""
    split_embedding_G: bool = True


EXPAND = Statistics(
    {
        "linear": rows.linear_rows,
        "convolution": rows.conv_rows,
        "transposed convolution": rows.transposed_conv_rows,
        "embedding": rows.embedding_rows,
        "layer norm": rows.layer_norm_rows,
        "rms norm": rows.rms_norm_rows,
        "group norm": rows.group_norm_rows,
        "batch norm": rows.batch_norm_rows,
    },
    squares={"convolution": rows.conv_squares},
)
REDUCE = Statistics(
    {
        **{name: rows_of for name, rows_of in EXPAND.rows.items() if name != "transposed convolution"},
        "linear": rows.reduced_linear_rows,
        "convolution": rows.reduced_conv_rows,
    },
    rows.batch_size,
)
# As MindSpore's nn.thor has them on Ascend: norms take plain momentum, and the loss is a mean over the batch.
THOR = Statistics(
    {"linear": rows.linear_rows, "convolution": rows.conv_rows, "embedding": thor_rows.ascend_embedding_rows},
    rows.batch_size,
    blocks.cut_with_remainder,
    split_embedding_G=False,
)
STATISTICS: Mapping[str, Statistics] = {"expand": EXPAND, "reduce": REDUCE, "thor": THOR}


_BASES = [base for types, _ in KINDS for base in (types if isinstance(types, tuple) else (types,))]


def plain_name(name: str) -> str:
    """A module's name without what `torch.compile` put into it.

    >>> plain_name("net._orig_mod.0"), plain_name("net._orig_mod")
    ('net.0', 'net')
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def layers_of(
    model: nn.Module,
    *,
    block_size: int | None,
    precondition_bias: bool,
    only: Set[nn.Parameter] | None = None,
    statistics: Statistics = EXPAND,
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Every module of ``model`` that owns parameters: those with curvature, and why the others have none.

    Args:
        model: names are those of ``model.named_modules()``, without the ``_orig_mod.`` that `torch.compile` adds.
        block_size: largest block; None for whole factors.
        precondition_bias: take the biases of linear layers and convolutions into A, as its last coordinate.
        only: leave out layers whose weight is not among these parameters.
        statistics: what is gathered.
    """
    layers: dict[str, Layer] = {}
    left_out: dict[str, str] = {}
    owners: dict[nn.Parameter, str] = {}
    bypassed = {
        child
        for m in model.modules()
        if isinstance(m, nn.MultiheadAttention)
        for child in m.modules()
        if child is not m
    }
    for full_name, module in model.named_modules():
        name = plain_name(full_name)
        own = dict(module.named_parameters(recurse=False))
        if not own and "weight" not in getattr(module, "parametrizations", {}):
            continue
        kind = next((k for types, k in KINDS if isinstance(module, types) and k.name in statistics.rows), None)
        reason = _reason_against(module, kind, own, only)
        weight = own.get("weight")
        if module in bypassed:
            reason = "inside nn.MultiheadAttention, which uses its parameters without calling it"
        elif weight is not None and reason is None and weight in owners:
            reason = f"shares its weight with {owners[weight]!r}, which is preconditioned"
        if reason is not None or kind is None or weight is None:
            left_out[name] = reason or "no curvature for this type of module"
            continue
        layers[name] = _layer(name, module, kind, statistics, block_size, precondition_bias)
        owners[weight] = name
    return layers, left_out


def _reason_against(
    module: nn.Module, kind: Kind | None, own: dict[str, nn.Parameter], only: Set[nn.Parameter] | None
) -> str | None:
    """Why this module takes plain momentum, or None if nothing speaks against its curvature."""
    if kind is None:
        return f"no curvature for {type(module).__name__}"
    weight = own.get("weight")
    if weight is None:
        return "its weight is not a plain parameter (parametrized, or not affine)"
    if isinstance(weight, nn.UninitializedParameter):
        return "lazy and not initialised: run one forward pass before fit"
    if not weight.requires_grad:
        return "frozen"
    if only is not None and weight not in only:
        return "not in the optimizer"
    if kind in NORMS and not all(p.requires_grad for p in own.values()):
        return "frozen in part"
    if weight.numel() == 0:
        return "empty weight"
    # A linear layer's own forward (LoRA, quantised training) still multiplies by its weight; others may do anything.
    bases = [base for base in _BASES if isinstance(module, base)]
    if kind is not LINEAR and not any(type(module).forward is base.forward for base in bases):
        return f"{type(module).__name__} has a forward of its own, which may not be {bases[0].__name__}'s"
    if isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq):
        return "sparse or frequency-scaled gradient"
    if not weight.is_floating_point():
        return f"weight of dtype {weight.dtype}"
    return None


def _layer(
    name: str, module: Any, kind: Kind, statistics: Statistics, block_size: int | None, precondition_bias: bool
) -> Layer:
    rows_of, cut = statistics.rows[kind.name], statistics.cut
    weight: nn.Parameter = module.weight
    bias: nn.Parameter | None = getattr(module, "bias", None)
    if kind in NORMS:
        width = weight.numel() * (1 if bias is None else 2)
        own = (weight,) if bias is None else (weight, bias)
        return Layer(name, module, own, None, blocks.diagonal(width), kind, rows_of)
    if kind is EMBEDDING:
        G = cut(module.embedding_dim, block_size if statistics.split_embedding_G else None, 1)
        return Layer(name, module, (weight,), blocks.diagonal(len(weight)), G, kind, rows_of)
    if kind is TRANSPOSED:  # its weight is [in, out / groups, *kernel]; a bias does not belong to the rows
        width_A, width_G = len(weight) // module.groups, weight.numel() // len(weight)
        A, G = cut(width_A, block_size, module.groups), cut(width_G, block_size, module.groups)
        return Layer(name, module, (weight,), A, G, kind, rows_of)
    with_bias = precondition_bias and bias is not None and bias.requires_grad
    groups = module.groups if kind is CONVOLUTION else 1
    width_A, width_G = weight.numel() // weight.shape[0] + with_bias, weight.shape[0] // groups
    parameters = (weight, bias) if with_bias and bias is not None else (weight,)
    A, G = cut(width_A, block_size, groups), cut(width_G, block_size, groups)
    return Layer(name, module, parameters, A, G, kind, rows_of, statistics.squares.get(kind.name))
