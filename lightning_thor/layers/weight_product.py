"""In an autograd graph: where a layer multiplied by its weight, its gradient, and which passes reach the weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from functools import lru_cache, partial
from threading import local
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

MOST_NODES = 64
"""Nodes behind an output that are searched: enough for operations of users after the product, in modules or hooks."""

DEEPEST_WEIGHT = 8
"""Operations between a weight and the product with it, at most: casts, transpositions, masks; of `torch.einsum` 7."""

PRODUCTS = ("Addmm", "Mm", "Linear", "Bmm", "Baddbmm", "Addmv", "Mv", "Convolution", "Embedding", "Norm")
"""Beginnings (or ends) of the names of nodes that multiply by a weight."""

VIEWS = (
    *("T", "ToCopy", "View", "UnsafeView", "Transpose", "Permute"),
    *("Expand", "Clone", "Alias", "Unsqueeze", "Squeeze"),
)
"""Names of nodes that pass a weight on as it is."""


class WeightProduct(NamedTuple):
    """The operation of a forward pass that used a weight."""

    node: Any
    """Its autograd node: a hook before it receives the gradient of the operation's own output, whatever was done to
    this output later on, in place or through views."""
    output_number: int
    """The number, among the operation's outputs, of the one that led to the layer's output."""
    sender: Any
    """The last node on the way from the operation to the weight: what it sends there is this operation's part of the
    weight's gradient, without that of other uses and of penalties on the weight. None where there are several ways."""
    sent_number: int
    """The number of this part among the gradients that the sender makes."""
    accumulator: Any
    """The node that adds to the weight's gradient."""


def find_product(output: Any, weight: Tensor) -> WeightProduct | None:
    """The operation nearest to ``output`` that used ``weight``; None if the graph shows none.

    Args:
        output: of the layer: a tensor, or tensors in tuples, lists and dicts.
        weight: the layer's parameter. A sharded one (FSDP2) was used through another parameter of the same shape.
    """
    if weight.grad_fn is not None and not _is_of_one_parameter(weight.grad_fn):
        # A step of meta-learning made it by gradients, whose graph has products with the parameter too.
        return None
    for tensor in _tensors_in(output):
        found = None if tensor.grad_fn is None else _find_use(tensor, weight)
        if found is not None:
            return found
    return None


def products_between(outputs: Any, inputs: Any, weights: Collection[Tensor]) -> Iterator[tuple[Any, Any]]:
    """The products with ``weights`` that autograd's graph shows between inputs and outputs of a module.

    Args:
        outputs: of the module: tensors in tuples, lists and dicts.
        inputs: of the module, as its outputs; nothing is searched behind them.
        weights: the module's parameters.

    Yields:
        The node of each product, and the node that adds to the gradient of its weight.
    """
    seen = {x.grad_fn for x in _tensors_in(inputs)}
    waiting = [x.grad_fn for x in _tensors_in(outputs)]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _is_product(node.name()):
            for place in range(len(node.next_functions)):
                edge = _edge_to_parameter(node, place, any_operation=True)
                if edge is not None and any(edge.accumulator.variable is weight for weight in weights):
                    yield node, edge.accumulator
        waiting += [child for child, _ in node.next_functions if not hasattr(child, "variable")]


def accumulator_of(weight: Tensor) -> Any:
    """The autograd node that adds to the gradient of a parameter; None of a tensor that takes none."""
    return torch.autograd.graph.get_gradient_edge(weight).node if weight.is_leaf and weight.requires_grad else None


def accumulates(accumulator: Any, *, is_recomputed: bool = False) -> bool:
    """True if the backward pass under way adds to the gradient of the accumulator's parameter: true in
    ``loss.backward()``, false in ``torch.autograd.grad``; in ``backward(inputs=...)`` true for the inputs.

    Args:
        accumulator: see `accumulator_of`.
        is_recomputed: whether the graph was made within another backward pass, as by the checkpointing of diffusion
            models, whose backward asks `torch.autograd.grad` for gradients that the pass around it adds.

    Raises:
        RuntimeError: called outside of a backward pass.
    """
    if backward_pass() < 0:
        raise RuntimeError("accumulates() was called outside of a backward pass.")
    try:
        return bool(torch._C._will_engine_execute_node(accumulator))
    except RuntimeError:  # the parameter's gradient is captured for torch.autograd.grad, which adds nothing to it
        return is_recomputed


def backward_pass() -> int:
    """The number of the backward pass under way in this thread; below 0 outside of one."""
    return torch._C._current_graph_task_id()


def outermost_pass(made_within: int = -1) -> int:
    """The number of the outermost backward pass that the one under way in this thread is part of; below 0 outside of
    one. One in which this was never called is not known.

    Args:
        made_within: the outermost pass when the graph at hand was made, if it was made within one; below 0: it was not.
    """
    if made_within >= 0:
        return made_within
    number = backward_pass()
    if number < 0:
        return number
    under_way: MutableMapping[int, Callable[[], Any]] | None = getattr(_passes, "under_way", None)
    if under_way is None:
        under_way = _passes.under_way = WeakValueDictionary()
    if number not in under_way:
        # The pass holds on to this mark until it ends, where it calls it, or fails.
        under_way[number] = mark = partial[Any](int)
        torch.autograd.Variable._execution_engine.queue_callback(mark)
    return min(under_way)


_passes = local()
"""Holds marks of the backward passes that are under way in each thread, by number."""


