"""Laws of matrices that a module multiplies by itself, those of all experts in one parameter among them: they have the
curvature of the same network written with linear layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_thor import Curvature, Thor, register_layer
from lightning_thor.factors.layout import SIDES
from lightning_thor.layers import registry
from lightning_thor.layers.base import uses_by_caller
from lightning_thor.layers.discovery import discover_layers, matrix_layers
from lightning_thor.layers.hooks import Hooks
from lightning_thor.layers.matrices import MatricesKind
from lightning_thor.preconditioning.grouping import StackedLayers

N, IN, OUT, ROWS = 4, 8, 12, 32  # grouped products take multiples of four
CLASSES = 10  # more than IN: no eigenvalue of a factor is 0
MODES = ["natural", "polar", "adam"]

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows ``[n, in]``, a stack ``[experts, out, in]`` and the expert of each row, in order, ``[n]``, to ``[n, out]``."""


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {})


def one_by_one(product: Callable[[Tensor, Tensor], Tensor]) -> Multiply:
    def multiply(x: Tensor, stack: Tensor, experts: Tensor) -> Tensor:
        parts = [product(x[experts == number], stack[number]) for number in experts.unique_consecutive().tolist()]
        return torch.cat(parts)

    return multiply


def of_views(views: Callable[[Tensor], Any]) -> Multiply:
    def multiply(x: Tensor, stack: Tensor, experts: Tensor) -> Tensor:
        return torch.cat([F.linear(x[experts == number], one) for number, one in enumerate(views(stack))])

    return multiply


def grouped(x: Tensor, stack: Tensor, experts: Tensor) -> Tensor:
    offsets = experts.bincount(minlength=N).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, stack.transpose(-2, -1), offs=offsets)


def of_equal_shares(product: Callable[[Tensor, Tensor], Tensor]) -> Multiply:
    """Each expert has as many rows: ``[experts, n, in]``."""
    return lambda x, stack, experts: product(x.unflatten(0, (N, -1)), stack).flatten(0, 1)


def of_all(product: Callable[[Tensor, Tensor], Tensor]) -> Multiply:
    """All rows go to all experts, and each keeps its own: ``[experts, n, out]``."""

    def multiply(x: Tensor, stack: Tensor, experts: Tensor) -> Tensor:
        mine = experts == torch.arange(N)[:, None]
        return (product(x, stack) * mine[..., None]).sum(0)

    return multiply


ROUTED: dict[str, Multiply] = {
    "F.linear": one_by_one(F.linear),
    "@": one_by_one(lambda x, w: x @ w.T),
    "mm from the left": one_by_one(lambda x, w: torch.mm(w, x.T).T),
    "addmm": one_by_one(lambda x, w: torch.addmm(x.new_zeros(()), x, w.t())),
    "vectors": one_by_one(lambda x, w: torch.stack([F.linear(row, w) for row in x])),
    "vectors from the right": one_by_one(lambda x, w: torch.stack([w @ row for row in x])),
    "more dimensions": one_by_one(lambda x, w: F.linear(x[None], w)[0]),
    "in place afterwards": one_by_one(lambda x, w: F.linear(x, w).mul_(1)),
    "index": lambda x, stack, experts: torch.bmm(stack[experts], x.unsqueeze(-1)).squeeze(-1),
    "index_select": lambda x, stack, experts: torch.bmm(x[:, None], stack.index_select(0, experts).mT)[:, 0],
}
HALVES = slice(2), slice(2, N)
EQUAL: dict[str, Multiply] = {
    "unbind": of_views(lambda stack: stack.unbind(0)),
    "split": of_views(lambda stack: [one[0] for one in stack.split(1)]),
    "squeeze": of_views(lambda stack: [stack[number : number + 1].squeeze(0) for number in range(N)]),
    "bmm": of_equal_shares(lambda x, stack: torch.bmm(x, stack.mT)),
    "matmul": of_equal_shares(lambda x, stack: x @ stack.mT),
    "bmm from the left": of_equal_shares(lambda x, stack: torch.bmm(stack, x.mT).mT),
    "baddbmm": of_equal_shares(lambda x, stack: torch.baddbmm(x.new_zeros(()), x, stack.mT)),
    "matmul of batches": of_equal_shares(
        lambda x, stack: (x.unflatten(1, (2, -1)).transpose(0, 1) @ stack.mT).transpose(0, 1).flatten(1, 2)
    ),
    "in halves": of_equal_shares(lambda x, stack: torch.cat([x[half] @ stack[half].mT for half in HALVES])),
    "einsum": of_equal_shares(lambda x, stack: torch.einsum("end,eod->eno", x, stack)),
    "einsum with an ellipsis": of_equal_shares(lambda x, stack: torch.einsum("...end,eod->...eno", x, stack)),
    "einsum from the left": of_equal_shares(
        lambda x, stack: torch.einsum("e o d, d n e -> o n e", stack, x.permute(2, 1, 0)).permute(2, 1, 0)
    ),
}
ALL: dict[str, Multiply] = {
    "matmul of all": of_all(lambda x, stack: x @ stack.mT),
    "einsum of all": of_all(lambda x, stack: torch.einsum("nd,eod->eno", x, stack)),
}
WAYS = ROUTED | EQUAL | ALL


