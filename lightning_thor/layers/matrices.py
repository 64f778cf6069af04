"""Matrices that a module multiplies by itself, calling no other: parameters of its own, of one matrix each, or of one
for each expert, ``[experts, out, in]``. An expert's matrix is a layer, with the rows routed to it.

While a pass is recorded, each product of torch with such a parameter, or with views of it, is noted with its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_thor.layers.attention import Note
from lightning_thor.layers.base import FactorWidths, Layer, LayerKind
from lightning_thor.layers.linear import ProjectionKind
from lightning_thor.layers.pairs import Arrange, is_readable


class MatricesKind(ProjectionKind):
    """A module's own parameters that are matrices, ``[out, in]``, or stacks of matrices, ``[experts, out, in]``.

    Args:
        *types: of modules, see `LayerKind`.
        is_transposed: whether they are ``[in, out]`` and ``[experts, in, out]``.
    """

    takes_bias = False
    row_factor: Literal["A", "G"] | None = None
    is_flat = False
    is_linear = True

    def __init__(self, *types: type[nn.Module] | str, is_transposed: bool = False) -> None:
        super().__init__(*types)
        self._is_transposed = is_transposed

    def is_transposed(self, module: Any) -> bool:
        """Whether the module's matrices are ``[in, out]``."""
        return self._is_transposed

    def of_weight(self, module: Any, weight: Tensor) -> LayerKind:
        return self if weight.dim() == 3 else _ONE[self.is_transposed(module)]

    def factor_widths(self, module: Any, shape: torch.Size) -> FactorWidths:
        out, width = reversed(shape[-2:]) if self.is_transposed(module) else shape[-2:]
        return shape[:-2].numel(), width, out

    def to_matrix(self, layer: Layer, grads: Sequence[Tensor]) -> Tensor:
        stack = grads[0].mT if self.is_transposed(layer.module) else grads[0]
        return stack.reshape(layer.G.groups, layer.G.width, -1)

    def from_matrix(self, layer: Layer, matrix: Tensor) -> Sequence[Tensor]:
        return [matrix.mT if self.is_transposed(layer.module) else matrix]


class _OneMatrixKind(MatricesKind):
    """A parameter that is one matrix."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__(is_transposed=is_transposed)
        self.row_factor, self.is_flat = "A" if is_transposed else "G", not is_transposed


class _KnownKind(MatricesKind):
    """Of transformers, most of whose experts have an attribute that says the order of their dimensions."""

    def is_transposed(self, module: Any) -> bool:
        return bool(getattr(module, "is_transposed", super().is_transposed(module)))


_ONE = {is_transposed: _OneMatrixKind(is_transposed=is_transposed) for is_transposed in (False, True)}
EXPERTS = _KnownKind()
"""Those of transformers that are not named here, see `is_experts`."""
STACKS_IN_OUT = _KnownKind(
    "torch_geometric.nn.dense.linear.HeteroLinear",
    "transformers.models.convbert.modeling_convbert.GroupedLinearLayer",
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts",
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextExperts",
    "transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRglru",
    is_transposed=True,
)
"""Of libraries, for experts, groups, heads and types, ``[n, in, out]``, without an attribute that says so."""


def is_experts(module_type: type[nn.Module]) -> bool:
    """Whether a type is one of transformers' for experts, whose stacks are parameters of its own."""
    return module_type.__module__.startswith("transformers.") and module_type.__name__.endswith("Experts")


def matrices_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own stacks of matrices by name; where it has none, its own matrices: beside stacks, parameters of
    two dimensions are the experts' biases."""
    own = dict(module.named_parameters(recurse=False))
    stacks = {name: p for name, p in own.items() if p.dim() == 3}
    return stacks or {name: p for name, p in own.items() if p.dim() == 2}


def role_of(weight_name: str, expert: int | None, is_transposed: bool) -> str:
    """The role (see `ModuleUse.role`) of a matrix, ``[out, in]`` or, transposed, ``[in, out]``.

    >>> role_of("down_proj", 3, False), role_of("weight", None, True)
    ('down_proj.3', 'weight, transposed')
    """
    name = weight_name if expert is None else f"{weight_name}.{expert}"
    return f"{name}{', transposed' if is_transposed else ''}"


class _View(NamedTuple):
    """A parameter that is a matrix, or some matrices of a stack."""

    name: str
    first: int | None
    """The expert of the first; None: there are no experts."""
    is_transposed: bool
    """Whether a matrix is ``[in, out]``."""

    def role(self, number: int = 0) -> str:
        """Of the matrix of this number."""
        return role_of(self.name, None if self.first is None else self.first + number, self.is_transposed)


