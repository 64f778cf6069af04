"""Laws of `nn.MultiheadAttention`: its projections are observed as linear layers, and its numbers do not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from lightning_thor import Curvature, Thor
from lightning_thor.factors.layout import SIDES
from lightning_thor.layers.base import uses_by_caller
from lightning_thor.layers.discovery import discover_layers
from lightning_thor.layers.hooks import Hooks
from tests.helpers.boring import assert_bitwise
from tests.helpers.models import ByLinears
from tests.helpers.watch import Watch

L, S, N, E = 5, 6, 3, 8
VARIANTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "self": ({}, "self", {}),
    "self, no weights": ({}, "self", {"need_weights": False}),
    "self, batch first": ({"batch_first": True}, "self", {}),
    "self, batch first, no weights": ({"batch_first": True}, "self", {"need_weights": False}),
    "self, no bias": ({"bias": False}, "self", {}),
    "self, causal": (
        {},
        "self",
        {"attn_mask": nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64), "is_causal": True},
    ),
    "self, padding": ({}, "self", {"key_padding_mask": torch.arange(L) > torch.tensor([[4], [2], [3]])}),
    "self, weights of each head": ({}, "self", {"average_attn_weights": False}),
    "bias_kv": ({"add_bias_kv": True}, "self", {}),
    "zero_attn": ({"add_zero_attn": True, "batch_first": True}, "self", {"need_weights": False}),
    "cross": ({}, "cross", {}),
    "cross, batch first": ({"batch_first": True}, "cross", {"need_weights": False}),
    "three inputs": ({}, "three", {}),
    "kdim and vdim": ({"kdim": 4, "vdim": 6}, "dims", {}),
    "kdim and vdim, batch first": ({"kdim": 4, "vdim": 6, "batch_first": True}, "dims", {"need_weights": False}),
    "dropout": ({"dropout": 0.5}, "self", {}),
    "no batch": ({}, "no batch", {}),
}
ROLES = ("q_proj", "k_proj", "v_proj", "out_proj")


def inputs(kind: str, batch_first: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)

    def x(length: int, width: int = E) -> Tensor:
        shape = (N, length, width) if batch_first else (length, N, width)
        return torch.randn(shape[1:] if kind == "no batch" else shape, dtype=torch.float64, generator=generator)

    if kind in ("self", "no batch"):
        return (x(L),) * 3
    if kind == "cross":
        return (x(L), *(x(S),) * 2)
    return (x(L), x(S, 4), x(S, 6)) if kind == "dims" else (x(L), x(S), x(S))


def make(name: str) -> tuple[nn.MultiheadAttention, Callable[[nn.Module], Tensor]]:
    """An attention, and a pass through it that gives a loss: a mean over samples and positions."""
    options, kind, call = VARIANTS[name]
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, 2, **options).double()
    qkv = inputs(kind, bool(options.get("batch_first")))

    def loss(module: nn.Module) -> Tensor:
        torch.manual_seed(2)
        output, weights = module(*qkv, **call)
        return output.sin().mean() + (0.0 if weights is None else weights.square().mean())

    return attention, loss


def weight_grad(attention: nn.MultiheadAttention, role: str) -> Tensor:
    if role == "out_proj":
        grad = attention.out_proj.weight.grad
    elif attention.in_proj_weight is None:
        grad = getattr(attention, f"{role}_weight").grad
    else:
        grad = attention.in_proj_weight.grad.chunk(3)[ROLES.index(role)]
    return grad


def pairs_of(attention: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    layers, _ = discover_layers(attention, block_size=None, precondition_bias=False)
    hooks = Hooks(
        {},
        lambda name: True,
        lambda name, a, g: seen.setdefault(name, []).append((a.detach().clone(), g.clone())),
        uses_by_caller(use for layer in layers.values() for use in layer.uses),
    )
    loss(attention).backward()
    hooks.remove()
    return seen


def test_reduced_statistics_of_keys_are_not_rounding_errors() -> None:
    """The gradients of a sample's keys add up to 0: G of their sum would be of roundings alone."""
    attention, _ = make("self, batch first")
    curvature = Curvature(attention, statistics="reduce", max_rows=None)
    (x,) = set(inputs("self", batch_first=True))
    attention(x, x, x)[0].sin().mean((1, 2)).mean().backward()
    curvature.update()
    traces = {name: float(one["G"].diagonal(dim1=-2, dim2=-1).sum()) for name, one in curvature.export().items()}
    assert traces["k_proj"] > 1e-6 * traces["q_proj"]


