"""Pairs (a, g) on their way, and checks, once per layer, that they are those of its weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_thor.layers.base import Layer, ModuleUse
from lightning_thor.layers.functional import type_names
from lightning_thor.layers.weight_product import WeightProduct, backward_pass, is_used_again, outermost_pass

Arrange = Callable[[Tensor], Tensor]
"""Brings the gradient of an output to the dimensions of the input."""

EXACT_TOLERANCE, ROUNDED_TOLERANCE = 0.01, 0.05
"""The largest relative difference between gradient and product: in float32, and in lower precision."""

NOT_A_PAIR = (
    "its weight's gradient is not the product of its output's gradient and its input: it changes its input or its "
    "weight before it multiplies them, multiplies by its weight twice, or a hook changes the weight's gradient. Call a "
    "plain nn.Linear inside of it, or use register_layer"
)


QUANTISED = {
    "torch.ao.nn.qat.modules.linear.Linear",
    "torchao.float8.float8_linear.Float8Linear",
    "torchao.quantization.qat.linear.FakeQuantizedLinear",
}
"""Types that round their input and weight to few bits before they multiply them: their weight's gradient is the product
but for the rounding, and for the few entries that are clipped."""


class Pair:
    """An input that waits for the gradient of its output.

    Args:
        name: of the module.
        a: the input; released when the pair is handed over, since autograd frees saved tensors after backward, but no
            hooks.
        projected: the part of the input that a check needs, if not all.
        arrange: see `Arrange`; None: the gradient has these dimensions.
    """

    def __init__(self, name: str, a: Tensor, projected: Tensor | None, arrange: Arrange | None) -> None:
        self.name, self.projected, self.arrange = name, projected, arrange
        self.a: Tensor | None = a
        # Tensors made in inference mode count no changes.
        self._version = None if a.is_inference() or a.is_nested else a._version
        self.g: Tensor | None = None
        self.promise: object = None
        """What ``expect`` returned, until the pair is handed over; it goes with the graph that holds this pair."""
        self.forward_in = backward_pass()
        """The backward pass in which a reentrant checkpoint ran this forward again; below 0: none."""
        self.forward_within = outermost_pass()
        """The outermost pass around that one."""
        self.backward_pass: int = -1
        self.is_watched = False
        """Whether a check compares what its product sends to the weight."""
        self.was_added = False
        """Whether the backward pass under way added its gradient; the check sets it back."""

    @property
    def input_was_changed(self) -> bool:
        return self.a is not None and self._version is not None and self.a._version != self._version

    def is_of(self, name: str, a: Tensor) -> bool:
        """Whether this is the pair of the named module's input ``a``."""
        return self.name == name and self.a is not None and self.a.data_ptr() == a.data_ptr()

    def add(self, g: Tensor) -> None:
        """Add the gradient of a backward pass."""
        if self.backward_pass < 0:
            self.backward_pass = outermost_pass(self.forward_within)
        self.g = g if self.g is None else self.g + g
        self.was_added = True


class _Sums(NamedTuple):
    """Sums over pairs of one layer."""

    product: Tensor
    """Gᵀ A v, with rows G of output gradients, rows A of inputs and one vector v: ``[groups * out]``."""
    squares: Tensor
    """The sum of the squares of the terms of that sum, by which its rounding is measured; 0-dimensional."""
    is_rounded: bool
    found: Tensor | None = None
    """The weight's gradient times v, as ``product``."""
    rounding: Tensor | float = 0.0
    """A bound of the norm of the rounding errors in ``found``."""
    handle: RemovableHandle | None = None