class RecordMatrices(TorchFunctionMode):
    """A context that notes the products with a module's own matrices; it changes none.

    Seen are products with a matrix, with a stack, with some consecutive matrices of it or with one expert's, as views:
    `F.linear`, ``@``, `torch.bmm`, `torch.einsum` with a letter for each dimension, `F.grouped_mm` with offsets, and
    `torch.bmm` with the matrices of chosen experts, ``stack[indices]``.

    Args:
        note: called in forward for each matrix that has rows, before the output is used.
        module: has the matrices.
    """

    def __init__(self, note: Note, module: nn.Module) -> None:
        super().__init__()
        self._note, self._module = note, module
        self._selected: list[tuple[Tensor, _View, Tensor]] = []
        """Copies of chosen matrices, ``[n, ...]``, of which, and their numbers among these, ``[n]``."""

    def __exit__(self, *args: Any) -> None:
        self._selected.clear()
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        find = FUNCTIONS.get(str(func) if isinstance(func, torch._ops.OpOverloadPacket) else func)
        is_scaled = kwargs.get("alpha", 1) != 1
        if find is not None and isinstance(output, Tensor) and output.requires_grad and not is_scaled:
            operands = *args, *(kwargs[name] for name in OPERANDS if name in kwargs)
            for role, a, arrange in find(self, output, *operands):
                if a.numel():
                    self._note(role, a.detach(), output, arrange)
        return output

    def find(self, matrix: Any) -> _View | None:
        """The matrices that a product took a view of, as ``[in, out]`` or ``[n, in, out]``."""
        if not _is_plain(matrix) or matrix.dim() not in (2, 3):
            return None
        storage = matrix.untyped_storage().data_ptr()
        # Read at each call: a sharded parameter (FSDP2) is another one in a forward pass.
        for name, p in matrices_of(self._module).items():
            if not p.numel() or not _is_plain(p) or storage != p.untyped_storage().data_ptr():
                continue
            stack = p if p.dim() == 3 else p[None]
            size = stack.stride(0)
            first, within = divmod(int(matrix.storage_offset()) - int(stack.storage_offset()), size)
            is_one = matrix.dim() == 2
            n = 1 if is_one else len(matrix)
            is_part = not within and first >= 0 and first + n <= len(stack)
            if is_part and (is_one or n == 1 or matrix.stride(0) == size):
                for is_transposed in (False, True):
                    if _place(matrix) == _place(stack if is_transposed else stack.mT):
                        return _View(name, first if p.dim() == 3 else None, is_transposed)
        return None

    def select(self, selected: Tensor, stack: Any, index: Any) -> None:
        """Note that ``selected`` is ``stack[index]``."""
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            return
        view = self.find(stack)
        if view is not None and stack.dim() == 3:
            self._selected.append((selected, view, index.detach() % len(stack)))

    def find_each(self, matrix: Tensor, n: int) -> Iterator[tuple[str, Place]]:
        """The roles of the experts whose matrices ``matrix [n, in, out]`` has, and where the rows of each are among
        ``n``; all of them where one matrix stands for ``n``."""
        if _is_plain(matrix) and not matrix.stride(0):  # expanded
            matrix = matrix[:1]
        view = self.find(matrix)
        if view is not None:
            is_one_of_all = len(matrix) == n
            yield from ((view.role(number), number if is_one_of_all else slice(None)) for number in range(len(matrix)))
            return
        for selected, view, numbers in self._selected:
            is_view = _is_plain(matrix) and matrix.dim() == 3 and matrix.data_ptr() == selected.data_ptr()
            if not is_view or len(matrix) != len(selected):
                continue
            is_mirrored = _place(matrix) != _place(selected)
            order, counts = numbers.argsort(stable=True), numbers.bincount()
            for number, places in enumerate(_cut(counts.cumsum(0))):
                role = view._replace(is_transposed=view.is_transposed != is_mirrored).role(number)
                if len(matrix) == n:
                    yield role, order[places]
                elif order[places].numel():
                    yield role, slice(None)


Place = int | slice | Tensor
"""Some of the first dimension, as an index."""

Found = Iterator[tuple[str, Tensor, Arrange | None]]
"""Role, input, and what brings the output's gradient to its rows, of each matrix."""


def _is_plain(x: Any) -> bool:
    """Whether it is a tensor that has its own memory."""
    has_none = hasattr(x, "device_mesh") or torch._C._functorch.is_functorch_wrapped_tensor(x)
    return is_readable(x) and not has_none and x.device.type != "meta"


def _place(matrix: Tensor) -> tuple[Any, ...]:
    """Shape and strides of the last two dimensions; without the strides of dimensions of size 1."""
    return tuple((n, step if n > 1 else 0) for n, step in zip(matrix.shape[-2:], matrix.stride()[-2:], strict=True))


def _pick_transposed(arrange: Arrange | None, g: Tensor) -> Tensor:
    return g.mT if arrange is None else arrange(g.mT)


def _of_product(record: RecordMatrices, output: Tensor, x: Any, matrix: Any) -> Found:
    """Of ``output = x @ matrix``."""
    if matrix.dim() == 2:
        view = record.find(matrix)
        if view is not None:
            yield view.role(), x, None
    elif matrix.dim() == 3:
        rest = (slice(None),) * min(x.dim(), 2)
        inputs = x.expand(*output.shape[:-1], x.shape[-1])
        for role, place in record.find_each(matrix, output.shape[-1 - len(rest)]):
            pick = itemgetter((..., place, *rest))
            yield role, pick(inputs), pick