class Labelled(Tensor):
    """Takes torch's own functions."""


class Overriding(Tensor):
    """Has a function that takes torch's own, as the tensors of several libraries do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class WithUnit(Tensor):
    """Its methods need an attribute that results of torch's functions lack."""

    unit: str

    def transpose(self, *dimensions: Any) -> Any:
        result = super().transpose(*dimensions).as_subclass(WithUnit)
        result.unit = self.unit
        return result

    def contiguous(self, *args: Any, **kwargs: Any) -> Any:
        result = super().contiguous(*args, **kwargs).as_subclass(WithUnit)
        result.unit = self.unit
        return result


def with_unit(x: Tensor) -> Any:
    labelled = x.as_subclass(WithUnit)
    labelled.unit = "metre"
    return labelled


SUBCLASSES = {
    "labelled": lambda x: x.as_subclass(Labelled),
    "overriding": lambda x: x.as_subclass(Overriding),
    "with a unit": with_unit,
}


@pytest.mark.parametrize("of_subclass", SUBCLASSES.values(), ids=SUBCLASSES)
@pytest.mark.parametrize("name", ["self", "three inputs", "kdim and vdim"])
def test_inputs_of_a_tensor_subclass_are_plain_ones(name: str, of_subclass: Callable[[Tensor], Tensor]) -> None:
    attention, kind = make(name)[0], VARIANTS[name][1]
    qkv = inputs(kind, batch_first=False)
    others = {id(x): of_subclass(x) for x in qkv}
    seen = pairs_of(attention, lambda module: module(*(others[id(x)] for x in qkv))[0].as_subclass(Tensor).sin().mean())
    plain = pairs_of(make(name)[0], lambda module: module(*qkv)[0].sin().mean())
    assert_bitwise(seen, plain)
    assert {type(x) for ((a, g),) in seen.values() for x in (a, g)} == {Tensor}


def test_an_attention_of_a_subclass_is_its_own() -> None:
    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.multi_head_attention_forward:
                return torch.full((L, N, E), 7.0).double(), None
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    x, attention = inputs("self", batch_first=False)[0].as_subclass(Own), make("self")[0]
    seen = pairs_of(attention, lambda module: module(x, x, x)[0].sum().requires_grad_())
    assert seen == {}


@pytest.mark.parametrize("name", VARIANTS)
def test_g_times_a_is_the_gradient_of_each_projection(name: str) -> None:
    attention, loss = make(name)
    seen = pairs_of(attention, loss)
    assert seen.keys() == set(ROLES)
    for role, ((a, g),) in seen.items():
        assert a.shape[:2] == g.shape[:2] == (1 if name == "no batch" else N, a.shape[1])
        found = g.flatten(0, 1).T @ a.flatten(0, 1)
        torch.testing.assert_close(found, weight_grad(attention, role), rtol=1e-10, atol=1e-12)


def test_calls_of_other_sizes_before_one_backward_pass_keep_their_samples_and_positions() -> None:
    attention, found = make("self, batch first")[0], {}
    for sizes in ([(3, 4), (2, 6), (5, 1)], [(2, 6)], [(3, 4)], [(5, 1)]):
        inputs = [torch.randn(n, length, E, dtype=torch.float64, generator=torch.manual_seed(n)) for n, length in sizes]
        seen = pairs_of(attention, lambda module: sum(module(x, x, x)[0].sin().sum() for x in inputs))  # noqa: B023
        found[len(sizes) > 1] = [*found.get(len(sizes) > 1, ()), *seen["out_proj"]]
    expected = {a.shape: (a, g) for a, g in found[False]}
    assert len(found[True]) == len(expected) == 3
    for a, g in found[True]:
        torch.testing.assert_close((a, g), expected[a.shape])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_numbers_of_the_model_do_not_change(name: str) -> None:
    attention, loss = make(name)
    watched = copy.deepcopy(attention)
    curvature = Curvature(watched)
    values = [loss(model) for model in (attention, watched)]
    for value in values:
        value.backward()
    assert curvature.factors.flat_sums.abs().sum() > 0
    assert_bitwise(values[0], values[1])
    for p, q in zip(attention.parameters(), watched.parameters(), strict=True):
        assert_bitwise(p.grad, q.grad)


