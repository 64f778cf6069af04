"""The table of all kinds of layers, by type of module, and `register_layer`, which adds a user's type to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_thor.layers.base import FactorWidths, Layer, LayerKind, Rows, RowsFn, subsample, type_name
from lightning_thor.layers.conv import CONVOLUTION, CONVOLUTION_TRANSPOSED
from lightning_thor.layers.embedding import EMBEDDING, ascend_embedding_rows
from lightning_thor.layers.linear import ATTENTION, LINEAR, LINEAR_TRANSPOSED
from lightning_thor.layers.matrices import EXPERTS, STACKS_IN_OUT, MatricesKind, is_experts
from lightning_thor.layers.norm import BATCH_NORM, GROUP_NORM, LAYER_NORM, RMS_NORM
from lightning_thor.layers.recurrent import RECURRENT, Recurrent
from lightning_thor.linalg import block_diagonal
from lightning_thor.linalg.block_diagonal import BlockPartition

BUILT_IN: Mapping[type[nn.Module] | str, LayerKind] = {
    module_type: kind
    for kind in (
        *(LINEAR, LINEAR_TRANSPOSED, ATTENTION, CONVOLUTION, CONVOLUTION_TRANSPOSED, EMBEDDING),
        *(LAYER_NORM, RMS_NORM, GROUP_NORM, BATCH_NORM, RECURRENT, EXPERTS, STACKS_IN_OUT),
    )
    for module_type in kind.types
}
REGISTERED: dict[type[nn.Module] | str, LayerKind] = {}
"""Users' types, which go before the built-in ones."""


def find_kind(module_type: type[nn.Module]) -> tuple[LayerKind, type[nn.Module]] | None:
    """The kind of modules of a type, and the registered type that they have it from; None if there is none."""
    for table in (REGISTERED, BUILT_IN):
        # Base types too: FSDP2, LoRA and torch's own Linear subclasses swap or extend classes.
        for base in module_type.__mro__:
            kind = table.get(base) or table.get(f"{base.__module__}.{base.__qualname__}")
            if kind is not None:
                return kind, base
    experts = next(filter(is_experts, module_type.__mro__), None)
    return None if experts is None else (EXPERTS, experts)


def unsupported_reason(module: nn.Module) -> str:
    """Why a module without a kind has none. Of one with others inside, which may have curvature, it names the
    parameters that are meant."""
    reason = ": its weight has two inputs" if isinstance(module, nn.Bilinear) else ""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    has_others = next(module.children(), None) is not None and not is_parametrized(module)
    if has_others and own and not reason:
        reason = f"'s own {', '.join(own[:3])}" + (f" and {len(own) - 3} more" if len(own) > 3 else "")
    return f"no curvature for {type_name(module)}{reason}"


class KfacApprox(NamedTuple):
    """Which statistics are gathered: a named choice among the rows that each kind of layer offers."""

    rows_of: Callable[[LayerKind], RowsFn | None]
    """The rows of a kind; None: the kind has no curvature."""
    loss_terms: Callable[[Any, Tensor], int] | None = None
    """``(module, output or its gradient)`` to the number of terms that the mean of the loss has; None: the kind's."""
    partition: Callable[[int, int | None, int], BlockPartition] = block_diagonal.partition
    """``(width, block_size, groups)`` to blocks, for all factors but the diagonal ones."""
    split_embedding_G: bool = True
    """False: G of an embedding is whole, and its table has no curvature where an output layer shares it."""
    masks_rows: bool = False
    """Inputs of rows whose gradient is 0 count as zeros."""


def batch_size(module: nn.Module, g: Tensor) -> int:
    """The number of terms of a loss that has one per sample, whatever the layer."""
    return g.shape[0]


EXPAND = KfacApprox(attrgetter("rows"))
MASKED = EXPAND._replace(masks_rows=True)
REDUCE = KfacApprox(attrgetter("reduced_rows"), batch_size)
THOR = KfacApprox(
    {LINEAR: LINEAR.rows, CONVOLUTION: CONVOLUTION.rows, EMBEDDING: ascend_embedding_rows}.get,
    batch_size,
    block_diagonal.partition_with_remainder,
    split_embedding_G=False,
)
"""As MindSpore's nn.thor on Ascend: norms take plain momentum, and the loss is a mean over the batch."""

STATISTICS: Mapping[str, KfacApprox] = {
    "expand": EXPAND, "masked": MASKED, "reduce": REDUCE, "thor": THOR,
}  # fmt: skip


UserRows = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def _rows_along_out(module: Any, weight: Tensor) -> Tensor:
    return weight.flatten(1)


