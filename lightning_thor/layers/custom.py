"""Layers of users: `register_layer` adds a type of module to the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_thor.layers import base, registry
from lightning_thor.layers.base import Layer, LayerKind, RowsOf, subsample
from lightning_thor.layers.registry import KINDS, REGISTERED, register

UserRows = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


class _Told(NamedTuple):
    """What `register_layer` was told of a type, besides its rows."""

    matrix: Callable[[Any, Tensor], Tensor]
    weight_name: str


_TOLD: dict[type[nn.Module], _Told] = {}


def _told_of(module: nn.Module) -> _Told | None:
    return next((_TOLD[base] for base in type(module).__mro__ if base in _TOLD), None)


def registered_uses(layers: Iterable[Layer]) -> set[str]:
    """The names of the modules of registered types among those that use the layers' weights."""
    return {use.name for layer in layers if layer.kind in REGISTERED.values() for use in layer.uses}


def weight_name_of(module: nn.Module) -> str:
    """The name of the parameter that is the weight."""
    told = _told_of(module)
    return "weight" if told is None else told.weight_name


def _rows_along_out(module: Any, weight: Tensor) -> Tensor:
    return weight.flatten(1)


def register_layer(
    module_type: type[nn.Module],
    rows_of: UserRows,
    *,
    matrix: Callable[[Any, Tensor], Tensor] = _rows_along_out,
    weight: str = "weight",
) -> None:
    """Give modules of a type of your own curvature, in every `Curvature` and `ThorCallback` made afterwards.

    The law that both functions are to keep: ``g.mT @ a`` of the rows is the weight's gradient as a matrix. The loss is
    taken to be a mean over all dimensions of the output but the last, as for `nn.Linear`. With
    ``statistics="reduce"`` the rows of one sample must stand together; they are averaged (a) and summed (g).
    Subclasses whose ``forward`` is another are left out.

    Args:
        module_type: its subclasses are meant too, and a type of torch's may be overruled by its subclass.
        rows_of: called with the module, its first argument and the gradient of its (one) output; gives rows of inputs
            and of gradients, ``[n, in]`` and ``[n, out]``, or ``[groups, n, in]`` and ``[groups, n, out]``.
        matrix: gives, of the module and a tensor in the shape of its weight, a view as a matrix ``[out, in]`` or
            ``[groups, out, in]``; by default all dimensions after the first are inputs.
        weight: name of the parameter. All other parameters of the module take plain momentum.

    Raises:
        TypeError: an argument of another type.
        ValueError: the type has curvature already.

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
    for name, function in (("rows_of", rows_of), ("matrix", matrix)):
        if not callable(function):
            raise TypeError(f"register_layer's {name} must be a function, got {function!r}.")
    if not isinstance(weight, str):
        raise TypeError(f"register_layer's weight must be the name of a parameter, got {weight!r}.")
    if module_type in REGISTERED or any(module_type in types for types, _ in KINDS):
        raise ValueError(
            f"{module_type.__name__} has curvature already. To overrule it, register a subclass and use that."
        )
    kind = LayerKind(
        f"{module_type.__module__}.{module_type.__qualname__}", _user_to_matrix, _matrix_to_user, is_matrix=True
    )
    _TOLD[module_type] = _Told(matrix, weight)
    register(module_type, kind, _user_rows(rows_of, reduce=False), _user_rows(rows_of, reduce=True))


def user_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A tensor in the shape of a registered module's weight, viewed as its matrix ``[groups, out, in]``.

    Raises:
        ValueError: what the user's function gives is no such view.
    """
    told = _told_of(module)
    assert told is not None
    view = told.matrix(module, weight)
    is_view = isinstance(view, Tensor) and view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    if not is_view or view.dim() not in (2, 3) or view.numel() != weight.numel():
        got = f"one of shape {list(view.shape)}" if isinstance(view, Tensor) else repr(view)
        raise ValueError(
            f"matrix of {type(module).__name__}, as it was given to register_layer, must give a view [out, in] or "
            f"[groups, out, in] of all {weight.numel()} entries of a weight {list(weight.shape)}; got "
            f"{got if is_view or not isinstance(view, Tensor) else 'a copy of shape ' + str(list(view.shape))}. Use "
            "view, transpose, permute, unflatten."
        )
    return view if view.dim() == 3 else view[None]


def _user_to_matrix(layer: Layer, grads: Sequence[Tensor]) -> Tensor:
    return user_matrix(layer.module, grads[0].contiguous())


def _matrix_to_user(layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
    direction = matrix.new_empty(layer.parameters[0].shape)
    user_matrix(layer.module, direction).copy_(matrix)
    return [direction]


def _user_rows(rows_of: UserRows, reduce: bool) -> RowsOf:
    def as_rows(module: Any, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> base.Rows:
        terms = registry.batch_size(module, g) if reduce else registry.loss_terms(module, g)
        n_samples: float = terms
        a, g = (_checked(x, name, module) for x, name in zip(rows_of(module, a.detach(), g), "ag", strict=True))
        groups, out, width = user_matrix(module, getattr(module, weight_name_of(module)).detach()).shape
        n = a.shape[1]
        if a.shape != (groups, n, width) or g.shape != (groups, n, out):
            raise ValueError(
                f"The rows of {type(module).__name__}, as they were given to register_layer, must be [{groups}, n, "
                f"{width}] and [{groups}, n, {out}] to fit its weight; got {list(a.shape)} and {list(g.shape)}."
            )
        if reduce:
            by_sample = terms, n // max(terms, 1)
            if n != by_sample[0] * by_sample[1]:
                raise ValueError(
                    f"statistics='reduce' needs as many rows of each sample; {type(module).__name__} gave {n} rows of "
                    f"{terms} samples. Use statistics='expand'."
                )
            a, g = a.unflatten(1, by_sample).mean(2, dtype=dtype), g.unflatten(1, by_sample).sum(2, dtype=dtype)
            return base.Rows(a.mT, g.mT, terms, terms)
        index = subsample(n, max_rows, a.device)
        if index is not None:
            a, g, n_samples = a.index_select(1, index), g.index_select(1, index), terms * len(index) / n
        return base.Rows(a.to(dtype).mT, g.to(dtype).mT, a.shape[1], n_samples)

    return as_rows


def _checked(x: Any, name: str, module: nn.Module) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() not in (2, 3):
        got = list(x.shape) if isinstance(x, Tensor) else x
        raise ValueError(
            f"The rows {name} of {type(module).__name__}, as they were given to register_layer, must be a tensor "
            f"[n, width] or [groups, n, width]; got {got!r}."
        )
    return x if x.dim() == 3 else x[None]