@pytest.mark.parametrize("precondition_bias", [False, True])
@pytest.mark.parametrize("statistics", ["expand", "reduce"])
@pytest.mark.parametrize(("block_size", "max_rows", "autocast"), [(None, None, False), (3, 7, False), (3, 7, True)])
def test_it_is_preconditioned_as_the_same_attention_written_with_linear_layers(
    statistics: str, precondition_bias: bool, block_size: int | None, max_rows: int | None, autocast: bool
) -> None:
    """Under autocast, which leaves float64 as it is, rows are taken in forward already."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, 1, batch_first=True).double()
    linears = ByLinears(attention)
    query, memory = (torch.randn(N, length, E, dtype=torch.float64) for length in (L, S))
    options: dict[str, Any] = {"statistics": statistics, "precondition_bias": precondition_bias}
    ours, theirs = (Curvature(m, block_size=block_size, max_rows=max_rows, **options) for m in (attention, linears))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = (
            attention(query, memory, memory, need_weights=False)[0].sin().mean(),
            linears(query, memory).sin().mean(),
        )
    for loss in losses:
        loss.backward()
    directions = []
    for curvature, model in ((ours, attention), (theirs, linears)):
        curvature.update()
        found = curvature.precondition({p: p.grad for p in model.parameters() if p.grad is not None})
        directions.append([found[p] for p in model.parameters()])
    # Reduced, our keys take each position as a row: a softmax does not see what is added to all keys, so that their
    # gradients sum to nothing but rounding.
    compared = [name for name in ROLES if (statistics, name) != ("reduce", "k_proj")]
    for name in compared:
        ours_index, theirs_index = list(ours.layers).index(name), list(theirs.layers).index(name)
        for side in (0, 1):
            torch.testing.assert_close(
                ours.factors.blocks(ours_index, SIDES[side], "average"),
                theirs.factors.blocks(theirs_index, SIDES[side], "average"),
                rtol=1e-8,
                atol=1e-12,
            )
    weight, bias, *out = directions[0]
    q, q_bias, k, k_bias, v, v_bias, *their_out = directions[1]
    torch.testing.assert_close(out, their_out, rtol=1e-7, atol=1e-10)
    for ours_, theirs_, ours_bias, theirs_bias in zip(
        weight.chunk(3), (q, k, v), bias.chunk(3), (q_bias, k_bias, v_bias), strict=True
    ):
        if statistics == "expand" or theirs_ is not k:
            torch.testing.assert_close(ours_, theirs_, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(ours_bias, theirs_bias, rtol=1e-7, atol=1e-10)


def averages(model: nn.Module, backward: Callable[[nn.Module], None]) -> list[Tensor]:
    curvature = Curvature(model, averaging=0.0, max_rows=None)
    backward(model)
    curvature.update()
    curvature.close()
    assert not _get_current_function_mode_stack()
    found = [stack.average for stack in curvature.factors.batches.values()]
    assert all(average.abs().sum() > 0 for average in found)
    return found


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True).double()


X = torch.randn(N, L, E, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def plain(model: nn.Module) -> None:
    model(X).sin().mean().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    def backward(model: nn.Module) -> None:
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=use_reentrant).sin().mean().backward()

    torch.testing.assert_close(averages(encoder(), backward), averages(encoder(), plain), rtol=1e-9, atol=1e-12)


def test_passes_that_are_none_of_training_contribute_nothing() -> None:
    def backward(model: nn.Module) -> None:
        twin = copy.deepcopy(model)
        twin(100 * X).sum().backward()
        model(100 * X)
        with torch.no_grad():
            model(100 * X)
        model.eval()
        model(100 * X).sum().backward()
        model.train()
        plain(model)

    torch.testing.assert_close(averages(encoder(), backward), averages(encoder(), plain), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_attention_is_observed() -> None:
    def backward(model: nn.Module) -> None:
        torch.compile(model, backend="eager")(X).sin().mean().backward()

    torch._dynamo.reset()
    torch.testing.assert_close(averages(encoder(), backward), averages(encoder(), plain), rtol=1e-9, atol=1e-12)


def test_statistics_are_float32_under_autocast() -> None:
    model = encoder().float()
    curvature = Curvature(model, averaging=0.0, max_rows=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(X.float()).float().sin().mean().backward()
    curvature.update()
    x = X.float().flatten(0, 1)
    A = curvature.factors.blocks(0, "A", "average")[0, 0]
    torch.testing.assert_close(A, x.T @ x / len(x), rtol=1e-5, atol=1e-6)  # bfloat16 would be 1e-2 off


def test_under_a_default_device_it_is_observed_all_the_same() -> None:
    def backward(model: nn.Module) -> None:
        with torch.device("cpu"):
            plain(model)

    torch.testing.assert_close(averages(encoder(), backward), averages(encoder(), plain), rtol=1e-9, atol=1e-12)


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    attention = nn.MultiheadAttention(E, 2)
    curvature = Curvature(attention)
    with pytest.raises(AssertionError):
        attention(torch.randn(L, N, E), torch.randn(S, N, E), torch.randn(L, N, E))
    assert not _get_current_function_mode_stack()
    curvature.close()
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks


def test_a_pass_that_the_user_interrupts_leaves_nothing_behind_when_the_fit_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch calls no hooks then."""
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", Mock(side_effect=KeyboardInterrupt))
    attention = nn.MultiheadAttention(E, 2)
    curvature = Curvature(attention)
    x = torch.randn(L, N, E)
    with pytest.raises(KeyboardInterrupt):
        attention(x, x, x, need_weights=False)
    curvature.close()
    assert not _get_current_function_mode_stack()


