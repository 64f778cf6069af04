"""A kind of layer is added from outside the package: these lines are all that a user writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, register_layer
from lightning_thor.layers import registry
from tests.helpers.boring import assert_bitwise


class OwnLinear(nn.Module):
    """A linear layer that shares no code with torch's."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_out, n_in) / n_in), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class OwnConv(nn.Conv2d):
    """A convolution with a forward of its own, which keeps its weight in another memory format."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.contiguous(memory_format=torch.channels_last), self.bias)


def rows(module: nn.Module, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return a.flatten(0, -2), g.flatten(0, -2)


@pytest.fixture(autouse=True)
def registered_for_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {})


REGISTRATIONS: dict[str, tuple[Callable[[], None], Callable[[], nn.Module], Callable[[], nn.Module], Any]] = {
    "rows": (lambda: register_layer(OwnLinear, rows), lambda: OwnLinear(5, 3), lambda: nn.Linear(5, 3), (8, 6, 5)),
    "like a linear layer": (
        lambda: register_layer(OwnLinear, like=nn.Linear), lambda: OwnLinear(5, 3), lambda: nn.Linear(5, 3), (8, 6, 5)
    ),
    "like a convolution": (
        lambda: register_layer(OwnConv, like=nn.Conv2d),
        lambda: OwnConv(2, 4, 3, groups=2), lambda: nn.Conv2d(2, 4, 3, groups=2), (8, 2, 6, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("statistics", ["expand", "reduce"])
@pytest.mark.parametrize("max_rows", [None, 20])
@pytest.mark.parametrize("name", REGISTRATIONS)
def test_a_layer_from_outside_trains_bitwise_as_torchs_own(name: str, max_rows: int | None, statistics: str) -> None:
    register, make_own, make_torchs, shape = REGISTRATIONS[name]
    register()
    own, torchs = make_own(), make_torchs()
    torchs.load_state_dict(own.state_dict())
    found, x = [], torch.randn(shape)
    for layer in (own, torchs):
        model = nn.Sequential(layer, nn.Tanh())
        curvature = Curvature(model, max_rows=max_rows, statistics=statistics, update_every_n_steps=2)
        optimizer = Thor(model.parameters(), lr=0.1, preconditioner=curvature)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - 0.3).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert list(curvature.layers) == ["0"]
        factors = [curvature.factors.blocks(0, side, "average") for side in ("A", "G")]
        found.append([*factors, *model.parameters()])
    assert_bitwise(found[0], found[1])
