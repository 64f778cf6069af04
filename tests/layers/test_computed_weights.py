"""Laws of weights that a module computes from a parameter at each call: their layers have the factors of plain ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from lightning_thor import Curvature, Thor, register_layer
from lightning_thor.layers.discovery import discover_layers
from tests.helpers.observing import assert_same, factors, observing

Wrap = Callable[[nn.Module], nn.Module]
X = torch.randn(6, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
LAYERS = ["0", "2", "5", "7"]


class Standardised(nn.Conv2d):
    """As in BiT and NFNets."""

    def computed(self) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.computed(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Rounded(nn.Conv2d):
    """As in quantisation-aware training: the gradient goes straight through."""

    def computed(self) -> Tensor:
        return self.weight + (torch.round(8 * self.weight) / 8 - self.weight).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.computed(), self.bias)


class Masked(nn.Linear):
    """As in autoregressive networks and flows."""

    def computed(self) -> Tensor:
        return self.mask * self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.computed(), self.bias)


def as_type(kind: type[nn.Conv2d] | type[nn.Linear]) -> Wrap:
    def wrap(layer: nn.Module) -> nn.Module:
        if type(layer) is kind.__base__:
            layer.__class__ = kind
        if isinstance(layer, Masked):
            layer.register_buffer("mask", torch.arange(layer.weight.numel()).view_as(layer.weight) % 3 > 0)
        return layer

    return wrap


WRAPS: dict[str, Wrap] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "both": lambda layer: spectral_norm(weight_norm(layer)),
    "weight_norm by a hook": nn.utils.weight_norm,
    "spectral_norm by a hook": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),  # type: ignore[no-untyped-call]
    "standardised": as_type(Standardised),
    "rounded": as_type(Rounded),
    "masked": as_type(Masked),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


def net(wrap: Wrap = lambda layer: layer) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [
        nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Linear(216, 7),
        nn.Linear(7, 5, bias=False),
    ]  # fmt: skip
    one, two, three, four = (wrap(layer.double()) for layer in layers)
    return nn.Sequential(
        one, nn.ReLU(inplace=True), two, nn.Tanh(), nn.Flatten(), three, nn.ReLU(inplace=True), four
    ).double()


def train(model: nn.Module) -> None:
    model(X).sin().mean().backward()


def source(layer: Any) -> Tensor:
    """The parameter that the weight is computed from."""
    (found,) = [p for p in layer.parameters() if p.shape == layer.weight.shape]
    return found


def with_the_weights_of(model: nn.Sequential) -> nn.Sequential:
    """A net of plain layers with the weights that those of ``model`` computed last."""
    plain = net()
    for name in LAYERS:
        layer, own = model.get_submodule(name), plain.get_submodule(name)
        computed = layer.computed() if isinstance(layer, Standardised | Rounded | Masked) else layer.eval().weight
        own.weight.data.copy_(computed)  # type: ignore[operator, union-attr]
        if own.bias is not None:
            own.bias.data.copy_(layer.bias)  # type: ignore[operator, union-attr]
    return plain


@pytest.mark.parametrize("name", WRAPS)
def test_factors_are_those_of_plain_layers_with_these_weights(name: str) -> None:
    model = net(WRAPS[name])
    found = observing(model, train)
    assert list(found.layers) == LAYERS
    assert not found.left_out
    expected = observing(with_the_weights_of(model), train)
    torch.testing.assert_close(factors(found), factors(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["weight_norm", "standardised", "masked"])
def test_the_direction_is_of_the_parameters_own_gradient(name: str) -> None:
    model = net(WRAPS[name])
    found = observing(model, train)
    plain = with_the_weights_of(model)
    expected = observing(plain, train)
    for name in LAYERS:
        ours, theirs = model.get_submodule(name), plain.get_submodule(name)
        grads = {source(ours): source(ours).grad}
        (direction,) = found.precondition(grads).values()  # type: ignore[arg-type]
        (other,) = expected.precondition({theirs.weight: source(ours).grad}).values()  # type: ignore[dict-item]
        torch.testing.assert_close(direction, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WRAPS)
def test_gradients_and_power_iterations_are_those_without_hooks(name: str) -> None:
    """Reading such a weight computes it, which iterates."""
    without, observed = net(WRAPS[name]), net(WRAPS[name])
    curvature = Curvature(observed, update_every_n_steps=1)
    for _ in range(2):
        train(without)
        train(observed)
        curvature.update()
    torch.testing.assert_close(observed.state_dict(), without.state_dict(), rtol=0.0, atol=0.0)
    for one, other in zip(observed.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["weight_norm", "standardised", "rounded", "masked"])
def test_a_compiled_one_has_the_statistics_of_an_eager_one(name: str) -> None:
    torch.compiler.reset()
    model = net(WRAPS[name])
    compiled = observing(
        copy.deepcopy(model), lambda model: train(torch.compile(model, backend="aot_eager", fullgraph=True))
    )
    assert_same(compiled, observing(model, train))


class Beside(nn.Conv2d):
    """Multiplies by a fixed weight too."""

    def forward(self, x: Tensor) -> Tensor:
        fixed = F.conv2d(0.5 * x, torch.ones_like(self.weight), None, self.stride, self.padding)
        return fixed + F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


def test_a_fixed_weight_of_the_same_shape_is_not_taken_for_it() -> None:
    averages = []
    for kind in (Beside, nn.Conv2d):
        torch.manual_seed(3)
        # The first layer, so that the fixed product has a gradient too.
        curvature = observing(nn.Sequential(nn.Conv2d(3, 3, 1), kind(3, 4, 3, padding=1)).double(), train)
        averages.append(curvature.factors.blocks(1, "A", "average"))
    assert averages[1].any()
    torch.testing.assert_close(averages[0], averages[1], rtol=1e-9, atol=1e-12)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(0.5 * x)


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (orthogonal(nn.Linear(4, 4)), "its weight is not a plain parameter (parametrized, or not affine)"),
        (parametrized(nn.Linear(4, 4)), "its weight is not a plain parameter (parametrized, or not affine)"),
        (weight_norm(nn.LayerNorm(4), dim=None), "its weight is not a plain parameter (parametrized, or not affine)"),
        (weight_norm(Halved(4, 4)), "ParametrizedHalved has a forward of its own, which may not be Linear's"),
        (weight_norm(nn.Linear(4, 4)).requires_grad_(False), "frozen"),
    ],
    ids=["orthogonal", "parametrized", "a norm", "a forward of its own", "frozen"],
)
def test_others_have_none(layer: nn.Module, reason: str) -> None:
    layers, left_out = discover_layers(
        nn.ModuleDict({"it": layer, "other": nn.Linear(2, 2)}), block_size=64, precondition_bias=True
    )
    assert (list(layers), left_out) == (["other"], {"it": reason})


@pytest.mark.parametrize("like", [nn.Linear, nn.Conv2d])
def test_nothing_is_known_of_a_type_of_a_user_that_has_no_weight(
    monkeypatch: pytest.MonkeyPatch, like: type[nn.Module]
) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_v = nn.Parameter(torch.ones(2, 2))

    monkeypatch.setattr("lightning_thor.layers.registry.REGISTERED", {})
    register_layer(Own, like=like)
    assert list(Curvature(nn.Sequential(Own(), *(nn.Linear(2, 2) for _ in range(2)))).left_out) == ["0"]


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
def test_a_state_of_a_former_version_goes_on(mode: str) -> None:
    model = net(lambda layer: weight_norm(layer) if isinstance(layer, nn.Linear) else layer)
    former = Curvature(model, mode=mode, skip_layers=["5", "7"])
    train(model)
    former.update()
    state = copy.deepcopy(former.state_dict())
    former.close()
    curvature = Curvature(model, mode=mode)
    curvature.load_state_dict(state)
    assert curvature.due_parameters() >= {source(model[5]), source(model[7])}
    assert curvature.factors.updates.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("is_parametrized", [True, False])
def test_training_goes_on_where_the_norm_is_removed(is_parametrized: bool) -> None:
    model = net(spectral_norm if is_parametrized else nn.utils.spectral_norm)
    curvature = Curvature(model, update_every_n_steps=1)
    optimizer = Thor(model.parameters(), lr=1e-3, preconditioner=curvature)
    for step in range(2):
        if step:
            for name in LAYERS:
                layer = model.get_submodule(name)
                if is_parametrized:
                    parametrize.remove_parametrizations(layer, "weight")
                else:
                    nn.utils.remove_spectral_norm(layer)  # type: ignore[no-untyped-call, type-var]
        train(model)
        optimizer.step()
        optimizer.zero_grad()
    assert not curvature.left_out