def test_only_the_projection_that_is_due_is_observed() -> None:
    """With stagger the four have steps of their own."""
    attention = nn.MultiheadAttention(E, 2)
    curvature = Curvature(attention, update_every_n_steps=4, stagger=True)
    x = torch.randn(L, N, E)
    optimizer = Thor(attention.parameters(), preconditioner=curvature)
    observed = []
    for _ in range(5):
        attention(x, x, x)[0].square().mean().backward()
        observed.append((curvature.factors.counts[:, 0] > 0).sum().item())
        optimizer.step()
        optimizer.zero_grad()
    assert observed == [4, 1, 1, 1, 1]


def test_a_frozen_input_projection_leaves_the_output_projection_observed() -> None:
    attention = nn.MultiheadAttention(E, 2)
    curvature = Curvature(attention)
    attention.in_proj_weight.requires_grad_(False)
    x = torch.randn(L, N, E, requires_grad=True)
    attention(x, x, x)[0].square().mean().backward()
    assert (curvature.factors.counts[:, 0] > 0).tolist() == [False, False, False, True]


def test_on_a_step_that_is_not_due_it_runs_as_without_hooks_and_on_no_step_does_it_wait() -> None:
    def passes(model: nn.Module) -> Watch:
        model.zero_grad()
        with Watch() as watch:
            plain(model)
        return watch

    model = encoder()
    without = passes(model)
    curvature = Curvature(model, update_every_n_steps=10)
    due = passes(model)
    curvature.update()
    not_due = passes(model)
    assert not_due.called == without.called
    assert due.called != without.called
    assert not due.waiting


def test_an_empty_batch_is_observed_as_nothing() -> None:
    attention = nn.MultiheadAttention(E, 2)
    curvature = Curvature(attention)
    x = torch.randn(L, 0, E)
    attention(x, x, x)[0].sum().backward()
    assert curvature.factors.flat_sums.abs().sum() == 0
