"""Laws of linear layers whose parent hands their weights to `F.linear`: they train as if they were called."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_thor import Curvature, Thor, register_layer
from lightning_thor.layers import registry

WIDTH = 6


class Called(nn.Module):
    """An attention over positions, ``[batch, positions, width]``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def project(self, x: Tensor) -> Tensor:
        projected: Tensor = self.qkv(x)
        return projected

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v))
        return mixed


class OfTimm(Called):
    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.qkv.weight, bias=self.qkv.bias)


class OfTorchvision(OfTimm):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return F.linear(F.scaled_dot_product_attention(q, k, v), self.proj.weight, self.proj.bias)


class OfVideos(Called):
    """Torchvision's for videos, no subclass of that for images."""

    project = OfTimm.project
    forward = OfTorchvision.forward


for attention, name in (
    (OfTimm, "timm.models.beit.Attention"),
    (OfTorchvision, "torchvision.models.swin_transformer.ShiftedWindowAttention"),
    (OfVideos, "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d"),
):
    attention.__module__, _, attention.__qualname__ = name.rpartition(".")


def train(attention: type[Called], compiled: bool = False, **options: Any) -> list[nn.Parameter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), attention(), nn.Linear(WIDTH, 3)).double()
    curvature = Curvature(model, update_every_n_steps=2, **options)
    assert list(curvature.layers) == ["0", "1.qkv", "1.proj", "2"]
    optimizer = Thor(model.parameters(), lr=0.02, mode=curvature.mode, preconditioner=curvature)
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for _ in range(4):
        x, labels = torch.randn(3, 5, WIDTH, dtype=torch.float64), torch.randint(3, (15,))
        F.cross_entropy(call(x).flatten(0, 1), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", [OfTimm, OfTorchvision, OfVideos])
@pytest.mark.parametrize("precondition_bias", [False, True])
def test_they_train_as_if_they_were_called(attention: type[Called], compiled: bool, precondition_bias: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch's compiler warns of Python 3.13.0
        found = train(attention, compiled, precondition_bias=precondition_bias)
    for p, expected in zip(found, train(Called, precondition_bias=precondition_bias), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-9)


class PaddedConvolution(nn.Conv2d):
    """Pads on one side, and activates; as wrappers of convolutions do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1))).relu()


def test_one_that_comes_last_is_the_output_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), PaddedConvolution(4, 4, 3), PaddedConvolution(4, 3, 3))
    assert Curvature(model, mode="polar").polar_layers == {"0", "1"}


class ByItsRows(PaddedConvolution):
    """Registered with rows of the module's own input and output."""


def test_a_registered_kind_is_given_what_the_module_is_called_with_and_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {})
    seen: list[tuple[torch.Size, torch.Size]] = []

    def rows_of(module: Any, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((a.shape, g.shape))
        patches = F.unfold(F.pad(a, (0, 1, 0, 1)), 3).mT
        return patches.flatten(0, 1), (g * (module(a) > 0)).flatten(2).mT.flatten(0, 1)

    register_layer(ByItsRows, rows_of)
    model = nn.Sequential(ByItsRows(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 3))
    curvature = Curvature(model, max_rows=None)
    model(torch.randn(5, 2, 5, 5)).square().mean().backward()
    curvature.update()
    assert {*seen} == {(torch.Size((5, 2, 5, 5)), torch.Size((5, 4, 4, 4)))}
    assert not curvature.left_out


class SameConvolution(nn.Conv2d):
    """As timm's: hands its weight to a function."""

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(padded, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups).relu()


class Outside(nn.Module):
    """The same with a plain convolution."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Conv2d(*args, **options)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(F.pad(x, (0, 1, 0, 1))).relu()
        return result


def convolved(kind: Any, compiled: bool = False, **options: Any) -> tuple[list[str], list[nn.Parameter]]:
    torch.manual_seed(0)
    model = nn.Sequential(kind(2, 4, 3, stride=2), kind(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3)).double()
    curvature = Curvature(model, update_every_n_steps=2, **options)
    optimizer = Thor(model.parameters(), lr=0.02, mode=curvature.mode, preconditioner=curvature)
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for _ in range(4):
        F.cross_entropy(call(torch.randn(5, 2, 6, 6, dtype=torch.float64)), torch.randint(3, (5,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(curvature.layers), list(model.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("statistics", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [PaddedConvolution, SameConvolution])
def test_convolutions_with_a_forward_of_their_own_train_as_plain_ones(
    kind: Any, statistics: Any, compiled: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch's compiler warns of Python 3.13.0
        names, found = convolved(kind, compiled, statistics=statistics)
    assert names == ["0", "1", "3"]
    for p, expected in zip(found, convolved(Outside, statistics=statistics)[1], strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-9)
