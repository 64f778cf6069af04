"""Laws of observation: exactly the pairs that backward used, whatever the network does around a layer."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature
from lightning_thor.layers.base import subsample
from lightning_thor.layers.hooks import Hooks
from lightning_thor.layers.weight_product import MOST_NODES
from tests.helpers.observing import assert_same, observing


def mlp(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(8, 8), activation, nn.Linear(8, 3)).double()


X = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def plain(model: nn.Module) -> None:
    model(X).sin().mean().backward()


def with_an_unused_output(model: nn.Module) -> None:
    model(100 * X)
    plain(model)


def after_passes_without_gradients_and_in_eval_mode(model: nn.Module) -> None:
    with torch.no_grad():
        model(100 * X)
    model.eval()
    model(100 * X).sum().backward()
    model.train()
    model.zero_grad()
    plain(model)


def by_keyword(model: nn.Module) -> None:
    y = model[0](input=X).relu()
    model[4](model[2](input=y).relu()).sin().mean().backward()


def after_a_pass_of_a_copy(model: nn.Module) -> None:
    """SWA and EMA copy the model together with its hooks."""
    copy.deepcopy(model)(100 * X).sum().backward()
    plain(model)


def compiled(model: nn.Module) -> None:
    torch.compile(model, backend="eager")(X).sin().mean().backward()


PASSES = [with_an_unused_output, after_passes_without_gradients_and_in_eval_mode, by_keyword, after_a_pass_of_a_copy]


@pytest.mark.parametrize("train", [*PASSES, compiled], ids=lambda f: f.__name__)
def test_only_what_backward_used_counts(train: Callable[[nn.Module], None]) -> None:
    assert_same(observing(mlp(nn.ReLU()), train), observing(mlp(nn.ReLU()), plain))


def test_a_layer_called_twice_sums_both_calls() -> None:
    """A over all rows; G over samples, of the sum over calls: as over the positions of a convolution."""
    layer = nn.Linear(5, 5).double()
    seen: list[tuple[Tensor, Tensor]] = []

    def backward(model: nn.Module) -> None:
        first = model(X)
        second = model(first.tanh())
        for x, y in ((X, first), (first.tanh(), second)):
            y.register_hook(lambda g, x=x: seen.append((x.detach(), g)))
        second.sin().mean().backward()

    curvature = observing(layer, backward)
    A = sum(a.T @ a for a, _ in seen) / (2 * len(X))
    G = sum((len(X) * g).T @ (len(X) * g) for _, g in seen) / len(X)
    torch.testing.assert_close(curvature.factors.blocks(0, "A", "average")[0, 0], A)
    torch.testing.assert_close(curvature.factors.blocks(0, "G", "average")[0, 0], G)


def test_a_frozen_layer_contributes_nothing() -> None:
    model = mlp(nn.ReLU())
    model[2].requires_grad_(False)
    curvature = observing(model, plain)
    assert list(curvature.layers) == ["0", "4"]
    assert curvature.left_out["2"] == "frozen"


def test_a_layer_frozen_later_contributes_nothing() -> None:
    model = mlp(nn.ReLU())
    curvature = Curvature(model)
    model[2].requires_grad_(False)
    plain(model)
    with pytest.warns(UserWarning, match="not observed before the first step"):
        curvature.update()
    assert curvature.factors.updates.tolist() == [1, 0, 1]


def test_channels_last_gives_the_same_statistics() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3, stride=2)
    ).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    assert_same(
        observing(last, lambda m: m(x.to(memory_format=torch.channels_last)).sin().mean().backward()),
        observing(net, lambda m: m(x).sin().mean().backward()),
    )


def test_a_compiled_part_has_the_name_it_had_before() -> None:
    model = nn.ModuleDict({"net": torch.compile(mlp(nn.ReLU()), backend="eager")})
    assert list(Curvature(model).layers) == ["net.0", "net.2", "net.4"]


def test_hooks_do_nothing_on_steps_where_no_layer_is_due() -> None:
    model = mlp(nn.ReLU())
    curvature = Curvature(model, update_every_n_steps=3)
    plain(model)
    curvature.update()
    for _ in range(2):
        plain(model)
        assert curvature.factors.flat_sums.abs().sum() == 0
        curvature.update()
    plain(model)
    assert curvature.factors.flat_sums.abs().sum() > 0


def test_no_hook_is_left_after_close() -> None:
    model = mlp(nn.ReLU())
    Curvature(model).close()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_under_autocast(dtype: torch.dtype) -> None:
    model = mlp(nn.ReLU()).float()
    curvature = Curvature(model, block_size=None, averaging=0.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(X.float()).float().sin().mean()
    loss.backward()
    curvature.update()
    A = curvature.factors.blocks(0, "A", "average")[0, 0]
    assert A.dtype == torch.float32
    torch.testing.assert_close(A, (X.T @ X / len(X)).float(), rtol=1e-5, atol=1e-6)  # bfloat16 would be 1e-2 off


def test_the_listener_is_called_without_autocast_and_without_gradients() -> None:
    """Backward inside the autocast context would otherwise compute statistics in bfloat16."""
    layer, seen = nn.Linear(5, 3), []
    hooks = Hooks(
        {"layer": layer},
        lambda name: True,
        lambda name, a, g: seen.append((name, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(X.float()).sum().backward()
    hooks.remove()
    assert seen == [("layer", False, False)]


def test_inputs_are_let_go_of_after_backward() -> None:
    """Even if something keeps the loss, and with it the graph that the hooks belong to."""
    model, inputs, kept = mlp(nn.ReLU()), [], []
    for layer in (0, 2, 4):
        model[layer].register_forward_hook(lambda module, args, output: inputs.append(weakref.ref(args[0])))
    curvature = Curvature(model, update_every_n_steps=1)
    for _ in range(3):
        loss = model(X.clone()).sin().mean()
        loss.backward()
        curvature.update()
        kept.append(loss)
    assert len(inputs) == 9
    assert not any(a() is not None for a in inputs)


def test_an_input_changed_in_place_afterwards_is_left_out_and_told() -> None:
    """Under autocast autograd saves a copy in bfloat16, and so does not object."""
    model = mlp(nn.ReLU()).float()
    curvature = Curvature(model)
    x = X.float().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        x += 1.0
    with pytest.warns(UserWarning, match="input of layer '0' was changed in place"):
        y.float().sin().mean().backward()
    assert (curvature.factors.counts[:, 0] > 0).tolist() == [False, True, True]


def test_a_linear_layer_called_with_another_keyword() -> None:
    class Mine(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(rows)

    layer = Mine(5, 3).double()
    curvature = Curvature(layer)
    layer(rows=X).sum().backward()
    torch.testing.assert_close(curvature.factors.blocks(0, "A", "sums")[0, 0], X.T @ X)


class Full(nn.Module):
    """Gives float32, as norms do under autocast on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x.float()


