"""A pair (a, g) on its way: an input, and the hooks of autograd's graph that bring the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_thor.layers.weight_product import WeightProduct, backward_pass

Arrange = Callable[[Tensor], Tensor]
"""Brings a tensor to the shape in which it is handed over."""


class Pair:
    """An input that waits for the gradient of its output.

    Args:
        name: of the module.
        a: the input; released when the pair is handed over, since autograd frees saved tensors after backward, but no
            hooks.
        projected: the part of the input that a check needs, if not all.
        arrange: brings the gradient to the shape in which it is handed over.
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
            self.backward_pass = self.forward_in if self.forward_in >= 0 else backward_pass()
        self.g = g if self.g is None else self.g + g
        self.was_added = True


def before_product(use: WeightProduct, rows: torch.Size, on_gradient: Callable[[Tensor], None]) -> None:
    """Call ``on_gradient`` with the gradient of the product itself, in the input's dimensions before the last,
    ``rows``: the operation may have flattened them into one."""

    def in_rows(g: Tensor) -> None:
        if g.dim() == 2 and len(rows) != 1 and rows.numel() == len(g):
            g = g.unflatten(0, rows) if rows else g[0]
        on_gradient(g)

    _register_before(use.node, use.output_number, in_rows)


def before_backward_of(output: Tensor, on_gradient: Callable[[Tensor], None]) -> None:
    """Call ``on_gradient`` with the gradient of ``output`` as it is now."""
    base = output._base
    if base is None or not base.requires_grad or not base.is_contiguous():
        # A tensor hook, since a full backward hook fails if the next operation is in place (ReLU(inplace=True)).
        output.register_hook(on_gradient)
        return
    # An operation in place, on a view or on its base, moves the view in the graph, but not its base.
    # (A hook of a view that was changed already may crash the process: pytorch/pytorch#196459.)
    place = output.shape, output.stride(), output.storage_offset() - base.storage_offset()
    _register_before(base.grad_fn, base.output_nr, lambda g: on_gradient(g.contiguous().as_strided(*place)))


def _register_before(node: Any, number: int, on_gradient: Callable[[Tensor], None]) -> None:
    """Call ``on_gradient`` with the gradient of a node's output of this number, before the node runs."""

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        g = gradients[number]
        if g is not None:
            on_gradient(g)

    node.register_prehook(before)


def as_plain_tensor(x: Tensor) -> Tensor:
    """``x`` without a subclass that only labels it; the rows of a nested tensor as one tensor."""
    if x.is_nested:
        x = x.detach()
        return x.values() if x.layout is torch.jagged else torch.cat([one.flatten(0, -2) for one in x.unbind()])
    if type(x) is Tensor or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    return x.as_subclass(Tensor)
