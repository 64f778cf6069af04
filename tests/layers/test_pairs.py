"""Laws of pairs: g.T @ a is the weight's gradient, whatever is done to an output, and by whichever backward pass."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_thor import Curvature, Thor
from lightning_thor.distributed.factor_reducer import by_size
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.factors.layout import SIDES
from lightning_thor.factors.state import SAMPLES
from lightning_thor.layers.pairs import QUANTISED
from tests.helpers.launching import fork, run_forked
from tests.helpers.observing import assert_same, directions_of, factors, observing, told_by

WIDTH, OUT = 6, 5


def clean(model: nn.Module) -> nn.Module:
    model.zero_grad()
    return model


# ── what is done to an output ──


def relu_(y: Tensor) -> Tensor:
    return F.relu(y, inplace=True)


def add_(y: Tensor) -> Tensor:
    y += 1.0
    return y


def fill_(y: Tensor) -> Tensor:
    return y.masked_fill_(torch.arange(y.numel()).view(y.shape) % 3 == 0, 0.5)


def assign(y: Tensor) -> Tensor:
    y[torch.arange(y.numel()).view(y.shape) % 3 == 0] = 0.5
    return y


def slice_(y: Tensor) -> Tensor:
    y[..., 0] *= 0.0
    return y


def view_(y: Tensor) -> Tensor:
    y.view(-1).mul_(0.5)
    return y


def twice_(y: Tensor) -> Tensor:
    return relu_(slice_(y))


OUT_OF_PLACE: dict[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = {
    relu_: F.relu,
    add_: lambda y: y + 1.0,
    fill_: lambda y: y.masked_fill(torch.arange(y.numel()).view(y.shape) % 3 == 0, 0.5),
    assign: lambda y: torch.where(torch.arange(y.numel()).view(y.shape) % 3 == 0, 0.5, y),
    slice_: lambda y: torch.cat([0.0 * y[..., :1], y[..., 1:]], -1),
    view_: lambda y: 0.5 * y,
    twice_: lambda y: torch.cat([0.0 * y[..., :1], y[..., 1:]], -1).relu(),
}

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 1-d": (lambda: nn.Linear(WIDTH, OUT), (WIDTH,)),
    "linear 2-d": (lambda: nn.Linear(WIDTH, OUT), (7, WIDTH)),
    "linear 3-d": (lambda: nn.Linear(WIDTH, OUT), (3, 4, WIDTH)),
    "linear 4-d": (lambda: nn.Linear(WIDTH, OUT), (2, 3, 2, WIDTH)),
    "linear 3-d no bias": (lambda: nn.Linear(WIDTH, OUT, bias=False), (3, 4, WIDTH)),
    "conv": (lambda: nn.Conv2d(2, OUT, 3), (3, 2, 6, 6)),
    "conv unbatched": (lambda: nn.Conv2d(2, OUT, 3), (2, 6, 6)),
    "conv 1-d unbatched": (lambda: nn.Conv1d(2, OUT, 3, padding=1), (2, 6)),
    "transposed unbatched": (lambda: nn.ConvTranspose2d(2, OUT, 3), (2, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), (3, 4, WIDTH)),
    "embedding": (lambda: nn.Embedding(9, OUT), (3, 4)),
}


class After(nn.Module):
    """A layer, something done to its output, and a smooth loss."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x)).sin()


def input_of(shape: tuple[int, ...], name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "embedding":
        return torch.randint(9, shape, generator=generator)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def layer_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name][0]().double()


@pytest.mark.parametrize("change", OUT_OF_PLACE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_in_place_is_out_of_place(name: str, change: Callable[[Tensor], Tensor]) -> None:
    x = input_of(LAYERS[name][1], name)
    in_place, expected = (
        observing(After(layer_of(name), way), lambda model: model(x).mean().backward())
        for way in (change, OUT_OF_PLACE[change])
    )
    assert_same(in_place, expected)


@pytest.mark.parametrize("change", OUT_OF_PLACE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("hook_first", [True, False])
@pytest.mark.parametrize("name", ["linear 2-d", "linear 3-d", "linear 3-d no bias", "conv unbatched"])
def test_in_a_forward_hook_of_the_user_too(name: str, hook_first: bool, change: Callable[[Tensor], Tensor]) -> None:
    """In place or by another output, before our hook or after it (a change before it through a slice killed the
    process)."""
    x, way = input_of(LAYERS[name][1], name), OUT_OF_PLACE[change]
    expected = observing(After(layer_of(name), way), lambda model: model(x).mean().backward())
    for how in (change, way):
        model = After(layer_of(name), lambda y: y)

        def add_hook(model: nn.Module = model, how: Callable[[Tensor], Tensor] = how) -> None:
            model.layer.register_forward_hook(lambda module, args, output: how(output))  # type: ignore[operator, union-attr]

        def train(model: nn.Module, add_hook: Callable[[], None] = add_hook) -> None:
            if not hook_first:
                add_hook()
            model(x).mean().backward()

        if hook_first:
            add_hook()
        assert_same(observing(model, train), expected)


def checkpointed(use_reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)


def under_autocast(dtype: torch.dtype) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return model.float()(x.float()).float()

    return run


def compiled(backend: str) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.reset()
        y: Tensor = torch.compile(model, backend=backend)(x)
        return y

    return run


PASSES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "checkpointed": checkpointed(use_reentrant=False),
    "checkpointed, reentrant": checkpointed(use_reentrant=True),
    "bfloat16": under_autocast(torch.bfloat16),
    "float16": under_autocast(torch.float16),
}
COMPILED = {backend: compiled(backend) for backend in ("eager", "aot_eager")}


@pytest.mark.parametrize("change", [relu_, slice_, add_], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [*PASSES, *(pytest.param(name, marks=pytest.mark.slow) for name in COMPILED)])
def test_in_place_is_out_of_place_in_other_passes_too(name: str, change: Callable[[Tensor], Tensor]) -> None:
    x, run = input_of((3, 4, WIDTH), ""), {**PASSES, **COMPILED}[name]
    in_place, expected = (
        observing(After(layer_of("linear 3-d"), way), lambda model: run(model, x.clone()).mean().backward())
        for way in (change, OUT_OF_PLACE[change])
    )
    assert_same(in_place, expected, **({"rtol": 1e-5, "atol": 1e-7} if name in ("bfloat16", "float16") else {}))


# ── subclasses ──


class Heads(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (OUT, 1)).transpose(-3, -2)


class Chunks(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).split([2, OUT - 2], -1)


class Gelu(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class Reordered(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(0)


class GeluInPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mul_(0.5).sub_(1.0)


class Einsum(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


class Quantised(nn.Linear):
    """By a step that is learned, with a straight-through gradient: several ways lead from the product to its weight."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.step = nn.Parameter(torch.tensor(0.05))

    def quantised(self) -> Tensor:
        steps = self.weight / self.step
        return (steps + (steps.round() - steps).detach()) * self.step

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantised(), self.bias)


@pytest.mark.parametrize("kind", [Heads, Chunks, Gelu, Reordered, GeluInPlace, Einsum])
@pytest.mark.parametrize("shape", [(7, WIDTH), (3, 4, WIDTH)], ids=str)
def test_what_a_subclass_does_to_its_output_is_as_if_it_were_done_outside(kind: Any, shape: tuple[int, ...]) -> None:
    def after(y: Tensor) -> Tensor:
        return {
            Heads: lambda: y.unflatten(-1, (OUT, 1)).transpose(-3, -2),
            Chunks: lambda: y,
            Gelu: lambda: F.gelu(y),
            Reordered: lambda: y.flip(0),
            GeluInPlace: lambda: y * 0.5 - 1.0,
            Einsum: lambda: y,
        }[kind]()

    def train(model: nn.Module) -> None:
        y = model.change(model.layer(input_of(shape, "")))  # type: ignore[operator]
        (torch.cat(y, -1) if isinstance(y, tuple) else y).sin().mean().backward()

    torch.manual_seed(0)
    inside = kind(WIDTH, OUT).double()
    outside = nn.Linear(WIDTH, OUT).double()
    outside.load_state_dict(inside.state_dict())
    assert_same(observing(After(inside, lambda y: y), train), observing(After(outside, after), train))


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(self.weight.numel()).view_as(self.weight) % 3 > 0
        return F.linear(x, self.weight * mask, self.bias)


class ScaledBySize(nn.Linear):
    """As of binary networks: the weight is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tanh() * self.weight.abs().mean(1, keepdim=True), self.bias)


class Clipped(nn.Linear):
    """Several operations after its weight, which it uses twice, and before the product."""

    def quantised(self) -> Tensor:
        steps = self.weight.unflatten(1, (-1, 1)) / (self.weight.abs().amax() / 4)
        steps = steps + (steps.round() - steps).detach()
        return (((steps + 1.0).clamp(-1, 3) - 1.0) * 0.25).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantised(), self.bias)


class Dropped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (torch.arange(WIDTH) % 2))


class Normed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, (WIDTH,)))