def test_under_autocast_no_input_waits_whole_for_its_gradient() -> None:
    """Autograd saves a copy in half precision there: only the rows that are taken have to stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Full(), nn.Linear(8, 4))
    inputs: list[Any] = []
    model[2].register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    x, found = torch.randn(5, 20, 8), []
    for max_rows in (30, 100):
        curvature = Curvature(model, max_rows=max_rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        assert (inputs[-1]() is None) == (max_rows == 30)
        loss.backward()
        found.append(curvature.factors.blocks(1, "A", "sums").clone())
        curvature.close()
    whole = model[:2](x).detach().reshape(-1, 8)
    taken = whole[subsample(100, 30, torch.device("cpu"))]
    for sums, those in zip(found, (taken, whole), strict=True):
        torch.testing.assert_close(sums[0, 0], those.T @ those, rtol=0.02, atol=0.1)


class FarFromItsOutput(nn.Linear):
    """So many operations follow the product that the search of the graph ends before it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for _ in range(MOST_NODES + 1):
            y = 1.0 * y
        return y


def test_where_the_graph_does_not_show_the_product_a_gradient_penalty_leaves_no_trace() -> None:
    found = []
    for has_penalty in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(FarFromItsOutput(4, 3)).double()
        curvature = Curvature(model)
        loss = model(torch.randn(6, 4, dtype=torch.float64).requires_grad_()).square().mean()
        if has_penalty:
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        loss.backward()
        found.append(curvature.factors.flat_sums.clone())
        assert curvature.factors.counts[0, 0] == 6
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_hooks_that_go_while_a_module_calls_them_are_no_error() -> None:
    """As when a garbage collection within a forward pass takes a curvature that nothing holds."""
    layer = nn.Linear(2, 2)
    last = Curvature(layer)
    layer.register_forward_hook(lambda *_: last.close(), prepend=True)
    first = Curvature(layer)
    layer(torch.ones(1, 2)).sum().backward()
    first.update()
    assert first.factors.updates.tolist() == [1]