class Experts(nn.Module):
    """Two layers of experts, each in one parameter: ``[experts, out, in]``, or ``[experts, in, out]``."""

    def __init__(self, multiply: Multiply, is_transposed: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.multiply, self.in_out = multiply, is_transposed
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("up", (N, OUT, IN)), ("down", (N, IN, OUT))):
            stack = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(stack.mT.contiguous() if is_transposed else stack))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        up, down = (one.mT if self.in_out else one for one in (self.up, self.down))
        return self.multiply(self.multiply(x, up, experts).tanh(), down, experts)


class ListedExperts(nn.Module):
    """The same experts as linear layers."""

    def __init__(self, experts: Experts, *, name: str) -> None:
        super().__init__()
        self.is_of_all, self.is_by_row = name in ALL, name.startswith("vectors")
        for name in ("up", "down"):
            stack = getattr(experts, name).detach()
            layers = [nn.Linear(*one.shape[::-1], bias=False) for one in (stack.mT if experts.in_out else stack)]
            for layer, one in zip(layers, stack.mT if experts.in_out else stack, strict=True):
                layer.weight = nn.Parameter(one.clone())
            self.register_module(name, nn.ModuleList(layers))

    def _multiply(self, x: Tensor, layers: Any, experts: Tensor) -> Tensor:
        if self.is_of_all:
            return of_all(lambda x, layers: torch.stack([layer(x) for layer in layers]))(x, layers, experts)
        routed = [(layers[n], x[experts == n]) for n in experts.unique_consecutive().tolist()]
        if self.is_by_row:
            return torch.stack([layer(row) for layer, rows in routed for row in rows])
        return torch.cat([layer(rows) for layer, rows in routed])

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        return self._multiply(self._multiply(x, self.up, experts).tanh(), self.down, experts)