class OtherFirst(nn.Linear):
    def forward(self, scale: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return scale * super().forward(x)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * super().forward(x.sin())


class Square(nn.Linear):
    """Its input and weight fit in shape, and are not what is multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.square(), self.bias)


class InParts(nn.Linear):
    """As of fused queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        both = zip(self.weight.split([2, OUT - 2]), self.bias.split([2, OUT - 2]), strict=True)
        return torch.cat([F.linear(x, weight, bias) for weight, bias in both], -1)


class OfSomeRows(nn.Linear):
    """As of networks of several widths; called with all rows, too."""

    def forward(self, x: Tensor) -> Tensor:
        part = F.linear(x, self.weight[:2], self.bias[:2])
        return F.pad(part, (0, OUT - 2)) + 0.1 * super().forward(x)


@pytest.mark.parametrize("name", ["", *sorted(QUANTISED)])
def test_a_quantised_weight_has_the_factors_of_its_product(name: str) -> None:
    """One whose gradient goes straight through, and of known types some of whose entries have none."""
    module, _, qualname = name.rpartition(".")
    kind: Any = type(qualname, (Clipped,), {"__module__": module}) if name else Quantised

    def train(model: nn.Module) -> None:
        model(input_of((8, WIDTH), "")).sin().mean().backward()

    torch.manual_seed(0)
    quantised, plain = kind(WIDTH, OUT).double(), nn.Linear(WIDTH, OUT).double()
    plain.load_state_dict({"weight": quantised.quantised().detach(), "bias": quantised.bias})
    found = observing(nn.Sequential(quantised), train)
    assert not found.left_out
    torch.testing.assert_close(factors(found), factors(observing(nn.Sequential(plain), train)))


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
@pytest.mark.parametrize(
    "kind", [Masked, ScaledBySize, Clipped, Dropped, Normed, OtherFirst, Twice, Square, InParts, OfSomeRows]
)
def test_what_does_not_fit_is_left_out_with_its_reason_and_takes_its_plain_gradient(kind: Any, mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"odd": kind(WIDTH, OUT), "head": nn.Linear(OUT, 3)}).double()
    curvature = Curvature(model, mode=mode)
    x, y = input_of((8, WIDTH), ""), torch.arange(8) % 3
    told = []
    for _ in range(12):
        clean(model)
        args = (torch.full((8, 1), 0.7, dtype=torch.float64), x) if kind is OtherFirst else (x,)
        F.cross_entropy(model["head"](model["odd"](*args).tanh()), y).backward()
        told += told_by(curvature)
    weight = model["odd"].weight
    assert curvature.left_out.keys() == {"odd"}
    assert len(told) == 1
    assert "odd: without curvature from now on" in told[0]
    assert curvature.left_out["odd"] in told[0]
    if kind in (Masked, ScaledBySize, Clipped, Square):
        assert "it changes its input or its weight before it multiplies them" in curvature.left_out["odd"]
    grads = {p: p.grad for p in model.parameters()}
    directions = directions_of(curvature, mode, grads)
    torch.testing.assert_close(directions[weight], weight.grad, rtol=0, atol=0)
    assert (directions[model["head"].weight] - model["head"].weight.grad).norm() > 0
    # And so it stays after a checkpoint.
    resumed = Curvature(model, mode=mode)
    resumed.load_state_dict(curvature.state_dict())
    torch.testing.assert_close(directions_of(resumed, mode, grads)[weight], weight.grad, rtol=0, atol=0)
    assert "odd" in resumed.left_out


