"""MindSpore's parameter groups in the migration door: settings of their own, centralized gradients, an order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_thor.layers import registry
from lightning_thor.layers.linear import LINEAR
from lightning_thor.mindspore.optimizer import MindSporeThor, thor
from tests.helpers.boring import assert_bitwise
from tests.helpers.nn_thor_formulas import float64

Groups = Callable[[nn.Module], Any]


def make() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10), nn.Linear(10, 4))
    float64(net, seed=2)
    return net


def train(net: nn.Module, optimizer: MindSporeThor, steps: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
        F.cross_entropy(net(x), torch.randint(4, (8,), generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in net.parameters()]


def trained(params: Groups | None, learning_rate: Any = 0.05, steps: int = 5, **options: Any) -> list[Tensor]:
    net = make()
    groups = None if params is None else params(net)
    return train(net, thor(net, learning_rate, 0.1, 0.9, batch_size=8, frequency=2, params=groups, **options), steps)


def halves(net: nn.Module, first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    own = list(net.parameters())
    return [{"params": own[:2], **first}, {"params": own[2:], **second}]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert_bitwise(actual, expected)


@pytest.mark.parametrize(
    "params",
    [
        lambda net: list(net.parameters()),
        lambda net: [{"params": list(net.parameters())}],
        lambda net: halves(net, {}, {}),
        lambda net: halves(net, {"lr": 0.05}, {"weight_decay": 0.1, "grad_centralization": False}),
        lambda net: [*halves(net, {}, {}), {"order_params": list(net.parameters())[::-1]}],
    ],
    ids=["a list", "one group", "two groups", "the same settings", "an order"],
)
def test_groups_that_change_no_setting_change_no_number(params: Groups) -> None:
    assert_same(trained(params, weight_decay=0.1), trained(None, weight_decay=0.1))


def test_each_group_has_its_own_learning_rate_per_step() -> None:
    """A group's rate is what the whole network would have had: its first step is that of such a network."""
    schedule = [0.3, 0.2, 0.1, 0.05]
    net = make()
    groups = halves(net, {"lr": torch.tensor(schedule, dtype=torch.float64)}, {"lr": 0.07})
    optimizer = thor(net, 99.0, 0.1, 0.9, batch_size=8, params=groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.07], "before the first step, for monitors"
    used = []
    for _ in range(4):
        train(net, optimizer, steps=1)
        used.append([group["lr"] for group in optimizer.param_groups])
    assert used == [[rate, 0.07] for rate in schedule]
    fast, slow = trained(None, 0.3, steps=1), trained(None, 0.07, steps=1)
    assert_same(trained(lambda net: halves(net, {"lr": 0.3}, {}), 0.07, steps=1), fast[:2] + slow[2:])