class Model(nn.Module):
    def __init__(self, experts: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.experts, self.head = experts, nn.Linear(IN, CLASSES, dtype=dtype)
        generator = torch.Generator().manual_seed(2)
        for p in self.head.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        logits: Tensor = self.head(self.experts(x, experts))
        return logits


def train(
    model: nn.Module, n_steps: int = 5, routes: str = "some", call: Any = None, dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Curvature:  # fmt: skip
    """Train on random rows, which go to experts 0, 2 and 3 (``"some"``) or in equal shares to all; returns the
    curvature."""
    curvature = Curvature(model, **{"update_every_n_steps": 2, "max_rows": None, "block_size": 5, **options})
    optimizer = Thor(model.parameters(), lr=0.02, mode=curvature.mode, preconditioner=curvature)
    generator = torch.Generator().manual_seed(3)
    for _ in range(n_steps):
        x = torch.randn(ROWS, IN, dtype=dtype, generator=generator)
        experts = (
            torch.tensor([0] * 12 + [2] * 8 + [3] * 12) if routes == "some" else torch.arange(N).repeat_interleave(8)
        )
        labels = torch.randint(CLASSES, (ROWS,), generator=generator)
        F.cross_entropy((model if call is None else call)(x, experts), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return curvature


def factors_of(curvature: Curvature) -> dict[tuple[str, str], Tensor]:
    return {
        (name, side): curvature.factors.blocks(number, side, "average")
        for number, name in enumerate(curvature.layers)
        for side in SIDES
    }


def both(
    name: str, is_transposed: bool, n_steps: int = 1, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Curvature, Curvature]:
    """The curvature of a model with stacked experts and of one with linear layers, after some steps."""
    multiply = WAYS.get(name, grouped)
    register_layer(Experts, matrices="in_out" if is_transposed else "out_in")
    stacked = Model(Experts(multiply, is_transposed, dtype), dtype)
    listed = Model(ListedExperts(stacked.experts, name=name), dtype)
    return tuple(  # type: ignore[return-value]
        train(model, n_steps, "equal" if name in EQUAL else "some", dtype=dtype, **options)
        for model in (stacked, listed)
    )  # fmt: skip


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_each_expert_has_the_factors_of_its_own_linear_layer(name: str, is_transposed: bool) -> None:
    ours, theirs = map(factors_of, both(name, is_transposed))
    assert list(ours) == list(theirs)
    for one, found in ours.items():
        torch.testing.assert_close(found, theirs[one], msg=lambda message, one=one: f"{one}: {message}")
    assert all(theirs[f"experts.up.{number}", "A"].any() for number in (0, 2, 3))


def directions_of(curvature: Curvature, gradients: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """In adam mode of an odd function in the eigenbasis, as Adam's steps are: eigenvectors may have either sign."""
    if curvature.mode != "adam":
        return curvature.precondition(gradients, curvature.mode)
    rotated = {p: x.tanh() for p, x in curvature.change_basis(gradients).items()}
    return curvature.change_basis(rotated, back=True)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["F.linear", "bmm", "grouped"])
def test_the_directions_are_those_of_linear_layers(name: str, mode: str, is_transposed: bool) -> None:
    """After refreshes in which an expert had no rows, and with blocks that divide no width."""
    dtype = torch.float32 if name == "grouped" else torch.float64  # for which torch has a grouped product
    ours, theirs = both(name, is_transposed, dtype=dtype, mode=mode)
    generator = torch.Generator().manual_seed(4)
    stacks, matrices = {}, {}
    for weight in ("up", "down"):
        stack = torch.randn(getattr(theirs.model.experts, weight)[0].weight.shape, generator=generator, dtype=dtype)
        stack = torch.stack([stack * (number + 1) for number in range(N)])
        stacks[getattr(ours.model.experts, weight)] = stack.mT.contiguous() if is_transposed else stack
        matrices |= {layer.weight: one for layer, one in zip(getattr(theirs.model.experts, weight), stack, strict=True)}
    found, expected = (directions_of(one, gradients) for one, gradients in ((ours, stacks), (theirs, matrices)))
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for weight in ("up", "down"):
        direction = found[getattr(ours.model.experts, weight)]
        direction = direction.mT if is_transposed else direction
        for number, layer in enumerate(getattr(theirs.model.experts, weight)):
            torch.testing.assert_close(direction[number], expected[layer.weight], **tolerance)


def test_all_experts_of_a_parameter_are_multiplied_at_once_and_each_alone_where_one_is_left_out() -> None:
    curvature, _ = both("F.linear", False)
    assert [len(group.layers) for group in curvature._groups if isinstance(group, StackedLayers)] == [N, N]
    model = Model(Experts(WAYS["F.linear"], False))
    alone = train(model, 1, skip_layers=["experts.up.3"])
    assert [len(group.layers) for group in alone._groups if isinstance(group, StackedLayers)] == [N]
    gradients = {p: torch.ones_like(p) for p in model.parameters()}
    whole = {p: torch.ones_like(p) for p in curvature.model.parameters()}
    found, expected = alone.precondition(gradients)[model.experts.up], curvature.precondition(whole)
    torch.testing.assert_close(found[:3], expected[curvature.model.experts.up][:3])
    assert torch.equal(found[3], torch.ones_like(found[3]))


ODD_WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm by keyword": lambda x, stack: torch.bmm(x, mat2=stack.mT),
    "bmm by keywords": lambda x, stack: torch.bmm(mat2=stack.mT, input=x),
    "matmul by keyword": lambda x, stack: x.matmul(other=stack.mT),
    "baddbmm by keyword": lambda x, stack: torch.baddbmm(x.new_zeros(()), batch1=x, batch2=stack.mT),
    "addmm by keyword": lambda x, stack: torch.addmm(x.new_zeros(()), mat1=x[0], mat2=stack[1].T),
    "index_select by keyword": lambda x, stack: x @ torch.index_select(input=stack, dim=0, index=torch.arange(N)).mT,
    "one input for all in einsum": lambda x, stack: torch.einsum("end,eod->eno", x[:1], stack),
    "one number for all in einsum": lambda x, stack: torch.einsum("end,eod->eno", x[..., :1], stack),
    "one matrix for all inputs": lambda x, stack: x @ stack[1:2].mT,
    "one matrix for all inputs of einsum": lambda x, stack: torch.einsum("end,eod->eno", x, stack[1:2]),
    "one chosen matrix for all inputs": lambda x, stack: x @ stack[torch.tensor([1])].mT,
    "one input for chosen matrices": lambda x, stack: x[0] @ stack[torch.tensor([1, 3, 1])].mT,
    "batches for chosen matrices": lambda x, stack: x[:, None] @ stack[torch.tensor([1, 3, 1, 0])].mT,
    "einsum with chosen matrices": lambda x, stack: torch.einsum("bnd,bod->bno", x, stack[torch.tensor([1, 3, 1, 0])]),
    "a vector for all": lambda x, stack: x[0, 0] @ stack.mT,
    "all for a vector": lambda x, stack: stack @ x[0, 0],
    "a vector for chosen matrices": lambda x, stack: x[0, 0] @ stack[torch.tensor([1, 3, 1])].mT,
}


@pytest.mark.parametrize("name", ODD_WAYS)
def test_the_pairs_of_an_expert_make_its_gradient(name: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(N, OUT, IN, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return ODD_WAYS[name](x, self.stack)

    register_layer(Odd, matrices="out_in")
    model, found = Odd(), torch.zeros(N, OUT, IN, dtype=torch.float64)

    def add(name: str, a: Tensor, g: Tensor) -> None:
        found[layers[name].param_slice] += g.reshape(-1, OUT).T @ a.reshape(-1, IN)

    layers, _ = discover_layers(model, block_size=None, precondition_bias=True)
    hooks = Hooks({}, lambda name: True, add, uses_by_caller(layer.uses[0] for layer in layers.values()))
    model(torch.randn(N, 5, IN, dtype=torch.float64)).square().sum().backward()
    torch.testing.assert_close(found, model.stack.grad)
    hooks.remove()


def test_within_torch_func_they_are_not_seen() -> None:
    register_layer(Experts, matrices="out_in")
    model = Experts(WAYS["bmm"], False)
    experts, x = torch.arange(N).repeat_interleave(8), torch.randn(ROWS, IN, dtype=torch.float64)
    curvature = Curvature(model)
    torch.func.grad(lambda x: model(x, experts).sum())(x)
    assert not curvature._accumulator.has_pairs


def test_a_forward_pass_that_was_interrupted_is_not_recorded_for_good() -> None:
    """As in a notebook: an exception that is no `Exception` leaves out torch's hooks after it."""
    register_layer(Experts, matrices="out_in")
    model, expected = (Model(Experts(WAYS["bmm"], False)) for _ in range(2))
    x, experts = torch.randn(ROWS, IN, dtype=torch.float64), torch.arange(N).repeat_interleave(8)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    found = []
    for one in (expected, model):
        curvature = Curvature(one, max_rows=None)
        if one is model:
            one.experts.multiply, multiply = interrupt, one.experts.multiply
            with pytest.raises(KeyboardInterrupt):
                one(x, experts)
            one.experts.multiply = multiply
        one(x, experts).square().mean().backward()
        assert not torch.overrides._len_torch_function_stack()
        curvature.update()
        found.append(factors_of(curvature))
    for key, factor in found[0].items():
        torch.testing.assert_close(found[1][key], factor)
    model.experts.multiply = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(x, experts)
    curvature.close()
    assert not torch.overrides._len_torch_function_stack()


class Tree(nn.Module):
    """Of each node the children's results, by the same module."""

    def __init__(self, *, of_matrices: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, width in (("own", IN), ("below", OUT)):
            matrix = torch.randn(OUT, width, generator=generator, dtype=torch.float64)
            layer = nn.Linear(width, OUT, bias=False)
            layer.weight = nn.Parameter(matrix)
            setattr(self, name, nn.Parameter(matrix.clone()) if of_matrices else layer)

    def multiply(self, x: Tensor, by: Any) -> Tensor:
        product: Tensor = x @ by.T if isinstance(by, Tensor) else by(x)
        return product

    def forward(self, x: Tensor, depth: int) -> Tensor:
        with torch.no_grad():
            if depth:
                self(x, depth - 1)
        y = self(x, depth - 1) if depth else None
        own = self.multiply(x, self.own)
        return (own if y is None else own + self.multiply(y, self.below)).tanh()


class TreeOfMatrices(Tree):
    pass


def test_a_module_may_call_itself() -> None:
    register_layer(TreeOfMatrices, matrices="out_in")
    x, found = torch.randn(ROWS, IN, dtype=torch.float64), []
    for one in (Tree(of_matrices=False), TreeOfMatrices(of_matrices=True)):
        curvature = Curvature(one, max_rows=None)
        one(x, 2).square().mean().backward()
        assert not torch.overrides._len_torch_function_stack()
        curvature.update()
        found.append(factors_of(curvature))
    for key, factor in found[0].items():
        torch.testing.assert_close(found[1][key], factor)


def test_another_thread_may_call_it_meanwhile() -> None:
    register_layer(Experts, matrices="out_in")
    model = Experts(WAYS["bmm"], False)
    x, experts = torch.randn(ROWS, IN, dtype=torch.float64), torch.arange(N).repeat_interleave(8)
    curvature, multiply = Curvature(model), model.multiply

    def evaluate() -> None:
        with torch.no_grad():
            model(x, experts)

    def call_meanwhile(*operands: Any) -> Tensor:
        model.multiply = multiply
        with ThreadPoolExecutor(1) as other:
            other.submit(evaluate).result()
        return multiply(*operands)

    model.multiply = call_meanwhile
    model(x, experts).sum().backward()
    assert not torch.overrides._len_torch_function_stack()
    curvature.update()
    assert curvature.factors.updates.all()


def test_a_product_that_is_not_seen_is_told_with_what_to_do() -> None:
    register_layer(Experts, matrices="out_in")
    model = Model(Experts(lambda x, stack, experts: one_by_one(F.linear)(x, 1.0 * stack, experts), False))
    with pytest.warns(UserWarning, match=r"experts.up.0, .*no product with it was seen .*register_layer"):
        train(model, 1)


def test_in_a_compiled_model_they_are_told_and_have_curvature_where_they_are_kept_out() -> None:
    register_layer(Experts, matrices="out_in")
    model = Model(Experts(WAYS["bmm"], False))
    expected = factors_of(train(copy.deepcopy(model), 2, "equal"))
    with pytest.warns(UserWarning, match=r"experts.up.0, .*not compiled"):
        train(other := copy.deepcopy(model), 1, "equal", call=torch.compile(other, backend="eager"))
    model.experts.forward = torch.compiler.disable(model.experts.forward)
    found = factors_of(train(model, 2, "equal", call=torch.compile(model, backend="eager")))
    for one, factor in found.items():
        torch.testing.assert_close(factor, expected[one])


def test_dimensions_in_another_order_than_was_told_are_not_taken_for_rows() -> None:
    """Also where both are equal, so that shapes do not tell."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(N, IN, IN, dtype=torch.float64))

        def forward(self, x: Tensor, experts: Tensor) -> Tensor:
            return one_by_one(lambda rows, one: rows @ one)(x, self.stack, experts)

    register_layer(Square, matrices="out_in")
    with pytest.warns(UserWarning, match="no product with it was seen"):
        train(Model(Square()), 1)


@pytest.mark.parametrize("name", ["F.linear", "index"])
def test_an_expert_without_rows_is_silent_and_keeps_what_it_has(name: str) -> None:
    register_layer(Experts, matrices="out_in")
    model = Model(Experts(WAYS[name], False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature = train(model, 3, "equal")
        before = {one: factor.clone() for one, factor in factors_of(curvature).items()}
        x, experts = torch.randn(ROWS, IN, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.int64)
        for _ in range(2):
            model.zero_grad()
            F.cross_entropy(model(x, experts), torch.randint(CLASSES, (ROWS,))).backward()
            curvature.update()
    for (layer, side), factor in factors_of(curvature).items():
        is_same = torch.equal(factor, before[layer, side])
        assert is_same == (layer.endswith((".1", ".2", ".3"))), layer


def test_an_expert_without_rows_is_silent_where_no_other_is_due() -> None:
    """With a step of its own for each, in a run that goes on and in a copy too."""
    register_layer(Experts, matrices="out_in")
    model = Model(Experts(WAYS["F.linear"], False))
    curvature = train(model, 4, "equal", stagger=True, update_every_n_steps=8)
    resumed = Curvature(model, stagger=True, update_every_n_steps=8, block_size=5, max_rows=None)
    resumed.load_state_dict(curvature.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (copy.deepcopy(curvature), curvature, resumed):
            for _ in range(16):
                x, experts = torch.randn(ROWS, IN, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.int64)
                one.model(x, experts).square().mean().backward()
                one.update()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["F.linear", "grouped", "index"])
def test_under_activation_checkpointing_its_factors_are_the_same(name: str, use_reentrant: bool) -> None:
    register_layer(Experts, matrices="out_in")
    model = Model(Experts(WAYS.get(name, grouped), False, torch.float32), torch.float32)
    other = copy.deepcopy(model)

    def call(x: Tensor, experts: Tensor) -> Tensor:
        x = x.requires_grad_()
        logits: Tensor = other.head(checkpoint(other.experts, x, experts, use_reentrant=use_reentrant))
        return logits

    expected = factors_of(train(model, 2, dtype=torch.float32))
    found = factors_of(train(other, 2, call=call, dtype=torch.float32))
    for one, factor in found.items():
        torch.testing.assert_close(factor, expected[one])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["F.linear", "bmm", "einsum"])
def test_under_autocast_its_factors_are_near_those_of_float32(name: str, dtype: torch.dtype) -> None:
    register_layer(Experts, matrices="out_in")
    model = Model(Experts(WAYS[name], False, torch.float32), torch.float32)
    other = copy.deepcopy(model)

    def call(x: Tensor, experts: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            logits: Tensor = other(x, experts)
        return logits.float()

    routes = "equal" if name in EQUAL else "some"
    expected = factors_of(train(model, 1, routes, dtype=torch.float32))
    found = factors_of(train(other, 1, routes, call=call, dtype=torch.float32))
    for one, factor in found.items():
        torch.testing.assert_close(factor, expected[one], rtol=0.1, atol=0.05 * float(expected[one].abs().max()))


def test_experts_are_hidden_layers_each_with_a_name() -> None:
    register_layer(Experts, matrices="out_in")
    model = nn.Sequential(nn.Linear(2, 2), Experts(WAYS["bmm"], False))
    layers, left_out = discover_layers(model, block_size=None, precondition_bias=True)
    assert list(layers) == ["0", *(f"1.{name}.{number}" for name in ("up", "down") for number in range(N))]
    assert not left_out
    shapes = {(one.G.groups, one.G.width, one.A.width) for name, one in layers.items() if one.A and "up" in name}
    assert shapes == {(1, OUT, IN)}
    # The last is taken as the output layer.
    assert matrix_layers(model)[-1] == "0"
    assert not discover_layers(model, block_size=None, precondition_bias=True, skip_layers=["1"])[0].keys() - {"0"}


def test_a_state_of_a_version_without_curvature_of_experts_goes_on() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the dev extra has it)")
    model = mixture(transformers, "eager")
    curvature = Curvature(model, update_every_n_steps=2)
    state = curvature.state_dict()
    for name in list(state["layers"]):
        if ".experts." in name:
            del state["layers"][name]
    curvature.load_state_dict(state)
    del state["layers"]["lm_head"]
    with pytest.raises(ValueError, match="lm_head"):
        curvature.load_state_dict(state)


def test_subclasses_of_the_experts_of_transformers_are_known() -> None:
    """fully_shard makes one too."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the dev extra has it)")
    model: Any = mixture(transformers, "eager")
    layers, experts = list(Curvature(model).layers), model.model.layers[0].mlp.experts
    experts.__class__ = type("FSDPExperts", (type(experts),), {})
    assert list(Curvature(model).layers) == layers


def mixture(transformers: Any, implementation: str, kind: str = "Mixtral") -> nn.Module:
    """A small language model with experts in one parameter, in float32."""
    sizes: dict[str, Any] = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_local_experts": N,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    model.config._experts_implementation = implementation
    return model


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_the_experts_of_transformers_have_the_same_factors_however_they_are_computed(kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the dev extra has it)")
    tokens = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(1))
    found = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model = mixture(transformers, implementation, kind)
        curvature = Curvature(model, max_rows=None, averaging=0.0)
        assert curvature.coverage > 0.9
        model(tokens, labels=tokens).loss.backward()
        curvature.update()
        found[implementation] = factors_of(curvature)
        curvature.close()
    for one, factor in found["eager"].items():
        for implementation in ("grouped_mm", "batched_mm"):
            torch.testing.assert_close(found[implementation][one], factor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "got none"),
        ({"matrices": "out_in", "like": nn.Linear}, "got like and matrices"),
        ({"matrices": "out_in", "weight": "up"}, "matrices stands for both"),
        ({"matrices": "out"}, "must be 'out_in' or 'in_out', got 'out'"),
    ],
)
def test_a_wrong_registration_is_an_error(options: dict[str, Any], expected: str) -> None:
    with pytest.raises((TypeError, ValueError), match=expected):
        register_layer(Experts, **options)


# ── matrices without experts ──

OWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": F.linear,
    "@": lambda x, w: x @ w.T,
    "@ of batches": lambda x, w: (x.unflatten(0, (4, -1)) @ w.T).flatten(0, 1),
    "from the left": lambda x, w: (w @ x.T).T,
    "from the left, of batches": lambda x, w: (w @ x.unflatten(0, (4, -1)).mT).mT.flatten(0, 1),
    "einsum": lambda x, w: torch.einsum("nd,od->no", x, w),
    "einsum of batches": lambda x, w: torch.einsum("bnd,od->bno", x.unflatten(0, (4, -1)), w).flatten(0, 1),
    "einsum with an ellipsis": lambda x, w: torch.einsum("od,...d->...o", w, x),
    "bmm of an expanded one": lambda x, w: torch.bmm(x.unflatten(0, (4, -1)), w.T.expand(4, -1, -1)).flatten(0, 1),
}


