"""Where in an autograd graph a layer multiplied by its weight, and which backward passes reach that weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_NODES = 64
"""How many nodes behind an output are searched: enough for what users put after a layer, within it or in hooks."""


DEEPEST_WEIGHT = 5
"""How many operations may lie between a weight and the product with it: casts, transpositions, masks."""


PRODUCTS = ("Addmm", "Mm", "Linear", "Bmm", "Baddbmm", "Addmv", "Mv", "Convolution", "Embedding", "Norm")
"""What the names of nodes begin or end with that multiply by a weight."""


VIEWS = (
    "T",
    "ToCopy",
    "View",
    "UnsafeView",
    "Transpose",
    "Permute",
    "Expand",
    "Clone",
    "Alias",
    "Unsqueeze",
    "Squeeze",
)


class WeightProduct(NamedTuple):
    """The operation of a forward pass that used a weight."""

    node: Any
    """Its autograd node: a hook before it sees the gradient of the operation's own output, whatever was done to that
    output later on, in place or through views."""
    output_number: int
    """Which of the operation's outputs led to the layer's output."""
    accumulator: Any
    """The node that adds to the weight's gradient."""


def find_product(output: Any, weight: Tensor) -> WeightProduct | None:
    """The operation nearest to ``output`` that used ``weight``; None if none is found.

    Args:
        output: what the layer returned: a tensor, or tensors in tuples, lists and dicts.
        weight: the layer's parameter. A sharded one (FSDP2) was used through another parameter of the same shape.
    """
    for tensor in _tensors_in(output):
        found = None if tensor.grad_fn is None else _find_use(tensor, weight)
        if found is not None:
            return found
    return None


def accumulates(accumulator: Any) -> bool:
    """True if the backward pass under way adds to the gradient of the accumulator's parameter: that of
    ``loss.backward()``, but not of ``torch.autograd.grad``, and of ``backward(inputs=...)`` where it is one of them.

    Raises:
        RuntimeError: called outside of a backward pass.
    """
    if backward_pass() < 0:
        raise RuntimeError("accumulates() was called outside of a backward pass.")
    try:
        return bool(torch._C._will_engine_execute_node(accumulator))
    except RuntimeError:  # the parameter's gradient is captured for torch.autograd.grad, which adds nothing to it
        return False


def backward_pass() -> int:
    """The number of the backward pass under way in this thread; below 0 outside of one."""
    return torch._C._current_graph_task_id()


def graph_is_kept() -> bool:
    """True if another backward pass may follow through the same graph (``retain_graph=True``)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _tensors_in(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors_in(value)


def _find_use(output: Tensor, weight: Tensor) -> WeightProduct | None:
    layer: list[tuple[Any, int]] = [(output.grad_fn, output.output_nr)]
    seen = {output.grad_fn}
    of_its_shape = None
    while layer and len(seen) <= MOST_NODES:
        behind: list[tuple[Any, int]] = []
        for node, output_number in layer:
            for child, number in node.next_functions:
                accumulator = _accumulator_behind(child, any_operation=_is_product(node))
                if accumulator is not None and accumulator.variable is weight:
                    return WeightProduct(node, output_number, accumulator)
                if accumulator is not None and accumulator.variable.shape == weight.shape and _is_product(node):
                    of_its_shape = of_its_shape or WeightProduct(node, output_number, accumulator)
                if child is not None and child not in seen and not hasattr(child, "variable"):
                    seen.add(child)
                    behind.append((child, number))
        layer = behind
    return of_its_shape


def _accumulator_behind(node: Any, *, any_operation: bool) -> Any:
    """The accumulator of the parameter that ``node`` passes on as it is, or, with ``any_operation``, changed."""
    for _ in range(DEEPEST_WEIGHT):
        if node is None or hasattr(node, "variable"):
            return node
        if _is_product(node) or not (any_operation or _name(node) in VIEWS):
            return None
        behind = [child for child, _ in node.next_functions if child is not None]
        if len(behind) != 1:
            return None
        node = behind[0]
    return None


def _name(node: Any) -> str:
    """``AddmmBackward0`` as ``Addmm``."""
    return str(node.name()).rpartition("::")[2].partition("Backward")[0]


def _is_product(node: Any) -> bool:
    name = _name(node)
    return name.startswith(PRODUCTS) or name.endswith("Norm")