def test_the_age_of_inverses_is_that_of_layers_with_curvature_alone() -> None:
    model = nn.ModuleDict({"odd": Masked(WIDTH, OUT), "head": nn.Linear(OUT, 3)}).double()
    curvature = Curvature(model, update_every_n_steps=4)
    for _ in range(11):
        clean(model)
        model["head"](model["odd"](input_of((8, WIDTH), "")).tanh()).square().mean().backward()
        told_by(curvature)
    assert curvature.left_out.keys() == {"odd"}
    assert curvature.inverse_age == 2  # of step 10, after the inversion at step 8


class Scaled(nn.Embedding):
    """A table whose forward is its own and calls no other, tied to the output layer."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 3.0 * self.weight[tokens]


def test_a_weight_that_a_module_without_curvature_shares_keeps_that_of_its_layer() -> None:
    model = nn.ModuleDict({"table": Scaled(7, WIDTH), "head": nn.Linear(WIDTH, 7, bias=False)}).double()
    model["head"].weight = model["table"].weight
    curvature = Curvature(model)
    tokens = torch.arange(14) % 7
    F.cross_entropy(model["head"](model["table"](tokens)), tokens.flip(0)).backward()
    assert told_by(curvature) == []
    assert curvature.left_out.keys() == {"table"}


def used_without_its_module(model: Any) -> Tensor:
    """Its curvature is that of the module's calls."""
    return model[1](F.linear(model[0](input_of((8, WIDTH), "")).tanh(), model[0].weight))  # type: ignore[no-any-return]


def with_a_hook_on_its_gradient(model: Any) -> Tensor:
    model[0].weight.register_hook(lambda grad: grad * (torch.arange(WIDTH) % 2))
    return plainly(model)


def shared_with_one_that_fits(model: Any) -> Tensor:
    model[1].weight = model[0].weight
    return plainly(model)


def shared_with_one_that_does_not(model: Any) -> Tensor:
    if not isinstance(model[1], Masked):
        model[1] = Masked(WIDTH, WIDTH).double()
    return shared_with_one_that_fits(model)


def penalized_by(penalty: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    """With a penalty on the weights in the loss, however large: what is observed are the data's pairs all the same."""
    return lambda model: plainly(model) + sum(penalty(p) for p in model.parameters() if p.dim() == 2)


def under_autocast_and_penalized(model: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = model[0](model[0](input_of((8, WIDTH), "").float()).tanh())
        return model[1](h).float() + sum(p.square().sum() for p in model.parameters())  # type: ignore[no-any-return]


def also_in_eval_mode(model: Any) -> Tensor:
    y = plainly(model)
    model.eval()
    y = y + plainly(model).detach() * 0 + model[1](model[0](input_of((8, WIDTH), "") + 1.0).tanh())
    model.train()
    return y


def by_jacobians(model: Any) -> Tensor:
    x = input_of((8, WIDTH), "")
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: model[1](model[0](one).tanh())))(x)
    return model[1](model[0](x).tanh()) + jacobian.sum(-1)  # type: ignore[no-any-return]


def with_a_hook_that_clips(model: Any) -> Tensor:
    model[0].weight.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    return plainly(model)


def with_a_derivative_in_its_loss(model: Any) -> Tensor:
    """As in a physics-informed network: the gradient is more than the pair, which is curvature all the same."""
    x = input_of((8, WIDTH), "").requires_grad_()
    u = model[1](model[0](x).tanh())
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0] + u  # type: ignore[no-any-return]


def with_a_derivative_by_forward_mode(model: Any) -> Tensor:
    x = input_of((8, WIDTH), "")
    with forward_ad.dual_level():
        dual = model[1](model[0](forward_ad.make_dual(x, torch.ones_like(x))).tanh())
        u, along = forward_ad.unpack_dual(dual)
    assert along is not None
    return along + u


def plainly(model: Any) -> Tensor:
    return model[1](model[0](input_of((8, WIDTH), "")).tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("use", "left_out"),
    [
        (plainly, set()),
        (with_a_derivative_in_its_loss, set()),
        (with_a_derivative_by_forward_mode, set()),
        (used_without_its_module, set()),
        (penalized_by(lambda p: p.square().sum()), set()),
        (penalized_by(lambda p: 1e-4 * p.abs().sum()), set()),
        (penalized_by(lambda p: (p @ p.T - torch.eye(len(p))).square().sum()), set()),
        (under_autocast_and_penalized, set()),
        (also_in_eval_mode, set()),
        (by_jacobians, set()),
        (with_a_hook_on_its_gradient, {"0"}),
        (with_a_hook_that_clips, {"0"}),
        (shared_with_one_that_fits, set()),
        (shared_with_one_that_does_not, {"0"}),
    ],
)
def test_a_layer_is_left_out_if_its_pairs_are_not_its_products_part_of_the_gradient(
    use: Any, left_out: set[str]
) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model = model.float() if use is under_autocast_and_penalized else model.double()
    use(model)  # weights are shared before hooks are there
    curvature = Curvature(model)
    use(model).square().mean().backward()
    assert bool(told_by(curvature)) == bool(left_out)
    assert curvature.left_out.keys() == left_out


def test_a_derivative_in_the_loss_gives_the_same_factors_by_forward_and_by_reverse_mode() -> None:
    def by_reverse_mode(model: Any) -> Tensor:
        x = input_of((8, WIDTH), "").requires_grad_()
        u = model[1](model[0](x).tanh())
        each = [torch.autograd.grad(one.sum(), x, create_graph=True)[0].sum(-1) for one in u.unbind(-1)]
        return torch.stack(each, -1) + u

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).double()
    one, other = (
        observing(copy.deepcopy(model), lambda model: run(model).square().mean().backward())  # noqa: B023
        for run in (with_a_derivative_by_forward_mode, by_reverse_mode)
    )
    assert_same(one, other)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "autocast", "medium"])