class OwnMatrices(nn.Module):
    """Two layers by parameters of its own, ``[out, in]`` or ``[in, out]``, and a bias."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], is_transposed: bool) -> None:
        super().__init__()
        self.multiply, self.in_out = multiply, is_transposed
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("up", (OUT, IN)), ("down", (IN, OUT))):
            matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(matrix.T.contiguous() if is_transposed else matrix))
        self.bias = nn.Parameter(torch.zeros(OUT, dtype=torch.float64))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        up, down = (one.T if self.in_out else one for one in (self.up, self.down))
        return self.multiply((self.multiply(x, up) + self.bias).tanh(), down)


class OwnLinears(nn.Module):
    """The same by linear layers."""

    def __init__(self, own: OwnMatrices) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(IN, OUT, bias=False), nn.Linear(OUT, IN, bias=False)
        for name in ("up", "down"):
            matrix = getattr(own, name).detach()
            getattr(self, name).weight = nn.Parameter((matrix.T if own.in_out else matrix).clone())
        self.bias = nn.Parameter(own.bias.detach().clone())

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        hidden: Tensor = self.down((self.up(x) + self.bias).tanh())
        return hidden


def test_a_matrix_may_be_the_output_layer() -> None:
    register_layer(OwnMatrices, matrices="out_in")
    own = OwnMatrices(F.linear, False)
    assert matrix_layers(nn.Sequential(nn.Linear(2, 2), own))[-1] == "1.down"
    assert matrix_layers(nn.Sequential(own, nn.Linear(2, 2)))[-1] == "1"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_own_matrices_train_as_linear_layers(name: str, is_transposed: bool, mode: str) -> None:
    register_layer(OwnMatrices, matrices="in_out" if is_transposed else "out_in")
    ours = Model(OwnMatrices(OWN[name], is_transposed))
    theirs = Model(OwnLinears(ours.experts))
    curvature = train(ours, 4, mode=mode)
    assert list(curvature.layers) == ["experts.up", "experts.down", "head"]
    train(theirs, 4, mode=mode)
    for found, expected in (
        (ours.experts.up, theirs.experts.up.weight),
        (ours.experts.down, theirs.experts.down.weight),
    ):
        torch.testing.assert_close(found.T if is_transposed else found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.experts.bias, theirs.experts.bias)


KNOWN: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 3},
    "GptOssForCausalLM": {"num_local_experts": 3},
    "DeepseekV3ForCausalLM": {
        "n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
        "head_dim": 64,
    },
    "RecurrentGemmaForCausalLM": {"lru_width": 16, "block_types": ("recurrent", "attention"), "num_hidden_layers": 2},
    "ConvBertForMaskedLM": {"num_groups": 2, "embedding_size": 16},
}  # fmt: skip
"""Models of transformers with stacks of square matrices, in the shapes of which no order shows."""


@pytest.mark.parametrize("name", KNOWN)
def test_the_rows_of_transformers_own_stacks_give_their_gradients(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the dev extra has it)")
    sizes: dict[str, Any] = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8,
    }  # fmt: skip
    config = getattr(transformers, name.partition("For")[0] + "Config")(**{**sizes, **KNOWN[name]})
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    model.config._experts_implementation = "grouped_mm"
    curvature = Curvature(model, update_every_n_steps=1, max_rows=None)
    own = {one: layer for one, layer in curvature.layers.items() if isinstance(layer.kind, MatricesKind)}
    found: dict[str, Tensor] = {}

    def observe(layer: str, a: Tensor, g: Tensor) -> None:
        if layer not in own:
            return
        product = g.reshape(-1, g.shape[-1]).T @ a.reshape(-1, a.shape[-1])
        found[layer] = found.get(layer, torch.zeros_like(product)) + product

    curvature._accumulator.observe = observe  # type: ignore[method-assign]
    tokens = torch.randint(20, (3, 7))
    model(tokens, labels=tokens).loss.backward()
    assert found
    for one, layer in own.items():
        gradient = layer.slice_of(layer.parameters[0].grad)
        gradient = (gradient.mT if layer.kind.is_transposed(layer.module) else gradient)[0]  # type: ignore[attr-defined]
        torch.testing.assert_close(found.get(one, torch.zeros_like(gradient)), gradient, rtol=1e-3, atol=1e-6)
    curvature.close()