def _of_matmul(record: RecordMatrices, output: Tensor, left: Any, right: Any, *_: Any) -> Found:
    yield from _of_product(record, output, left, right)
    if left.dim() > 1 and right.dim() == 1:
        yield from _of_product(record, output, right, left.mT)
    elif left.dim() > 1:  # (left @ right).mT = right.mT @ left.mT
        for role, a, arrange in _of_product(record, output.mT, right.mT, left.mT):
            yield role, a, partial(_pick_transposed, arrange)


def _of_linear(record: RecordMatrices, output: Tensor, input: Any, weight: Any, bias: Any = None) -> Found:
    return _of_product(record, output, input, weight.mT if weight.dim() > 1 else weight)


def _of_added_product(record: RecordMatrices, output: Tensor, input: Any, left: Any, right: Any, *_: Any) -> Found:
    return _of_matmul(record, output, left, right)


def _of_grouped(
    record: RecordMatrices, output: Tensor, input: Tensor, mat2: Any, offs: Tensor | None = None, *_: Any
) -> Found:
    view = record.find(mat2)
    if offs is None:
        yield from _of_product(record, output, input, mat2)
    elif view is not None and input.dim() == 2:
        for number, rows in enumerate(_cut(offs)):
            yield view.role(number), input[rows], itemgetter(rows)


def _cut(offsets: Tensor) -> Iterator[slice]:
    """The rows of each expert, which end at these ``offsets``."""
    for start, stop in pairwise([0, *offsets.tolist()]):
        yield slice(start, stop)


def _of_einsum(record: RecordMatrices, output: Tensor, equation: Any, *operands: Any) -> Found:
    operands = tuple(operands[0]) if len(operands) == 1 else operands
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return
    letters, out = equation.replace(" ", "").split("->")
    names = letters.split(",")
    for of_x, of_matrix, x, matrix in zip(names, names[::-1], operands, operands[::-1], strict=True):
        # A letter for each dimension behind an ellipsis.
        further = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: x.dim() - len(of_x.replace("...", ""))]
        of_x, of_out = of_x.replace("...", further), out.replace("...", further)
        experts, sides = of_matrix[:-2], of_matrix[-2:]
        summed = [letter for letter in sides if letter in of_x and letter not in of_out]
        own = [letter for letter in sides if letter in of_out and letter not in of_x]
        rest = [letter for letter in of_x if letter not in of_matrix]
        known = sorted([*experts, *rest, *own]) == sorted(of_out) and len({*of_x}) == len(of_x)
        if "." in of_matrix or len(experts) > 1 or len(summed) != 1 or len(own) != 1 or not known:
            continue
        matrix = matrix if sides[0] in summed else matrix.mT
        a = _in_order(of_x, [*experts, *rest, *summed], x)
        if a.shape[-1] not in (1, matrix.shape[-2]):
            continue
        in_order = partial(_in_order, of_out, [*experts, *rest, *own])
        if not experts:
            view = record.find(matrix)
            if view is not None:
                yield view.role(), a.expand(*a.shape[:-1], matrix.shape[-2]), in_order
            continue
        n = output.shape[of_out.index(experts)]
        a = a.expand(n, *a.shape[1:-1], matrix.shape[-2])
        for role, place in record.find_each(matrix, n):
            yield role, a[place], partial(_pick_first, in_order, place)


def _in_order(letters: str, order: Sequence[str], x: Tensor) -> Tensor:
    """``x`` with its dimensions in another order; the first has size 1 where ``x`` lacks it."""
    x = x.permute([letters.index(letter) for letter in order if letter in letters])
    return x if order[0] in letters else x[None]


def _pick_first(in_order: Arrange, place: Place, g: Tensor) -> Tensor:
    return in_order(g)[place]


def _of_item(record: RecordMatrices, output: Tensor, stack: Any, index: Any) -> Found:
    record.select(output, stack, index)
    return iter(())


def _of_index_select(record: RecordMatrices, output: Tensor, stack: Any, dim: Any, index: Any) -> Found:
    return _of_item(record, output, stack, index if dim == 0 else None)


FUNCTIONS: Mapping[Any, Callable[..., Found]] = {
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), _of_matmul
    ),
    **dict.fromkeys((torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm), _of_added_product),
    **dict.fromkeys((torch.index_select, Tensor.index_select), _of_index_select),
    # Before torch 2.8 there is none; where it has no kernel, transformers takes an operator of its own.
    **dict.fromkeys((getattr(torch, "_grouped_mm", None), "transformers.grouped_mm_fallback"), _of_grouped),
    F.linear: _of_linear,
    torch.einsum: _of_einsum,
    Tensor.__getitem__: _of_item,
}
"""What finds the products in a call of a function of torch."""

OPERANDS = (
    *("self", "input", "mat_a", "mat1", "batch1", "mat2", "mat_b", "batch2", "other", "weight"),
    *("dim", "index", "offs"),
)
"""Names that operands of these functions may be given by, in the order in which each function takes them."""