class PairChecks:
    """Compares ``g.T @ a``, summed over a layer's pairs, with their part of its weight's gradient: both times one fixed
    vector, since a matrix-vector product costs nothing. Where they differ, the layer's factors do not belong to its
    weight: its module changes the input first, or masks the weight.

    Of a linear layer the part is what the product itself sends to the weight: a penalty on the weight, and its uses
    without the module, may add to the gradient, whose curvature is that of the pairs all the same. Where autograd's
    graph does not show the product (compiled regions, kinds of users), or a hook changes the weight's gradient, it is
    all of the gradient.

    Modules that run torch's own forward (convolutions, embeddings, norms, all that compute their weight from a
    parameter, whose gradient is another than the weight's) are not checked, nor are `QUANTISED` ones, nor weights that
    a module without curvature shares (a table with a forward of its own, tied to an output layer): there the gradient
    is known to be more.

    Args:
        model: the model of the layers.
        layers: layers with curvature, by name.
        uses: the layer's number and its use, by the name of the module.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Layer], uses: Mapping[str, tuple[int, ModuleUse]]
    ) -> None:
        self._layers = list(layers.values())
        owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
        self._numbers = {
            name: number
            for name, (number, use) in uses.items()
            if (layer := self._layers[number]).kind.checks_pairs
            and owners[layer.parameters[0]] == len(layer.uses)
            and not use.is_computed
            and QUANTISED.isdisjoint(type_names(use.module))
        }
        self._modules: dict[str, Any] = {name: uses[name][1].module for name in self._numbers}
        self._unchecked = self.numbers
        self._sums: dict[int, _Sums] = {}
        """Of the open window, by the layer's number."""

    @property
    def numbers(self) -> set[int]:
        """Of the layers that are checked at some time."""
        return set(self._numbers.values())

    def wants(self, name: str) -> bool:
        """True until the layer that the named module belongs to was checked."""
        return self._numbers.get(name) in self._unchecked

    def skip(self, name: str) -> None:
        """Check the layer of the module ``name`` no more: its gradient is known to be more than the product."""
        number = self._numbers.get(name, -1)
        self._unchecked.discard(number)
        self._drop(number)

    def watch(self, name: str, use: WeightProduct, output: Tensor, a: Tensor, pair: Pair) -> bool:
        """Compare with what a product sends to the weight.

        Args:
            name: of the module.
            use: the product, in the graph of a forward pass.
            output: of the module.
            a: its input.
            pair: of this product.

        Returns:
            False if this cannot be: then `add` needs the accumulator.
        """
        number = self._numbers[name]
        module, is_linear = self._modules[name], self._layers[number].kind.is_linear
        if not is_linear or use.sender is None or use.accumulator.variable._backward_hooks:
            return False
        is_torchs_own = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
        if not is_torchs_own and is_used_again(output, use, a):
            return False
        place = use.sent_number

        def sent(gradients: tuple[Tensor | None, ...], _: Any) -> None:
            was_added, pair.was_added = pair.was_added, False
            sums = self._sums.get(number) if was_added else None
            if sums is not None and sums.handle is None:
                self._find(number, gradients[place])

        use.sender.register_hook(sent)
        return True

    def project(self, name: str, a: Tensor) -> Tensor | None:
        """What the check needs of an input ``a``: that of a linear layer, ``[..., in]``, times a fixed vector,
        ``[...]``; None stands for the whole input."""
        kind, module = self._layers[self._numbers[name]].kind, self._modules[name]
        if not kind.is_linear or not a.is_floating_point() or not a.dim():
            return None
        _, width, _ = kind.factor_widths(module, module.weight.shape)
        if width is None or a.shape[-1] != width or hasattr(a, "device_mesh"):  # of tensor parallelism
            self._unchecked.discard(self._numbers[name])  # the accumulator reports pairs that do not fit at all
            return None
        a = a.detach().to(torch.promote_types(a.dtype, torch.float32))
        return a @ _vector(1, width, a)[0]

    def add(self, name: str, a: Tensor, g: Tensor, accumulator: Any) -> None:
        """Add a pair of the backward pass under way.

        Args:
            name: of the module.
            a: what `project` returned; the whole input where that is None.
            g: the gradient of its output.
            accumulator: the autograd node that will add to the gradient of its weight; None if its product is watched.
        """
        number = self._numbers[name]
        kind, module = self._layers[number].kind, self._modules[name]
        dtype = torch.promote_types(g.dtype, torch.float32)
        if kind.is_linear:
            out = kind.factor_widths(module, module.weight.shape)[2]
            if not g.dim() or g.shape[-1] != out or a.numel() * out != g.numel():
                self.skip(name)  # the accumulator reports pairs that do not fit
                return
            terms = g.reshape(-1, g.shape[-1]).to(dtype).T[None] * a.reshape(1, 1, -1)
        else:
            rows = kind.rows(module, a, g, dtype, None)
            assert rows.a is not None
            terms = rows.g * (_vector(rows.a.shape[0], rows.a.shape[1], rows.a)[:, None, :] @ rows.a)
        product, squares = terms.sum(-1).flatten(), terms.square().sum()
        sums = self._sums.get(number)
        if sums is None:
            is_rounded = g.dtype.itemsize < 4 or torch.is_autocast_enabled(g.device.type) or _products_are_rounded()
            sums = _Sums(product, squares, is_rounded)
        else:
            sums = sums._replace(product=sums.product + product, squares=sums.squares + squares)
        if accumulator is not None and sums.handle is None:
            # What products sent before is part of it.
            sums = sums._replace(handle=accumulator.register_prehook(self._find_all(number)), found=None, rounding=0.0)
        self._sums[number] = sums

    def collect(self) -> dict[int, Tensor]:
        """The results since the last call, by the layer's number: True where gradient and product differ,
        0-dimensional tensors on their device."""
        verdicts, collected, self._sums = {}, self._sums, {}
        for number, sums in collected.items():
            if sums.handle is not None:
                sums.handle.remove()
            if sums.found is None:
                continue
            self._unchecked.discard(number)
            tolerance = ROUNDED_TOLERANCE if sums.is_rounded else EXACT_TOLERANCE
            allowed = tolerance * (sums.found.norm() + sums.squares.sqrt())
            # False where it is not finite.
            verdicts[number] = (sums.found - sums.product).norm() > allowed + sums.rounding
        return verdicts

    def keep(self, numbers: set[int]) -> None:
        """Check no layers any more but those of these ``numbers``."""
        self._unchecked &= numbers
        for number in self._sums.keys() - numbers:
            self._drop(number)

    def reset(self) -> None:
        """Forget the open window: its step was skipped."""
        for number in list(self._sums):
            self._drop(number)

    def _drop(self, number: int) -> None:
        sums = self._sums.pop(number, None)
        if sums is not None and sums.handle is not None:
            sums.handle.remove()

    def _find_all(self, number: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def find(gradients: tuple[Tensor | None, ...]) -> None:
            # Of one backward pass alone: the next may have a graph, and so an accumulator, of its own.
            self._unchecked.discard(number)
            sums = self._sums.get(number)
            if sums is not None and sums.handle is not None and sums.found is None:
                sums.handle.remove()
                self._find(number, gradients[0])

        return find

    def _find(self, number: int, gradient: Tensor | None) -> None:
        """Add what a backward pass sends to a weight."""
        sums = self._sums.get(number)
        if sums is None:
            return
        if gradient is None or gradient.is_sparse:
            self._unchecked.discard(number)
            self._drop(number)
            return
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            limits = torch.finfo(gradient.dtype)
            matrix = _matrix(self._layers[number], gradient.detach().to(sums.product.dtype))
            vector = _vector(len(matrix), matrix.shape[-1], matrix)
            found = (matrix @ vector[..., None]).flatten()
            # Each entry is rounded, and their sum may be small beside them, as that of features with a mean.
            eps = torch.finfo(torch.bfloat16).eps if sums.is_rounded else limits.eps
            terms = torch.linalg.vector_norm(matrix, dim=-2) * vector
            # Below the least normal number entries are rounded by so much, however small they are.
            rounding = eps * terms.norm() + limits.smallest_normal * limits.eps * math.sqrt(matrix.numel())
        self._sums[number] = sums._replace(
            found=found if sums.found is None else sums.found + found, rounding=sums.rounding + rounding
        )


def _matrix(layer: Layer, gradient: Tensor) -> Tensor:
    """A weight's gradient as ``[groups, out, in]``, in the groups of its rows and without a bias."""
    matrix = layer.kind.to_matrix(replace(layer, parameters=layer.parameters[:1]), [gradient])
    return matrix if layer.A is None else matrix.reshape(layer.A.groups, -1, matrix.shape[-1])


def _vector(groups: int, width: int, like: Tensor) -> Tensor:
    """Fixed numbers in [-0.5, 0.5], ``[groups, width]``, in the dtype and on the device of ``like``, without a random
    generator."""
    numbers = torch.arange(1, groups * width + 1, dtype=torch.float64, device=like.device) * 0.6180339887498949
    return (numbers.frac() - 0.5).to(like.dtype).view(groups, width)


def _products_are_rounded() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # chosen by `fp32_precision`
        return True


def is_readable(x: Any) -> bool:
    """Whether a module's input is a tensor of rows, or `as_plain_tensor` makes one of it: not sparse, and not of a
    subclass that computes in its own way, but for those of torch.distributed."""
    if not isinstance(x, Tensor) or x.layout not in (torch.strided, torch.jagged):
        return False
    computes = not x.is_nested and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return not computes or type(x).__module__.startswith("torch.distributed.")


def as_plain_tensor(x: Tensor) -> Tensor:
    """``x`` without a subclass that only labels it; the rows of a nested tensor as one tensor."""
    if x.is_nested:
        x = x.detach()
        return x.values() if x.layout is torch.jagged else torch.cat([one.flatten(0, -2) for one in x.unbind()])
    if type(x) is Tensor or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    return x.as_subclass(Tensor)