def test_what_fits_is_never_left_out(precision: str) -> None:
    """Rounding, cancellation (a gradient of 0), gradients of 10^±20, tied and shared weights, accumulated batches."""
    torch.manual_seed(0)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 1)}).to(dtype)
    before = torch.get_float32_matmul_precision()
    if precision == "medium":
        torch.set_float32_matmul_precision("medium")
    try:
        for scale in (1.0, 1e-20, 1e20) if dtype is not torch.float16 else (1.0, 1e-3, 1e-5, 1e-6):
            curvature = Curvature(model, update_every_n_steps=1)
            for _ in range(2):
                clean(model)
                for _ in range(2):
                    x = torch.randn(512, 64).to(dtype)
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
                        h = model["a"](x)
                        h = model["b"](h - h.mean(0)).tanh() + model["b"](h.tanh())
                        y = model["c"](h).float()
                    ((y - y.mean()).square().mean() + (y - y.detach()).sum()).mul(scale).backward()
                assert told_by(curvature) == []
            assert curvature.left_out == {}
            curvature.close()
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_nor_are_layers_of_one_row_or_of_features_with_a_mean(precision: str, spread: float) -> None:
    """Whose rounded gradient may be large beside its product with the vector of the check."""
    torch.manual_seed(0)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    inputs = [1 + spread * torch.randn(32, width) for width in range(2, 200, 3)]
    inputs += [torch.randn(1, 16) for _ in range(200)]
    model = nn.ModuleList(nn.Linear(x.shape[1], 5) for x in inputs).to(dtype)
    curvature = Curvature(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        outputs = [layer(x.to(dtype)) for layer, x in zip(model, inputs, strict=True)]
    sum(y.float().square().mean() for y in outputs).backward()
    assert told_by(curvature) == []
    assert curvature.left_out == {}


# ── which backward pass ──


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


X = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def loss_of(model: nn.Module) -> Tensor:
    return model(X).sin().mean()


def look_first(model: nn.Module, run: Callable[[nn.Module], Tensor] = lambda model: model(X)) -> None:
    y = run(model)
    torch.autograd.grad(1000 * y.mean(), list(model.parameters()), retain_graph=True)
    y.sin().mean().backward()


def look_first_in_a_checkpoint(model: nn.Module) -> None:
    look_first(model, lambda model: checkpoint(model, X.clone().requires_grad_(), use_reentrant=False))  # type: ignore[no-any-return]


def in_a_reentrant_checkpoint(model: nn.Module) -> None:  # which refuses autograd.grad
    checkpoint(model, X.clone().requires_grad_(), use_reentrant=True).sin().mean().backward()


class Recomputed(torch.autograd.Function):
    """Checkpointing of one's own, as of diffusion models: its backward asks autograd for all gradients, and returns
    them."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *parameters: Tensor) -> Any:
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x.view_as(x))
        return None, *torch.autograd.grad(y, [x, *ctx.parameters], gradients)


def in_a_checkpoint_of_ones_own(model: nn.Module) -> None:
    x = X.clone().requires_grad_()
    Recomputed.apply(model, x, *model.parameters()).sin().mean().backward()  # type: ignore[attr-defined]


def look_first_compiled(model: nn.Module) -> None:
    look_first(model, lambda model: COMPILED["eager"](model, X))


def look_first_compiled_ahead_of_time(model: nn.Module) -> None:
    look_first(model, lambda model: COMPILED["aot_eager"](model, X))


def look_at_some(model: nn.Module) -> None:
    y = model(X)
    for parameters in ([model[3].weight], [model[0].bias]):  # type: ignore[index]
        torch.autograd.grad(1000 * y.mean(), parameters, retain_graph=True)  # type: ignore[arg-type]
    y.sin().mean().backward()


def look_at_inputs(model: nn.Module) -> None:
    x = X.clone().requires_grad_()
    y = model(x)
    torch.autograd.grad(1000 * y.mean(), x, retain_graph=True)
    torch.autograd.grad(1000 * y.mean(), x, create_graph=True)
    y.sin().mean().backward()


def drop_a_backward_of_the_same_graph(model: nn.Module) -> None:
    y = model(X)
    (1000 * y.mean()).backward(retain_graph=True)
    model.zero_grad()
    y.sin().mean().backward()


def drop_a_backward_that_kept_its_graph(model: nn.Module) -> None:
    (1000 * model(X).mean()).backward(retain_graph=True)
    model.zero_grad()
    loss_of(model).backward()


def look_afterwards(model: nn.Module) -> None:
    y = model(X)
    y.sin().mean().backward(retain_graph=True)
    torch.autograd.grad(1000 * y.mean(), list(model.parameters()))


def with_create_graph(model: nn.Module) -> None:
    loss_of(model).backward(create_graph=True)


def in_two_backwards(model: nn.Module) -> None:
    """Their gradients add up in the weights, and so before them."""
    y = model(X).sin()
    y[:, 0].sum().div(y.numel()).backward(retain_graph=True)
    y[:, 1:].sum().div(y.numel()).backward()


def in_three_backwards_that_keep_the_graph(model: nn.Module) -> None:
    y = model(X).sin()
    for column in range(3):
        y[:, column].sum().div(y.numel()).backward(retain_graph=True)


def of_all_leaves(model: nn.Module) -> None:
    loss_of(model).backward(inputs=list(model.parameters()))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    "train",
    [
        look_first,
        look_first_in_a_checkpoint,
        pytest.param(look_first_compiled, marks=pytest.mark.slow),
        pytest.param(look_first_compiled_ahead_of_time, marks=pytest.mark.slow),
        look_at_some,
        look_at_inputs,
        drop_a_backward_of_the_same_graph,
        drop_a_backward_that_kept_its_graph,
        look_afterwards,
        in_a_reentrant_checkpoint,
        in_a_checkpoint_of_ones_own,
        with_create_graph,
        in_two_backwards,
        in_three_backwards_that_keep_the_graph,
        of_all_leaves,
    ],
    ids=lambda f: f.__name__,
)
def test_the_pairs_are_those_of_the_weights_gradients(train: Callable[[nn.Module], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default" if "compiled" in train.__name__ else "error")  # the compiler has its own
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        found = observing(net(), train)
    assert_same(found, observing(net(), lambda model: loss_of(model).backward()))


def in_parts(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(len(x) // 3)


class RecomputedInParts(Recomputed):
    """As adjoint methods for differential equations do: a pass for each part, whose graph is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = []
        for x, g in zip(*map(in_parts, (ctx.x, gradients[0])), strict=True):
            part = x.detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.run(part.view_as(part))
            found.append(torch.autograd.grad(y, [part, *ctx.parameters], g, retain_graph=True))
        of_x, *of_parameters = zip(*found, strict=True)
        return None, torch.cat(of_x), *map(sum, of_parameters)


def recurrent_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.GRUCell(5, 8), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("make", [net, recurrent_net])
def test_all_passes_that_a_backward_pass_runs_again_have_their_part(make: Callable[[], nn.Module]) -> None:
    def train(model: nn.Module) -> None:
        x = X.clone().requires_grad_()
        RecomputedInParts.apply(model, x, *model.parameters()).sin().mean().backward()  # type: ignore[attr-defined]

    found = observing(make(), train)
    assert_same(found, observing(make(), lambda model: torch.cat([*map(model, X.split(4))]).sin().mean().backward()))


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_step_by_gradients_before_the_forward_pass_hides_no_product(layer: nn.Module) -> None:
    """Second-order meta-learning: the graph of such weights has products of its own with the parameters."""
    model = copy.deepcopy(layer).double()
    parameters, x = dict(model.named_parameters()), torch.randn(6, 6, 6, dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []
    curvature = Curvature(model, block_size=None, max_rows=None)
    curvature._accumulator.observe = lambda name, a, g: seen.append((a, g))  # type: ignore[method-assign]
    gradients = torch.autograd.grad(model(x).sin().mean(), list(parameters.values()), create_graph=True)
    steps = {name: p - g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    y = torch.func.functional_call(model, steps, (x.cos(),))
    y.retain_grad()
    y.sin().mean().backward()
    ((_, g),) = [pair for pair in seen if torch.equal(pair[0], x.cos())]
    torch.testing.assert_close(g, y.grad)


Run = Callable[[Callable[[Tensor], Tensor], Tensor, nn.Module], Tensor]
"""Runs a function of some parameters of a module in parts."""


def run_again(run: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    return RecomputedInParts.apply(run, x, *module.parameters())  # type: ignore[attr-defined, no-any-return]


def run_once(run: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    return torch.cat([*map(run, in_parts(x))])


@pytest.mark.parametrize("make", [net, recurrent_net])
@pytest.mark.parametrize("n_inner", [-1, None])
def test_passes_within_others_within_a_backward_pass_have_their_part(make: Any, n_inner: int | None) -> None:
    """Whether the outermost pass reached a layer before the others, or not."""

    def train(model: nn.Sequential, run: Run) -> None:
        inner = model[:n_inner]
        y = run(lambda x: run(inner, x, inner), X.clone().requires_grad_(), inner)
        model[len(inner) :](y).sin().mean().backward()

    assert_same(observing(make(), partial(train, run=run_again)), observing(make(), partial(train, run=run_once)))


@pytest.mark.parametrize("is_used_before", [False, True])
def test_micro_batches_that_backward_passes_run_again_are_those_that_they_do_not(is_used_before: bool) -> None:
    """Their pairs wait until the step, after all passes: each has the terms of its own loss, and its own samples."""

    def train(model: nn.Sequential, run: Run) -> None:
        for x in (X, X.cos(), X.sin()):
            y = x.clone().requires_grad_()
            y = run(model[0], model[0](y) if is_used_before else y, model[0])
            model[1](y).sin().mean().backward()

    def make() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3)).double()

    assert_same(observing(make(), partial(train, run=run_again)), observing(make(), partial(train, run=run_once)))


class CurvatureWithin(Recomputed):
    """Takes a Hessian-vector product first, as of conjugate gradients, of a forward pass of its own."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.enable_grad():
            loss = 1000 * ctx.run(ctx.x.detach()).square().sum()
            first = torch.autograd.grad(loss, ctx.parameters, create_graph=True)
        torch.autograd.grad(first, ctx.parameters, [torch.ones_like(g) for g in first])
        return Recomputed.backward(ctx, *gradients)


@pytest.mark.parametrize("make", [net, recurrent_net])
def test_second_derivatives_within_a_backward_pass_leave_no_trace(make: Callable[[], nn.Module]) -> None:
    def train(model: nn.Module) -> None:
        x = X.clone().requires_grad_()
        CurvatureWithin.apply(model, x, *model.parameters()).sin().mean().backward()  # type: ignore[attr-defined]

    assert_same(observing(make(), train), observing(make(), lambda model: model(X).sin().mean().backward()))


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ArithmeticError


def test_a_backward_pass_that_fails_is_not_taken_for_one_around_those_after_it() -> None:
    model = net()
    curvature = Curvature(model)
    with pytest.raises(ArithmeticError):
        model(Failing.apply(X.clone().requires_grad_())).mean().backward()
    curvature.discard()
    for x in (X, X.cos()):
        model(x).sin().mean().backward()
    assert curvature.factors.counts[:, SAMPLES].tolist() == [24.0] * 4


def test_a_backward_pass_of_some_leaves_observes_these_alone() -> None:
    model = net()
    curvature = Curvature(model)
    loss_of(model).backward(inputs=[model[3].weight, model[5].bias])
    with pytest.warns(UserWarning, match="3 of 4 layers with curvature were not observed"):
        curvature.update()
    assert curvature.factors.updates.tolist() == [0, 0, 1, 0]


def test_a_pair_whose_gradient_comes_after_the_step_is_none_of_the_next_refresh() -> None:
    model = net()
    curvature = Curvature(model, update_every_n_steps=5)
    kept, late = model(X), model(X)
    kept.sin().mean().backward(retain_graph=True)
    curvature.update()
    (1000 * kept.mean()).backward()
    (1000 * late.mean()).backward()
    assert curvature.factors.flat_sums.abs().sum() == 0
    assert not curvature.factors.counts.any()


# ── inputs of other kinds ──


class Labelled(Tensor):
    """As of a library for physics-informed networks: its methods need what only its own constructor gives."""

    labels: list[str]

    @staticmethod
    def __new__(cls, x: Tensor, labels: list[str]) -> Labelled:
        return Tensor._make_subclass(cls, x)  # type: ignore[return-value]

    def __init__(self, x: Tensor, labels: list[str]) -> None:
        self.labels = labels

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return Labelled(super().to(*args, **kwargs), self.labels)

    def detach(self) -> Any:
        return Labelled(super().detach(), self.labels)


@pytest.mark.parametrize("n", [12, 3000])
@pytest.mark.parametrize("in_loss", [False, True])
def test_inputs_of_a_tensor_subclass_are_plain_ones(n: int, in_loss: bool) -> None:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def train(model: nn.Module) -> None:
        y = model(Labelled(x, list("abcde")))
        (y if in_loss else y.as_subclass(Tensor)).sin().mean().backward()

    curvature = Curvature(net())
    expected = Curvature(net())
    train(curvature.model)
    expected.model(x).sin().mean().backward()
    for one in (curvature, expected):
        one.update()
        assert all(type(factor) is Tensor for factor in factors(one))
    torch.testing.assert_close(factors(curvature), factors(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_a_nested_input_is_its_rows(layout: torch.layout) -> None:
    rows = [X[:5], X[5:7], X[7:]]

    def nested(model: nn.Module) -> None:
        x = torch.nested.nested_tensor([one.clone() for one in rows], layout=layout)
        y = model[5](model[0](x))  # type: ignore[index]
        y = y.values() if layout is torch.jagged else torch.cat(list(y.unbind()))
        y.sin().mean().backward()

    def plain(model: nn.Module) -> None:
        model[5](model[0](X)).sin().mean().backward()  # type: ignore[index]

    found, expected = _two_layers(nested), _two_layers(plain)
    assert_same(found, expected)


def _two_layers(train: Callable[[nn.Module], None]) -> Curvature:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return observing(nn.ModuleList([model[0], *[nn.Identity()] * 4, model[5]]), train)


def test_features_made_in_inference_mode_under_autocast() -> None:
    model = net().float()
    with torch.inference_mode():
        x = X.float() * 1.0

    def train(model: nn.Module) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().sin().mean()
        loss.backward()

    curvature = observing(model, train)
    assert curvature.factors.updates.tolist() == [1, 1, 1, 1]


# ── silence ──


def test_a_layer_that_falls_silent_after_its_first_refresh_is_told_once_by_name() -> None:
    model = net()
    curvature = Curvature(model, update_every_n_steps=2)
    told: list[str] = []
    for step in range(12):
        clean(model)
        h = model[:3](X)
        model[5](model[3](h) if step < 4 else h).sin().mean().backward()
        told += told_by(curvature)
    assert len(told) == 1
    assert told[0].startswith("3: observed before, but not at this refresh")


def test_a_layer_that_is_frozen_later_is_silent_by_intent() -> None:
    model = net()
    curvature = Curvature(model, update_every_n_steps=1)
    for step in range(4):
        if step == 2:
            model[3].requires_grad_(False)
        loss_of(clean(model)).backward()
        assert told_by(curvature) == []


# ── the terms of the loss ──


class Routed(nn.Module):
    """Of some tokens, which differ from batch to batch."""

    def __init__(self, n_experts: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n_experts))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        self.double()

    def forward(self, x: Tensor, route: Tensor, n_segments: int = 0) -> Tensor:
        def body(x: Tensor) -> Tensor:
            h = self.dense(x).tanh()
            for number, expert in enumerate(self.experts):
                where = (route == number).nonzero()[:, 0]
                h = h.index_add(0, where, expert(h[where]))
            return h

        h = checkpoint(body, x, use_reentrant=n_segments == 2) if n_segments else body(x)
        return self.head(self.norm(h))


def assert_parts_are_one(
    make: Callable[[], nn.Module], loss_of_part: Callable[[Any, slice], Tensor], n: int, *borders: int,
    n_terms: Callable[[slice], float] = lambda part: part.stop - part.start, is_told: bool = False, rtol: float = 1e-9,
) -> None:  # fmt: skip
    """The mean loss of ``n`` samples gives the factors of the same loss in parts, weighed by their terms."""
    found = []
    for parts in ([slice(0, n)], [slice(*ends) for ends in pairwise((0, *borders, n))]):
        model, terms = make(), 1.0
        curvature = Curvature(
            model,
            loss_multiplier=lambda: terms / n_terms(slice(0, n)),  # noqa: B023
            loss_terms=(lambda: terms) if is_told else None,  # noqa: B023
            averaging=0.0,
        )
        for part in parts:
            terms = n_terms(part)
            (loss_of_part(model, part) * terms / n_terms(slice(0, n))).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an expert that sees nothing at all
            curvature.update()
        curvature.close()
        found.append(factors(curvature))
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=1e-14)


def tokens(n: int, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels of 3 classes and a mask of about 40 %."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(n, width, dtype=torch.float64, generator=generator), torch.randint(3, (n,), generator=generator)
    return x, y, torch.rand(n, generator=generator) < 0.4


def body_and_head() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, 4)}).double()


@given(
    route=st.lists(st.integers(0, 3), min_size=8, max_size=40).map(torch.tensor),
    cuts=st.sets(st.integers(1, 39), max_size=3),
    n_segments=st.sampled_from([0, 1, 2]),
)
def test_micro_batches_are_one_batch_for_any_routing(route: Tensor, cuts: set[int], n_segments: int) -> None:
    """Also of different lengths, of which an expert sees nothing, and under either checkpointing."""
    x, y, _ = tokens(len(route))

    def loss(model: nn.Module, part: slice) -> Tensor:
        inputs = x[part].clone().requires_grad_(n_segments > 0)
        return F.cross_entropy(model(inputs, route[part], n_segments), y[part])

    assert_parts_are_one(Routed, loss, len(route), *sorted(cut for cut in cuts if cut < len(route)))


@pytest.mark.parametrize("max_rows", [None, 8])
def test_uses_that_see_different_rows_may_come_in_any_order(max_rows: int | None) -> None:
    """The samples of a backward pass are those of the use that saw the most."""
    x, y, _ = tokens(40)
    found = []
    for parts in ([slice(0, 36), slice(36, 40)], [slice(36, 40), slice(0, 36)]):
        model = body_and_head()
        curvature = Curvature(model, max_rows=max_rows, averaging=0.0)
        outputs = {part.start: model["body"](x[part]) for part in parts}
        F.cross_entropy(model["head"](torch.cat([outputs[0], outputs[36]])), y).backward()
        curvature.update()
        found.append(factors(curvature))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


def test_an_expert_that_one_pass_uses_several_times_is_one_of_the_same_loss_each_time() -> None:
    """Each use sees other tokens, more or fewer than the first."""
    x, y, _ = tokens(32)

    def loss(model: Any, part: slice) -> Tensor:
        h = x[part]
        for number in (1, 0, 2):
            where = (ROUTE[part] == number).nonzero()[:, 0]
            h = h.index_add(0, where, model["body"](h[where]).tanh())
        return F.cross_entropy(model["head"](h), y[part])

    assert_parts_are_one(body_and_head, loss, 32, 12)


def test_masked_tokens_are_the_terms_of_the_loss_of_all_layers() -> None:
    """Only the head sees the masked ones, and their number differs; the loss is their mean."""
    x, y, masked = tokens(30)

    def loss(model: Any, part: slice) -> Tensor:
        h = model["body"](x[part]).tanh()[masked[part]]
        return F.cross_entropy(model["head"](h), y[part][masked[part]])

    assert_parts_are_one(body_and_head, loss, 30, 11, n_terms=lambda part: int(masked[part].sum()), rtol=1e-6)


def test_the_number_of_terms_can_be_told() -> None:
    """Labels that are left out of the mean: no shape tells how many there are."""
    x, y, masked = tokens(30, width=5)
    y = y.where(masked, -100)
    assert_parts_are_one(
        net, lambda model, part: F.cross_entropy(model(x[part]), y[part]), 30, 11,
        n_terms=lambda part: int(masked[part].sum()), is_told=True,
    )  # fmt: skip


def test_staggered_refreshes_know_the_terms_of_the_loss_too() -> None:
    """Where the layer that the loss is a mean over is not due itself."""
    found = []
    for parts in ([slice(0, 32)], [slice(0, 16), slice(16, 32)]):
        model, route = Routed(), ROUTE  # which the halves do not share
        generator = torch.Generator().manual_seed(2)
        curvature = Curvature(model, loss_multiplier=lambda: 1 / len(parts), stagger=True, update_every_n_steps=4)  # noqa: B023
        for _ in range(9):
            clean(model)
            x = torch.randn(32, WIDTH, dtype=torch.float64, generator=generator)
            y = torch.randint(4, (32,), generator=generator)
            for part in parts:
                (F.cross_entropy(model(x[part], route[part]), y[part]) / len(parts)).backward()
            curvature.update()
        found.append(factors(curvature))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_staggered_refreshes_weigh_the_uses_of_a_layer_as_others_do() -> None:
    """Which see different rows, where the layer that the loss is a mean over is not due itself."""
    model = body_and_head()
    staggered = Curvature(model, averaging=0.0, stagger=True, update_every_n_steps=2)
    others = Curvature(model, averaging=0.0, update_every_n_steps=1)
    for step in range(4):
        x, y, masked = tokens(24 + step)
        h, before = x, staggered.figures()
        for where in (masked.nonzero()[:, 0], (~masked).nonzero()[:, 0]):
            h = h.index_add(0, where, model["body"](h[where]).tanh())
        clean(model)
        F.cross_entropy(model["head"](h), y).backward()
        staggered.update()
        others.update()
        due = [name for name, now in staggered.figures().items() if now["inverted_at"] > before[name]["inverted_at"]]
        assert len(due) == (1 if step else 2)
        for name in due:
            found, expected = (one.export()[name]["G"] for one in (staggered, others))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("losses", ["one after the other", "forward before backward", "of one graph"])
def test_staggered_refreshes_know_the_terms_of_each_of_several_losses(losses: str) -> None:
    """Of heads of their own, in backward passes of their own."""
    model = nn.ModuleDict({"body": nn.Linear(WIDTH, 6), "first": nn.Linear(6, 3), "second": nn.Linear(6, 2)}).double()
    staggered = Curvature(model, averaging=0.0, stagger=True, update_every_n_steps=3)
    others = Curvature(model, averaging=0.0, update_every_n_steps=1)
    for step in range(7):
        x, y, masked = tokens(24 + step)
        before = staggered.figures()
        clean(model)
        h = model["body"](x).tanh()
        loss = F.cross_entropy(model["first"](h), y)
        if losses == "one after the other":
            loss.backward()
        part = h[masked] if losses == "of one graph" else model["body"](x[masked]).tanh()
        other = model["second"](part).sin().mean()
        if losses != "one after the other":
            loss.backward(retain_graph=losses == "of one graph")
        other.backward()
        staggered.update()
        others.update()
        due = [name for name, now in staggered.figures().items() if now["inverted_at"] > before[name]["inverted_at"]]
        for name in due:
            found, expected = (one.export()[name]["G"] for one in (staggered, others))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# ── the unit of gradients ──


def directions(scale: float, mode: str, dtype: torch.dtype, steps: int = 3) -> tuple[list[Tensor], Curvature]:
    """Of some steps with a loss times ``scale``, over their norms."""
    model = net().to(dtype)
    curvature = Curvature(model, mode=mode, update_every_n_steps=2)  # type: ignore[arg-type]
    for _ in range(steps):
        (clean(model)(X.to(dtype)).sin().mean() * scale).backward()
        curvature.update()
    grads = {p: p.grad for p in model.parameters() if p.grad is not None}
    found = directions_of(curvature, mode, grads).values()
    return [d.double() / d.double().abs().max() for d in found], curvature


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(exponent=st.floats(-30, 30))
def test_the_scale_of_the_loss_does_not_matter(mode: str, dtype: torch.dtype, exponent: float) -> None:
    expected, _ = directions(1.0, mode, dtype)
    found, curvature = directions(10.0**exponent, mode, dtype)
    rtol = 2e-3 if dtype is torch.float32 else 1e-9
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.abs() if mode == "adam" else one, other.abs() if mode == "adam" else other, rtol=rtol, atol=rtol
        )
    assert curvature.factors.failed_inversions == curvature.factors.rejected_windows == 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["trace", "pi", "sqrt"])
@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
@given(exponent=st.floats(-45, 38))
def test_weights_stay_finite_whatever_the_scale_of_the_loss(mode: Any, rule: Any, exponent: float) -> None:
    model = net().float()
    curvature = Curvature(model, mode=mode, damping_rule=rule)
    optimizer = Thor(model.parameters(), mode=mode, preconditioner=curvature)
    for _ in range(2):
        optimizer.zero_grad()
        (model(X.float()).sin().mean() * 10.0**exponent).backward()
        optimizer.step()
    kept = [stack.inverse for stack in curvature.factors.batches.values()]
    assert all(bool(torch.isfinite(x).all()) for x in [*kept, *factors(curvature), *model.parameters()])


def test_natural_directions_are_in_the_units_of_the_fisher_matrix_for_a_loss_of_any_scale() -> None:
    """G⁻¹ grad A⁻¹ of a loss times c is that of the loss over c."""
    for scale in (1e-12, 1e-9, 1e9, 1e12):
        found = []
        for c in (1.0, scale):
            model = net()
            curvature = observing(model, lambda m, c=c: (loss_of(m) * c).backward())
            found.append(curvature.precondition({p: p.grad for p in model.parameters()})[model[0].weight])
        torch.testing.assert_close(found[1] * scale, found[0], rtol=1e-6, atol=0)
        assert math.isfinite(float(found[1].norm()))


# ── processes ──


class Odd(Routed):
    """Has a layer whose pairs do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = Masked(4, 4).double()

    def forward(self, x: Tensor, route: Tensor, n_segments: int = 0) -> Tensor:
        y: Tensor = self.odd(super().forward(x, route))
        return y


ROUTE = torch.arange(32) ** 2 % 7 % 5 % 4
SCALES = (1.0, 1e-25, 1e25)


def trained(rows: slice, n_ranks: int, scale: float) -> dict[str, Any]:
    """Two refreshes, of which the second may start in backward; of the rows of this process."""
    model, generator = Odd(), torch.Generator().manual_seed(2)
    curvature = Curvature(model, update_every_n_steps=1, averaging=0.5)
    if n_ranks > 1:
        curvature.connect(ProcessGroupCommunicator(), bucket_fn=by_size(1), is_sync_step=lambda: True)
    told = []
    for _ in range(2):
        clean(model)
        x = torch.randn(len(ROUTE), WIDTH, dtype=torch.float64, generator=generator)
        y = torch.randint(4, (len(ROUTE),), generator=generator)
        (F.cross_entropy(model(x[rows], ROUTE[rows]), y[rows]) * scale).backward()
        told += told_by(curvature)
    return {
        "factors": [factor / scale**2 if index % 2 else factor for index, factor in enumerate(true_factors(curvature))],
        "left_out": sorted(curvature.left_out),
        "told": len(told),
    }


def true_factors(curvature: Curvature) -> list[Tensor]:
    """A and G of each layer that is preconditioned, in the units of the loss."""
    found = []
    for index, layer in enumerate(curvature.layers.values()):
        if layer.is_preconditioned and layer.A is not None:
            A, G = (curvature.factors.blocks(index, SIDES[side], "average").clone() for side in (0, 1))
            found += [A, G * curvature.gradient_unit * curvature.gradient_unit]
    return found


def process(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = [trained(slice(16 * rank, 16 * rank + 16), 2, scale) for scale in SCALES]
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()


@pytest.mark.slow
def test_two_processes_are_one_for_routed_layers_ones_that_do_not_fit_and_losses_of_any_scale(tmp_path: Path) -> None:
    assert run_forked(partial(fork, 2, partial(process, tmp_path)))[0] == 0
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for index, scale in enumerate(SCALES):
        expected = trained(slice(0, 32), 1, scale)
        for rank in ranks:
            assert rank[index]["left_out"] == expected["left_out"] == ["odd"]
            assert rank[index]["told"] == 1
            torch.testing.assert_close(rank[index]["factors"], expected["factors"], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(ranks[0][index]["factors"], ranks[1][index]["factors"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
@given(power=st.integers(-96, 96))
def test_training_is_the_same_whatever_power_of_two_the_loss_is_multiplied_by(mode: Any, power: int) -> None:
    """Some steps, two refreshes: to the bit, but for gradients that are no normal numbers; in the adam mode, whose eps
    has a unit, of powers of the unit of gradients."""
    found = []
    if mode == "adam":
        power = 32 * round(power / 32)
    for scale in (1.0, 2.0**power):
        model = net().float()
        optimizer = Thor(
            model.parameters(), mode=mode, preconditioner=Curvature(model, mode=mode, update_every_n_steps=3)
        )
        for _ in range(5):
            optimizer.zero_grad()
            (model(X.float()).sin().mean() * scale).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    if abs(power) <= 64:
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def sharded(folder: Path) -> None:
    """Each layer is a unit of FSDP2 or only the model is; with and without a look at gradients before backward."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for by_layer in (False, True):
        for looks in (False, True):
            model = net()
            if by_layer:
                for layer in (model[0], model[2], model[3], model[5]):
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            curvature = Curvature(model, block_size=None, averaging=0.0, max_rows=None)
            x = X[6 * rank : 6 * rank + 6].clone().requires_grad_()
            y = model(x)
            if looks:
                torch.autograd.grad(1000 * y.mean(), x, retain_graph=True)
            y.sin().mean().backward()
            curvature.update()
            found.append((factors(curvature), dict(curvature.left_out)))
    torch.save(found, folder / f"sharded{rank}.pt")
    dist.barrier()


@pytest.mark.slow
def test_pairs_of_a_sharded_model_are_those_of_the_whole_one(tmp_path: Path) -> None:
    assert run_forked(partial(fork, 2, partial(sharded, tmp_path)))[0] == 0
    expected = observing(net(), lambda model: loss_of(model).backward())
    for rank in (0, 1):
        for found, left_out in torch.load(tmp_path / f"sharded{rank}.pt"):
            assert left_out == {}
            torch.testing.assert_close(found, factors(expected), rtol=1e-9, atol=1e-12)


# ── gradients that are dropped ──


def drop_all(model: nn.Module, optimizer: Thor) -> None:
    optimizer.zero_grad()


def drop_by_the_model(model: nn.Module, optimizer: Thor) -> None:
    model.zero_grad()


def drop_by_hand(model: nn.Module, optimizer: Thor) -> None:
    for p in model.parameters():
        p.grad = None


@pytest.mark.parametrize("mode", ["natural", "polar"])
@pytest.mark.parametrize("drop", [drop_all, drop_by_the_model, drop_by_hand])
def test_what_made_gradients_that_were_dropped_has_no_part_in_the_factors(drop: Any, mode: Any) -> None:
    """As in a loop of two networks, whose other loss flows through this one; what accumulates stays."""
    found = []
    for is_before in (False, True):
        model = net()
        curvature = Curvature(model, mode=mode, max_rows=None)
        optimizer = Thor(model.parameters(), mode=mode, preconditioner=curvature)
        if is_before:
            (100.0 * model(X[:5]).cos().mean()).backward()
            drop(model, optimizer)
        for part in X.split(6):
            (model(part).sin().mean() / 2).backward()
        optimizer.step()
        found.append(factors(curvature))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