def test_a_rate_that_ends_warns_once_and_names_its_group() -> None:
    net = make()
    optimizer = thor(net, 0.1, 0.1, 0.9, batch_size=8, params=halves(net, {"lr": [0.1, 0.2]}, {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, optimizer)
    told = [str(w.message) for w in caught]
    assert len(told) == 1
    assert "lr of params[0] has 2 values, and this is step 2" in told[0]
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_the_weight_decay_of_a_group_is_for_all_of_it_and_otherwise_the_filter_decides() -> None:
    net = make()
    optimizer = thor(
        net,
        0.1,
        0.1,
        0.9,
        weight_decay=0.5,
        decay_filter=lambda p: "bias" not in p.name,
        params=halves(net, {"weight_decay": 0.25}, {}),
    )
    names = {p: name for name, p in net.named_parameters()}
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {
        "0.weight": 0.25,
        "0.bias": 0.25,
        "3.weight": 0.5,
        "3.bias": 0.0,
        "4.weight": 0.5,
        "4.bias": 0.0,
    }


def test_a_centralized_gradient_has_no_mean_over_all_axes_but_the_first_before_it_is_preconditioned() -> None:
    """The step is the one that such gradients would have had, with the same curvature; a bias has no other axes."""
    net = make()
    twin = copy.deepcopy(net)
    optimizer = thor(
        net, 0.1, 0.1, 0.9, batch_size=8, loss_scale=4.0, params=halves(net, {"grad_centralization": True}, {})
    )
    plain = thor(twin, 0.1, 0.1, 0.9, batch_size=8, loss_scale=4.0)
    x, y = torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.randint(4, (8,))
    for model in (net, twin):
        (4.0 * F.cross_entropy(model(x), y)).backward()
    weight: Any = twin[0].weight
    raw = weight.grad.clone()
    weight.grad -= weight.grad.mean(dim=(1, 2, 3), keepdim=True)
    assert (weight.grad - raw).abs().max() > 1e-3
    optimizer.step()
    plain.step()
    torch.testing.assert_close(list(net.parameters()), list(twin.parameters()), rtol=1e-12, atol=1e-14)
    centered: Any = net[0].weight
    assert torch.equal(centered.grad, raw), "the gradient itself is the user's"


def test_the_order_is_kept_within_each_group() -> None:
    net = make()
    own = list(net.parameters())
    order = [own[i] for i in (5, 1, 3, 0, 4, 2)]
    optimizer = thor(net, 0.1, 0.1, 0.9, params=[*halves(net, {}, {}), {"order_params": order}])
    place = {p: i for i, p in enumerate(own)}
    assert [[place[p] for p in group["params"]] for group in optimizer.param_groups] == [[1, 0], [5, 3, 4, 2]]


def test_a_pass_that_is_set_to_zeros_leaves_no_trace() -> None:
    def trained(others: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        optimizer, x = thor(net, 0.1, 0.1, 0.9), torch.randn(8, 4)
        if others:
            (100 * net(x).square().mean()).backward()
            optimizer.zero_grad(set_to_none=False)
        for _ in range(2):
            net(x).square().sum(1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(net.parameters())

    assert_bitwise(trained(True), trained(False))


def test_heads_without_G_stay_so_when_a_layer_is_included() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    optimizer = thor(net, 0.1, 0.1, 0.9, variant="ascend", params=list(net.parameters()))
    net[0].requires_grad_(True)
    assert optimizer.curvature.include() == ["0"]
    net(torch.randn(8, 4)).square().sum(1).mean().backward()
    optimizer.step()
    assert_bitwise(optimizer.curvature.inverses_of("1")[1].flatten(0, 1)[0], torch.eye(2))


class Rows(nn.Module):
    """A linear layer that knows no numbers of inputs."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def stepped(net: nn.Module, x: Tensor) -> Tensor:
    """The net's first parameter after a step, flat."""
    optimizer = thor(net, 0.1, 0.1, 0.9, batch_size=1)
    net(x).square().sum().backward()
    optimizer.step()
    return next(net.parameters()).detach().flatten()


def test_a_kind_of_ones_own_that_is_like_a_linear_layer_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.REGISTERED, Rows, LINEAR)
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(1, 4)
    torch.testing.assert_close(stepped(Rows(layer), x), stepped(copy.deepcopy(layer), x))


def test_a_convolution_without_a_batch_dimension_has_a_batch_of_one() -> None:
    layer, x = nn.Conv1d(2, 3, 2), torch.randn(2, 6)
    torch.testing.assert_close(stepped(copy.deepcopy(layer), x), stepped(copy.deepcopy(layer), x[None]))


def test_what_is_in_no_group_is_left_alone() -> None:
    net = make()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = thor(net, 0.1, 0.1, 0.9, batch_size=8, params=[{"params": list(net[0].parameters())}])
    after = train(net, optimizer)
    assert_same(after[2:], before[2:])
    assert not torch.equal(after[0], before[0])
    assert list(optimizer.curvature.layers) == ["0"]


@pytest.mark.filterwarnings("ignore:.* the last one holds from here on")
def test_a_resumed_run_with_groups_is_bitwise_the_unbroken_one() -> None:
    def build() -> tuple[nn.Module, MindSporeThor]:
        net = make()
        groups = halves(net, {"lr": [0.1, 0.09, 0.08, 0.07], "grad_centralization": True}, {"weight_decay": 0.1})
        return net, thor(net, [0.05, 0.04], 0.1, 0.9, batch_size=8, frequency=3, params=groups)

    net, optimizer = build()
    train(net, optimizer, steps=2)
    twin, resumed = build()
    twin.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(train(twin, resumed), train(net, optimizer))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda net: 3, TypeError, "params must be a list, got int"),
        (lambda net: {"params": []}, TypeError, "params must be a list, got dict"),
        (lambda net: [], ValueError, "params must not be empty"),
        (lambda net: [{"params": []}], ValueError, r"params\[0\]\['params'\] must not be empty"),
        (lambda net: [3], TypeError, r"a list of dictionaries, got int as params\[0\]"),
        (lambda net: [{"params": ["w"]}], TypeError, r"params\[0\]\['params'\] must hold Parameters, got str"),
        (lambda net: [{"params": net[0].weight}], TypeError, r"params\[0\]\['params'\] must be a list, got Parameter"),
        (lambda net: [{"lr": 0.1}], ValueError, r"params\[0\] must have the key 'params', got \['lr'\]"),
        (lambda net: [{"params": [net[0].weight], "mu": 1}], ValueError, r"params\[0\] has the unknown key 'mu'"),
        (lambda net: [nn.Parameter(torch.ones(3))], ValueError, r"shape \(3,\) that does not belong to net"),
        (lambda net: [{"params": [net[0].weight]}] * 2, ValueError, r"'0.weight' is in params\[0\] and in params\[1\]"),
        (lambda net: halves(net, {"lr": -0.1}, {}), ValueError, r"lr of params\[0\] must be 0 or greater.*got -0.1"),
        (lambda net: halves(net, {}, {"lr": "x"}), TypeError, r"lr of params\[1\] must be a number, .*got 'x'"),
        (lambda net: halves(net, {"weight_decay": "x"}, {}), TypeError, r"weight_decay of params\[0\] must be a float"),
        (lambda net: halves(net, {"weight_decay": -1}, {}), ValueError, r"weight_decay of params\[0\] must be 0 or"),
        (lambda net: halves(net, {"grad_centralization": 1}, {}), TypeError, "must be a bool, got 1"),
        (lambda net: halves(net, {}, {"grad_centralization": True}), ValueError, r"convolutions only, and '3.weight'"),
        (lambda net: [{"order_params": list(net.parameters())}], ValueError, "order_params alone"),
        (
            lambda net: [{"params": [net[0].weight], "order_params": [net[0].weight]}],
            ValueError,
            "order_params must be the only key",
        ),
        (
            lambda net: [*halves(net, {}, {}), {"order_params": list(net.parameters())[1:]}],
            ValueError,
            r"Missing: \['0.weight'\]. In no group: \[\]",
        ),
        (
            lambda net: [{"params": [net[0].weight]}, {"order_params": [net[0].weight, net[0].bias]}],
            ValueError,
            r"In no group: \['0.bias'\]",
        ),
        (
            lambda net: [{"params": [net[0].weight, net[0].bias]}, {"order_params": [net[0].weight] * 2}],
            ValueError,
            r"Missing: \['0.bias'\].*Twice: \['0.weight'\]",
        ),
    ],
)
def test_groups_that_cannot_mean_anything_are_told(params: Groups, error: type[Exception], message: str) -> None:
    net = make()
    with pytest.raises(error, match=message):
        thor(net, 0.1, 0.1, 0.9, params=params(net))