def graph_is_kept() -> bool:
    """True if another backward pass may follow through the same graph (``retain_graph=True``)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def before_product(use: WeightProduct, rows: torch.Size, on_gradient: Callable[[Tensor], None]) -> None:
    """Call ``on_gradient`` with the gradient of the product itself, in the input's dimensions before the last,
    ``rows``: the operation may have flattened them into one."""

    def in_rows(g: Tensor) -> None:
        if g.dim() == 2 and len(rows) != 1 and rows.numel() == len(g):
            g = g.unflatten(0, rows) if rows else g[0]
        on_gradient(g)

    before_node(use.node, use.output_number, in_rows)


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
    before_node(base.grad_fn, base.output_nr, lambda g: on_gradient(g.contiguous().as_strided(*place)))


def before_node(node: Any, number: int, on_gradient: Callable[[Tensor], None]) -> None:
    """Call ``on_gradient`` with the gradient of a node's output of this number, before the node runs."""

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        g = gradients[number]
        if g is not None:
            on_gradient(g)

    node.register_prehook(before)


def _tensors_in(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | tuple | list):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors_in(value)


def _nodes_behind(output: Tensor, *without: Any) -> Iterator[tuple[Any, int]]:
    """The nodes that made an output, breadth first, each with the number of its own output on the way; about
    `MOST_NODES` at most, none of ``without`` and of what is behind these alone, and no accumulator."""
    level: list[tuple[Any, int]] = [(output.grad_fn, output.output_nr)]
    seen = {output.grad_fn, *without}
    while level and len(seen) <= MOST_NODES:
        behind: list[tuple[Any, int]] = []
        for node, output_number in level:
            yield node, output_number
            for child, number in node.next_functions:
                if child is not None and child not in seen and not hasattr(child, "variable"):
                    seen.add(child)
                    behind.append((child, number))
        level = behind


def _find_use(output: Tensor, weight: Tensor) -> WeightProduct | None:
    """The nearest use of the weight; a product with a parameter of the weight's shape, if none uses the weight."""
    of_its_shape, products = None, list[tuple[Any, int]]()
    for node, output_number in _nodes_behind(output):
        is_product = _is_product(node.name())
        if is_product:
            products.append((node, output_number))
        # From the last: the weight comes after the input, behind which there may be many operations.
        for place in reversed(range(len(node.next_functions))):
            edge = _edge_to_parameter(node, place, any_operation=is_product)
            if edge is not None and edge.accumulator.variable is weight:
                # Or the beginning of what a product nearer to the output multiplies by: a quantised weight.
                for product in () if is_product else products:
                    if _comes_from(product[0], edge.accumulator):
                        return WeightProduct(*product, None, 0, edge.accumulator)
                return WeightProduct(node, output_number, *edge)
            # Of a norm's scale and shift the first.
            is_nearest = of_its_shape is None or of_its_shape.node is node
            if edge is not None and is_product and is_nearest and edge.accumulator.variable.shape == weight.shape:
                of_its_shape = WeightProduct(node, output_number, *edge)
    return of_its_shape


class _Edge(NamedTuple):
    """An edge of the graph towards a parameter."""

    sender: Any
    number: int
    """Among the sender's edges."""
    accumulator: Any
    """Of the parameter."""


def _edge_to_parameter(node: Any, number: int, *, any_operation: bool) -> _Edge | None:
    """The last edge before the accumulator of the one parameter behind an edge, reached through views only, or with
    ``any_operation`` through any operations; None if there is none. Before a cast if that is last: under autocast all
    products with a weight share one."""
    edge = node, number
    for _ in range(DEEPEST_WEIGHT):
        child = node.next_functions[number][0]
        if child is None:
            return None
        if hasattr(child, "variable"):
            return _Edge(*edge, child)
        if _is_product(child.name()) or not (any_operation or _operation(child.name()) in VIEWS):
            return None
        behind = [place for place, (one, _) in enumerate(child.next_functions) if one is not None]
        if len(behind) != 1:
            return None
        node, number = child, behind[0]
        edge = edge if _operation(node.name()) == "ToCopy" else (node, number)
    return None


def _comes_from(product: Any, accumulator: Any) -> bool:
    """Whether a product multiplies by what other operations made of the parameter of ``accumulator``, in any way."""
    waiting, seen = [product], {product}
    while waiting and len(seen) <= MOST_NODES:
        for child, _ in waiting.pop(0).next_functions:
            if child is accumulator:
                return True
            if child is not None and child not in seen and not hasattr(child, "variable"):
                seen.add(child)
                waiting += [] if _is_product(child.name()) else [child]
    return False


def _is_of_one_parameter(node: Any) -> bool:
    """Whether there is one parameter behind a node."""
    behind = [place for place, (one, _) in enumerate(node.next_functions) if one is not None]
    return len(behind) == 1 and _edge_to_parameter(node, behind[0], any_operation=True) is not None


def is_used_again(output: Tensor, use: WeightProduct, a: Tensor) -> bool:
    """True if the module that made ``output`` of ``a`` multiplied by the weight of ``use`` in a further operation."""
    for node, _ in _nodes_behind(output, a.grad_fn):
        if _operation(node.name()) in VIEWS:  # of the weight, on the way from a product
            continue
        is_product = _is_product(node.name())
        for place in range(len(node.next_functions)):
            edge = _edge_to_parameter(node, place, any_operation=is_product)
            if edge is not None and edge.accumulator is use.accumulator and edge != use[2:]:
                return True
    return False


@lru_cache(maxsize=1024)
def _operation(node_name: str) -> str:
    """``Addmm`` of ``AddmmBackward0``."""
    return node_name.rpartition("::")[2].partition("Backward")[0]


@lru_cache(maxsize=1024)
def _is_product(node_name: str) -> bool:
    operation = _operation(node_name)
    return operation.startswith(PRODUCTS) or operation.endswith("Norm")
