"""The table: from types of modules to their matrix form and their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from lightning_thor.layers import conv, embedding, linear, norm
from lightning_thor.layers.base import LayerKind, RowsOf, SquaresOf
from lightning_thor.layers.norm import BatchNorm
from lightning_thor.layers.patches import Convolution, TransposedConvolution
from lightning_thor.linalg import block_diagonal
from lightning_thor.linalg.block_diagonal import BlockPartition


def loss_terms(module: nn.Module, g: Tensor) -> int:
    """How many terms the mean of the loss is taken to have: the batch size for convolutions and batch norms, all
    leading dimensions for layers on the last dimension (a loss per token)."""
    if isinstance(module, Convolution | TransposedConvolution):
        return g.shape[0] if g.dim() == len(module.kernel_size) + 2 else 1
    if isinstance(module, BatchNorm | nn.GroupNorm):
        return g.shape[0]
    width = module.weight.shape.numel() if isinstance(module, nn.LayerNorm | nn.RMSNorm) else g.shape[-1]
    return g.numel() // max(width, 1)


def batch_size(module: nn.Module, g: Tensor) -> int:
    """How many terms the mean of a loss has that is one per sample, whatever the layer."""
    return g.shape[0]


LINEAR = LayerKind(
    "linear", linear.weight_to_matrix, linear.matrix_to_weight, takes_bias=True, is_matrix=True, rows="G"
)


LINEAR_TRANSPOSED = LayerKind(
    "mirrored linear",
    linear.transposed_linear_to_matrix,
    linear.matrix_to_transposed_linear,
    takes_bias=True,
    is_matrix=True,
    rows="A",
)


ATTENTION = LayerKind(
    "attention", linear.weight_to_matrix, linear.matrix_to_weight, takes_bias=True, is_matrix=True, rows="G"
)


CONVOLUTION = LayerKind(
    "convolution", linear.weight_to_matrix, linear.matrix_to_weight, takes_bias=True, is_matrix=True, rows="G"
)


TRANSPOSED = LayerKind(
    "transposed convolution", conv.transposed_to_matrix, conv.matrix_to_transposed, is_matrix=True, rows="A"
)


EMBEDDING = LayerKind("embedding", embedding.table_to_matrix, embedding.matrix_to_table, rows="A")


LAYER_NORM = LayerKind("layer norm", norm.vectors_to_matrix, norm.matrix_to_vectors)


RMS_NORM = LayerKind("rms norm", norm.vectors_to_matrix, norm.matrix_to_vectors)


GROUP_NORM = LayerKind("group norm", norm.vectors_to_matrix, norm.matrix_to_vectors)


BATCH_NORM = LayerKind("batch norm", norm.vectors_to_matrix, norm.matrix_to_vectors)


NORMS = (LAYER_NORM, RMS_NORM, GROUP_NORM, BATCH_NORM)


# isinstance, not type: FSDP2, LoRA and torch's own Linear subclasses swap or extend classes.
KINDS: tuple[tuple[tuple[type[nn.Module], ...], LayerKind], ...] = (
    ((nn.Linear,), LINEAR),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONVOLUTION),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), TRANSPOSED),
    ((nn.Embedding,), EMBEDDING),
    ((nn.LayerNorm,), LAYER_NORM),
    ((nn.RMSNorm,), RMS_NORM),
    ((nn.GroupNorm,), GROUP_NORM),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), BATCH_NORM),
    ((nn.MultiheadAttention,), ATTENTION),
)


BY_CLASS_NAME: Mapping[str, LayerKind] = {"transformers.pytorch_utils.Conv1D": LINEAR_TRANSPOSED}
"""Of libraries that are not imported here."""


REGISTERED: dict[type[nn.Module], LayerKind] = {}
"""Of users: see `lightning_thor.layers.custom.register_layer`."""


UNSUPPORTED: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.RNNBase, nn.RNNCellBase), "all its steps and gates are one call, inside which no hook can see"),
    ((nn.Bilinear,), "its weight has two inputs"),
)


_LOSS_TERMS = loss_terms


class KfacApprox(NamedTuple):
    """What is gathered from each kind of layer: a named choice of functions."""

    rows: Mapping[str, RowsOf]
    """By kind; a kind that is not here has no curvature."""
    loss_terms: Callable[[nn.Module, Tensor], int] = _LOSS_TERMS
    """Over how many terms the mean of the loss is taken to be, from a module and its output's gradient."""
    partition: Callable[[int, int | None, int], BlockPartition] = block_diagonal.partition
    """``(width, block_size, groups)`` to blocks, for all factors but the diagonal ones."""
    squares: Mapping[str, SquaresOf] = MappingProxyType({})
    """By kind: how the sums of squares of rows are found without making the rows, where that is cheaper."""
    split_embedding_G: bool = True


_EXPAND: dict[str, RowsOf] = {
    "linear": linear.linear_rows,
    "mirrored linear": linear.linear_rows,
    "attention": linear.linear_rows,
    "convolution": conv.conv_rows,
    "transposed convolution": conv.transposed_conv_rows,
    "embedding": embedding.embedding_rows,
    "layer norm": norm.layer_norm_rows,
    "rms norm": norm.rms_norm_rows,
    "group norm": norm.group_norm_rows,
    "batch norm": norm.batch_norm_rows,
}


_REDUCE: dict[str, RowsOf] = {
    **{name: rows_of for name, rows_of in _EXPAND.items() if name != "transposed convolution"},
    "linear": linear.reduced_linear_rows,
    "mirrored linear": linear.reduced_linear_rows,
    "attention": linear.reduced_linear_rows,
    "convolution": conv.reduced_conv_rows,
}


EXPAND = KfacApprox(_EXPAND, squares={"convolution": conv.conv_squares})


REDUCE = KfacApprox(_REDUCE, batch_size)


# As MindSpore's nn.thor has them on Ascend: norms take plain momentum, and the loss is a mean over the batch.
THOR = KfacApprox(
    {"linear": linear.linear_rows, "convolution": conv.conv_rows, "embedding": embedding.ascend_embedding_rows},
    batch_size,
    block_diagonal.partition_with_remainder,
    split_embedding_G=False,
)


STATISTICS: Mapping[str, KfacApprox] = {"expand": EXPAND, "reduce": REDUCE, "thor": THOR}


def register(module_type: type[nn.Module], kind: LayerKind, expanded: RowsOf, reduced: RowsOf) -> None:
    """A new line of the table, which goes before those of torch's types."""
    REGISTERED[module_type] = kind
    _EXPAND[kind.name], _REDUCE[kind.name] = expanded, reduced


def find_kind(module: nn.Module) -> tuple[LayerKind, type[nn.Module]] | None:
    """The kind of a module, and the class that it has it from; None if there is none."""
    for base in type(module).__mro__:
        if base in REGISTERED:
            return REGISTERED[base], base
        if f"{base.__module__}.{base.__qualname__}" in BY_CLASS_NAME:
            return BY_CLASS_NAME[f"{base.__module__}.{base.__qualname__}"], base
    return next(((kind, base) for types, kind in KINDS for base in types if isinstance(module, base)), None)


def unsupported_reason(module: nn.Module) -> str:
    """Why a module without a kind has none."""
    reason = next((f": {why}" for types, why in UNSUPPORTED if isinstance(module, types)), "")
    return f"no curvature for {type(module).__name__}{reason}"
