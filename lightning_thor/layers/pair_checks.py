"""Checks, once per layer, that the pairs it is observed by are those that its weight's gradient is made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_thor.layers.base import Layer, ModuleUse
from lightning_thor.layers.registry import EXPAND, LINEAR, LINEAR_TRANSPOSED, REGISTERED

EXACT_TOLERANCE, ROUNDED_TOLERANCE = 0.01, 0.05
"""The largest relative difference between both: of float32 products, and of those in lower precision."""


NOT_A_PAIR = (
    "its weight's gradient is not the product of its output's gradient and its input: it changes its input or its "
    "weight before it multiplies them, or its weight is used elsewhere too. Call a plain nn.Linear inside of it, or "
    "use register_layer"
)


class _Sums(NamedTuple):
    """Over the pairs of one layer in one backward pass."""

    product: Tensor
    """Gᵀ A v, with rows G of output gradients, rows A of inputs and one vector v: ``[groups * out]``."""
    squares: Tensor
    """The sum of the squares of the terms of that sum: what its rounding is measured by; 0-dimensional."""
    is_rounded: bool
    handle: RemovableHandle


class PairChecks:
    """For every layer ``g.T @ a`` summed over its pairs is to be its weight's gradient (times one vector, for one
    matrix-vector product costs nothing). What is not so has other factors than those of its weight: a module that
    changes its input first, masks its weight, or is used in other ways too.

    Convolutions, embeddings and norms run torch's own forward and are not looked at; nor are weights that a module
    without curvature shares (a scaled table of embeddings tied to an output layer), whose gradient is known to be more.

    Args:
        model: that they are of.
        layers: with curvature, by name.
        uses: the number of the layer and the use of it, by the name of the module.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Layer], uses: Mapping[str, tuple[int, ModuleUse]]
    ) -> None:
        self._layers = list(layers.values())
        owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
        self._numbers = {
            name: number
            for name, (number, use) in uses.items()
            if _is_checked(layer := self._layers[number], use) and owners[layer.parameters[0]] == len(layer.uses)
        }
        self._modules: dict[str, Any] = {name: uses[name][1].module for name in self._numbers}
        self._unchecked = set(self._numbers.values())
        self._sums: dict[int, _Sums] = {}
        self._verdicts: dict[int, Tensor] = {}

    def wants(self, name: str) -> bool:
        """True until the layer of that name was checked."""
        return self._numbers.get(name) in self._unchecked

    def project(self, name: str, a: Tensor) -> Tensor | None:
        """An input of a linear layer ``[..., in]`` times a fixed vector, ``[...]``; of another layer the whole input is
        needed, which None stands for."""
        layer = self._layers[self._numbers[name]]
        if layer.kind not in (LINEAR, LINEAR_TRANSPOSED) or not a.is_floating_point() or not a.dim():
            return None
        width = self._modules[name].weight.shape[0 if layer.kind is LINEAR_TRANSPOSED else 1]
        if a.shape[-1] != width:
            self._unchecked.discard(self._numbers[name])  # the observer tells of what does not fit at all
            return None
        a = a.detach().to(torch.promote_types(a.dtype, torch.float32))
        return a @ _vector(1, width, a)[0]

    def add(self, name: str, a: Tensor, g: Tensor, accumulator: Any) -> None:
        """A pair of the backward pass under way.

        Args:
            name: of the module.
            a: what `project` gave; the whole input where that is None.
            g: the gradient of its output.
            accumulator: the node that will add to the gradient of its weight.
        """
        number = self._numbers[name]
        layer, dtype = self._layers[number], torch.promote_types(g.dtype, torch.float32)
        if layer.kind in (LINEAR, LINEAR_TRANSPOSED):
            if not g.dim() or a.numel() * g.shape[-1] != g.numel():
                self._unchecked.discard(number)
                return
            terms = g.reshape(-1, g.shape[-1]).to(dtype).T[None] * a.reshape(1, 1, -1)
        else:
            rows = EXPAND.rows[layer.kind.name](self._modules[name], a, g, dtype, None)
            assert rows.a is not None
            terms = rows.g * (_vector(rows.a.shape[0], rows.a.shape[1], rows.a)[:, None, :] @ rows.a)
        product, squares = terms.sum(-1).flatten(), terms.square().sum()
        before = self._sums.get(number)
        if before is None:
            handle = accumulator.register_prehook(self._compare(number))
            is_rounded = g.dtype.itemsize < 4 or torch.is_autocast_enabled(g.device.type) or _products_are_rounded()
            self._sums[number] = _Sums(product, squares, is_rounded, handle)
        else:
            self._sums[number] = before._replace(product=before.product + product, squares=before.squares + squares)

    def collect(self) -> dict[int, Tensor]:
        """The numbers of the layers that were checked since the last call, and whether they are not what they should
        be: 0-dimensional tensors on their device."""
        verdicts, self._verdicts = self._verdicts, {}
        for sums in self._sums.values():
            sums.handle.remove()
        self._sums.clear()
        return verdicts

    def stop(self) -> None:
        """Check no layer any more."""
        self.collect()
        self._unchecked.clear()

    def forget(self) -> None:
        """Check the layers of the open window again: its step was skipped."""
        self._unchecked.update(self._verdicts)
        self._verdicts.clear()
        for sums in self._sums.values():
            sums.handle.remove()
        self._sums.clear()

    def _compare(self, number: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def compare(gradients: tuple[Tensor | None, ...]) -> None:
            sums = self._sums.pop(number, None)
            (gradient,) = gradients
            if sums is None:
                return
            sums.handle.remove()
            self._unchecked.discard(number)
            if gradient is None or gradient.is_sparse:
                return
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                smallest = torch.finfo(gradient.dtype).smallest_normal * torch.finfo(gradient.dtype).eps
                matrix = _matrix(self._layers[number], gradient.detach().to(sums.product.dtype))
                found = (matrix @ _vector(len(matrix), matrix.shape[-1], matrix)[..., None]).flatten()
                allowed = (ROUNDED_TOLERANCE if sums.is_rounded else EXACT_TOLERANCE) * (
                    found.norm() + sums.squares.sqrt()
                )
                # Below the least normal number entries are rounded by so much, however small they are.
                allowed += smallest * math.sqrt(matrix.numel())
                self._verdicts[number] = (found - sums.product).norm() > allowed  # False where it is not finite

        return compare


def are_rows_of(layer: Layer, module: Any, a: Tensor, g: Tensor, *, whole: bool = True) -> bool:
    """Whether ``a [..., in]`` and ``g [..., out]`` can be rows of a linear layer's weight; as many of both, if ``a`` is
    ``whole``."""
    weight = module.weight
    out, width = (
        (weight.shape[1], weight.shape[0]) if layer.kind is LINEAR_TRANSPOSED else (len(weight), weight.shape[1])
    )
    shapes_fit = a.dim() > 0 and g.dim() > 0 and a.shape[-1] == width and g.shape[-1] == out
    return shapes_fit and a.is_floating_point() and not (whole and a.numel() * out != g.numel() * width)


def _matrix(layer: Layer, gradient: Tensor) -> Tensor:
    """A weight's gradient as ``[groups, out, in]``, in the groups of its rows."""
    if layer.kind in (LINEAR, LINEAR_TRANSPOSED):
        return (gradient.T if layer.kind is LINEAR_TRANSPOSED else gradient)[None]
    return layer.kind.to_matrix(layer, [gradient])


def _is_checked(layer: Layer, use: ModuleUse) -> bool:
    known = layer.kind in (LINEAR, LINEAR_TRANSPOSED) or layer.kind in REGISTERED.values()
    return known and use.attention is None and layer.param_slice is None


def _vector(groups: int, width: int, of: Tensor) -> Tensor:
    """Fixed numbers in [-0.5, 0.5], ``[groups, width]``, in the dtype and on the device of another tensor; without a
    random generator."""
    numbers = torch.arange(1, groups * width + 1, dtype=torch.float64, device=of.device) * 0.6180339887498949
    return (numbers.frac() - 0.5).to(of.dtype).view(groups, width)


def _products_are_rounded() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # chosen by `fp32_precision`
        return True
