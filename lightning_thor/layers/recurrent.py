"""Torch's recurrent layers, which call no module for their products with weights: each step of each gate is a row.

Forward is one call of a library (cuDNN, oneDNN), whose backward is one node of autograd's graph. While a pass is
recorded the libraries are off. Torch then takes its own operations, step by step, and the graph shows every product
with a weight and has its input saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from lightning_thor.layers.base import Layer, LayerKind
from lightning_thor.layers.functional import calls_base
from lightning_thor.layers.linear import ProjectionKind
from lightning_thor.layers.weight_product import accumulates, backward_pass, before_node, products_between

Recurrent = nn.RNNBase | nn.RNNCellBase
LIBRARIES = ("cudnn", "mkldnn")
IS_SUPPORTED = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
"""Whether torch says if what autograd saves goes through hooks, as it does from 2.8 on."""


class RecurrentKind(ProjectionKind):
    """The weights ``weight_ih``, ``weight_hh`` and ``weight_hr`` of each layer and direction, ``[gates * hidden, in]``:
    G is partitioned at the borders of the gates."""

    takes_bias = False
    is_linear = True

    def unsupported_reason(self, module: Any, base: type[nn.Module]) -> str | None:
        """A subclass may change what it hands to the base's ``forward``, and what comes back: its products are found in
        autograd's graph."""
        if not IS_SUPPORTED:
            return f"curvature of recurrent layers needs torch 2.8 or newer, this is {torch.__version__}"
        return None if calls_base(module) else LayerKind.unsupported_reason(self, module, base)

    def n_parts(self, module: Any, shape: torch.Size) -> int:
        """The number of gates; 1 for the projection of an LSTM's output."""
        return max(1, shape[0] // int(module.hidden_size))


RECURRENT = RecurrentKind(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def weight_names(module: Recurrent) -> list[str]:
    """The names of the weights of all layers and directions, once each; also of those that are computed from other
    parameters (parametrized, pruned)."""
    names = ("weight_ih", "weight_hh") if isinstance(module, nn.RNNCellBase) else module._flat_weights_names
    # Without asking for them, which would compute them.
    known = {*dict(module.named_parameters(recurse=False)), *vars(module)}
    return [name for name in names if name.startswith("weight_") and (name in known or is_parametrized(module, name))]


def together_in_time(layers: Mapping[str, Layer]) -> list[str]:
    """Of each layer the name of the first one that is to be refreshed at the same steps: without the libraries all
    weights of a recurrent module can be seen at the price of one."""
    first: dict[Any, str] = {}
    return [first.setdefault(layer.module if layer.kind is RECURRENT else name, name) for name, layer in layers.items()]


class WithoutLibraries:
    """A context in which torch's recurrent layers take torch's own operations, in all threads."""

    _lock = Lock()
    _n_open = 0
    """Contexts that are open, in any thread: the flags are the process's."""
    _before: Mapping[str, bool] = {}
    """Which libraries were on before the first of them."""

    def __enter__(self) -> None:
        shared = WithoutLibraries
        with self._lock:
            if not shared._n_open:
                # Not torch.backends: its flags may be frozen, and its contexts change other flags too.
                shared._before = {name: getattr(torch._C, f"_get_{name}_enabled")() for name in LIBRARIES}
            shared._n_open += 1
            self._enable(dict.fromkeys(LIBRARIES, False))

    def __exit__(self, *_: object) -> None:
        shared = WithoutLibraries
        with self._lock:
            shared._n_open -= 1
            if not shared._n_open:
                self._enable(shared._before)

    def _enable(self, enabled: Mapping[str, bool]) -> None:
        for name, is_enabled in enabled.items():
            getattr(torch._C, f"_set_{name}_enabled")(is_enabled)


class Steps(NamedTuple):
    """The products with one weight in a forward pass: one for each step in time, or one for all."""

    accumulator: Any
    """The node of autograd's graph that adds to the weight's gradient."""
    nodes: list[Any]
    """Of the products: each receives the gradient ``[n, out]`` of its own."""
    inputs: list[Tensor]
    """Of the products, ``[n, in]``."""


def products_in(outputs: Any, inputs: Any, weights: Mapping[str, Tensor]) -> dict[str, Steps]:
    """The products with ``weights`` that autograd's graph shows between inputs and outputs, by name of the weight."""
    found: dict[str, Steps] = {}
    for node, accumulator in products_between(outputs, inputs, list(weights.values())):
        a = getattr(node, "_saved_mat1", None)  # with a bias
        a = getattr(node, "_saved_self", None) if a is None else a
        if isinstance(a, Tensor):
            name = next(name for name, weight in weights.items() if weight is accumulator.variable)
            steps = found.setdefault(name, Steps(accumulator, [], []))
            steps.nodes.append(node)
            steps.inputs.append(a.detach())
    return found


class StepGradients:
    """Brings the gradients of one weight's products in a backward pass together.

    Args:
        steps: the products.
        on_gradients: called when the last of their gradients has arrived, with the numbers of the products that had
            one, and these gradients one under the other.
    """

    def __init__(self, steps: Steps, on_gradients: Callable[[tuple[int, ...], Tensor], None]) -> None:
        self._accumulator, self._on_gradients = steps.accumulator, on_gradients
        self._forward_in = self._pass = backward_pass()
        self._found: dict[int, Tensor] = {}
        self._handle: RemovableHandle | None = None
        # Not the nodes themselves, whose hooks hold this.
        for number, node in enumerate(steps.nodes):
            before_node(node, 0, partial(self._add, number))

    def _add(self, number: int, g: Tensor) -> None:
        now = backward_pass()
        if not accumulates(self._accumulator, is_recomputed=-1 < self._forward_in != now):
            return  # no training: the accumulator will not run, and what is held here would hold the graph
        if self._handle is None or self._pass != now:
            self._clear()
            # A weight has its gradient when all its products have theirs. A hook of the weight also runs where
            # `torch.autograd.grad` takes the gradient, but a weight that was frozen since has none.
            weight = self._accumulator.variable
            register = weight.register_hook if weight.requires_grad else self._accumulator.register_prehook
            self._handle, self._pass = register(self._finish), now
        self._found[number] = g.detach()

    def _finish(self, _: Any) -> None:
        found = dict(self._found)
        self._clear()
        if found and self._pass == backward_pass():  # else that pass has failed
            self._on_gradients(tuple(found), torch.cat(list(found.values())))

    def _clear(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._found.clear()


def saves_tensors_elsewhere() -> bool:
    """Whether what autograd saves goes through hooks (checkpointed activations, offloading), and cannot be read; a pass
    that is made again in backward must find the operations that it had."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_transformed() -> bool:
    """Whether a forward pass is one of `torch.func` or `torch.export`: no graph shows its products, and torch's own
    operations are not made for all of it."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()