def register_layer(
    module_type: type[nn.Module],
    rows_of: UserRows | None = None,
    *,
    like: type[nn.Module] | None = None,
    matrices: Literal["out_in", "in_out"] | None = None,
    matrix: Callable[[Any, Tensor], Tensor] = _rows_along_out,
    weight: str = "weight",
) -> None:
    """Give modules of a type of your own curvature, in every `Curvature` and `ThorCallback` made afterwards.

    Either the module multiplies by its ``weight`` as a supported type does (``like``), or by several parameters that
    are matrices (``matrices``), or two functions say how it multiplies (``rows_of`` and ``matrix``), which are to keep
    one law: ``g.mT @ a`` of the rows is the weight's gradient as a matrix. The loss is then taken to be a mean over all
    dimensions of the output but the last, as for `nn.Linear` (for a subclass of another supported type: as for that
    type). With ``statistics="reduce"`` the rows of one sample must be adjacent; they are averaged (a) and summed (g).
    Subclasses with another ``forward`` are left out, but for ``matrices``.

    Args:
        module_type: your type, with its subclasses. A subclass of a supported type overrules it.
        rows_of: called with the module, its first argument and the gradient of its (one) output; returns rows of inputs
            and of gradients, ``[n, in]`` and ``[n, out]``, or ``[groups, n, in]`` and ``[groups, n, out]``.
        like: a supported type, such as `nn.Linear` or `nn.Conv2d`. The module's parameter ``weight`` and all other
            attributes that describe such a layer (``stride``, ``groups``, ...) mean the same as in that type; whatever
            the module does to the product afterwards, its ``forward`` multiplies its first argument by the weight.
        matrices: the order of the last two dimensions of the module's own parameters, of which each is a matrix or,
            with three dimensions, a stack with a matrix for each expert. (Where there are stacks, parameters of two
            dimensions take plain momentum.) Each matrix is a layer, with the rows of its products in ``forward``: of
            the parameter, or of one expert's matrix as a view, by `F.linear`, ``@``, `torch.bmm`, `torch.einsum` or
            `F.grouped_mm`. Experts of transformers are known.
        matrix: called with the module and a tensor in the shape of its weight; returns a view as a matrix ``[out, in]``
            or ``[groups, out, in]``. By default all dimensions after the first are inputs. With ``rows_of`` alone.
        weight: name of the parameter; all other parameters of the module take plain momentum. With ``rows_of`` alone.

    Raises:
        TypeError: an argument of another type; none or several of ``rows_of``, ``like`` and ``matrices``.
        ValueError: the type has curvature already, or ``like`` has none; ``matrices`` is no such order.

    >>> class Mixer(nn.Module):  # multiplies [batch, tokens, channels] over its tokens; weight: [tokens in, tokens out]
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.randn(4, 6))
    ...
    ...     def forward(self, x):
    ...         return torch.einsum("btc,tu->buc", x, self.weight)
    >>> register_layer(
    ...     Mixer,
    ...     lambda module, a, g: (a.mT.flatten(0, 1), g.mT.flatten(0, 1)),  # each channel is a row
    ...     matrix=lambda module, weight: weight.T,
    ... )
    >>> from lightning_thor import Curvature
    >>> list(Curvature(nn.Sequential(Mixer(), nn.Linear(3, 2))).layers)
    ['0', '1']
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_layer takes a class of modules, got {module_type!r}.")
    given = [name for name, one in (("rows_of", rows_of), ("like", like), ("matrices", matrices)) if one is not None]
    if len(given) != 1:
        raise TypeError(
            "register_layer takes one of rows_of, a function, like, a type of layer such as nn.Linear, and matrices, "
            f"'out_in' or 'in_out'; got {' and '.join(given) or 'none'}."
        )
    if rows_of is None and (matrix is not _rows_along_out or weight != "weight"):
        raise TypeError(f"register_layer takes matrix and weight with rows_of only: {given[0]} stands for both.")
    if matrices is not None:
        if matrices not in ("out_in", "in_out"):
            raise ValueError(f"register_layer's matrices must be 'out_in' or 'in_out', got {matrices!r}.")
        kind: LayerKind = MatricesKind(module_type, is_transposed=matrices == "in_out")
    elif like is not None:
        found = find_kind(like) if isinstance(like, type) else None
        is_other = found is not None and found[0] is RECURRENT and not issubclass(module_type, Recurrent)
        if found is None or found[0] is ATTENTION or is_other:
            also = " (a recurrent one for its subclasses alone)" if is_other else ""
            raise ValueError(
                f"register_layer's like must be a type with curvature, such as nn.Linear{also}; got {like!r}."
            )
        kind = found[0]
    else:
        for name, function in (("rows_of", rows_of), ("matrix", matrix)):
            if not callable(function):
                raise TypeError(f"register_layer's {name} must be a function, got {function!r}.")
        if not isinstance(weight, str):
            raise TypeError(f"register_layer's weight must be the name of a parameter, got {weight!r}.")
        assert rows_of is not None
        kind = _UserKind(module_type, rows_of, matrix, weight)
    if module_type in REGISTERED or module_type in BUILT_IN:
        name = module_type.__name__
        raise ValueError(f"{name} has curvature already. To overrule it, register a subclass and use that.")
    REGISTERED[module_type] = kind


class _UserKind(LayerKind):
    """A kind by the functions that were given to `register_layer`."""

    takes_bias = False
    row_factor = None
    is_flat = False
    checks_pairs = True
    needs_returned = True

    def __init__(
        self, module_type: type[nn.Module], rows_of: UserRows, matrix: Callable[[Any, Tensor], Tensor], weight: str
    ) -> None:
        super().__init__(module_type)
        self._rows_of, self._matrix, self.weight_name = rows_of, matrix, weight
        base = find_kind(module_type)
        # A subclass of a convolution has a loss with a term per image, as its base has.
        self.loss_terms = base[0].loss_terms if base is not None else super().loss_terms  # type: ignore[method-assign]

    def rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        """The rows that ``rows_of`` returns, or some of them, evenly spread."""
        terms, (a, g) = self.loss_terms(module, g), self._pair(module, a, g)
        n = a.shape[1]
        index = subsample(n, max_rows, a.device)
        if index is None:
            return Rows(a.to(dtype).mT, g.to(dtype).mT, n, terms)
        a, g = a.index_select(1, index), g.index_select(1, index)
        return Rows(a.to(dtype).mT, g.to(dtype).mT, len(index), terms * len(index) / n)

    def reduced_rows(self, module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
        n_samples, (a, g) = batch_size(module, g), self._pair(module, a, g)
        n = a.shape[1]
        by_sample = n_samples, n // max(n_samples, 1)
        if n != by_sample[0] * by_sample[1]:
            raise ValueError(
                f"statistics='reduce' needs as many rows of each sample; {type(module).__name__} gave {n} rows of "
                f"{n_samples} samples. Use statistics='expand'."
            )
        a, g = a.unflatten(1, by_sample).mean(2, dtype=dtype), g.unflatten(1, by_sample).sum(2, dtype=dtype)
        return Rows(a.mT, g.mT, n_samples, n_samples)

    def factor_widths(self, module: Any, shape: torch.Size) -> FactorWidths:
        # Not the weight itself, which may be sharded.
        weight = torch.empty(shape, device=getattr(module, self.weight_name).device)
        groups, out, width = self._view(module, weight).shape
        return groups, width, out

    def to_matrix(self, layer: Layer, grads: Sequence[Tensor]) -> Tensor:
        return self._view(layer.module, grads[0].contiguous())

    def from_matrix(self, layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
        direction = matrix.new_empty(layer.parameters[0].shape)
        self._view(layer.module, direction).copy_(matrix)
        return [direction]

    def _view(self, module: nn.Module, weight: Tensor) -> Tensor:
        """A tensor in the shape of the weight as its matrix ``[groups, out, in]``, by the user's function.

        Raises:
            ValueError: the function returned something else.
        """
        view = self._matrix(module, weight)
        is_view = isinstance(view, Tensor) and view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        if not is_view or view.dim() not in (2, 3) or view.numel() != weight.numel():
            got = f"a {'view' if is_view else 'copy'} of shape {list(view.shape)}" if isinstance(view, Tensor) else view
            raise ValueError(
                f"matrix of {type(module).__name__}, as it was given to register_layer, must return a view [out, in] "
                f"or [groups, out, in] of all {weight.numel()} entries of a weight {list(weight.shape)}; got {got}. "
                "Use view, transpose, permute, unflatten."
            )
        return view if view.dim() == 3 else view[None]

    def _pair(self, module: Any, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The user's rows ``[groups, n, in]`` and ``[groups, n, out]``.

        Raises:
            ValueError: they do not fit the weight.
        """
        rows_a, rows_g = (
            x[None] if isinstance(x, Tensor) and x.dim() == 2 else x for x in self._rows_of(module, a.detach(), g)
        )
        groups, out, width = self._view(module, getattr(module, self.weight_name).detach()).shape
        are_tensors = isinstance(rows_a, Tensor) and isinstance(rows_g, Tensor) and rows_a.dim() == rows_g.dim() == 3
        if not are_tensors or rows_a.shape != (groups, n := rows_a.shape[1], width) or rows_g.shape != (groups, n, out):
            got = " and ".join(str(list(x.shape) if isinstance(x, Tensor) else x) for x in (rows_a, rows_g))
            raise ValueError(
                f"The rows of {type(module).__name__}, as they were given to register_layer, must be tensors "
                f"[{groups}, n, {width}] and [{groups}, n, {out}] to fit its weight; got {got}."
            )
        return rows_a, rows_g
