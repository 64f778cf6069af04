"""Laws of directions in parts: the step is bitwise the same, and the memory of a used part is free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_thor import Curvature, Thor
from lightning_thor.preconditioning import directions
from tests.helpers.boring import assert_bitwise


class Net(nn.Module):
    """An attention whose three projections are parts of one parameter, a norm, layers of one form, and a parameter
    without curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.layers = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False), nn.Linear(12, 5))
        self.temperature = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.layers(self.norm(x + self.attention(x, x, x)[0]))
        return mixed * self.temperature


def observed(**options: Any) -> tuple[Net, Curvature]:
    """A model with its gradients, after one batch."""
    torch.manual_seed(0)
    net = Net()
    curvature = Curvature(net, block_size=4, **options)
    net(torch.randn(6, 3, 12)).square().mean().backward()
    return net, curvature


def parts_of(net: nn.Module, curvature: Curvature) -> Iterator[dict[nn.Parameter, Tensor]]:
    return curvature.directions({p: p.grad for p in net.parameters() if p.grad is not None})


def test_each_parameter_is_in_one_part_and_parts_of_one_parameter_stay_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, curvature = observed()
    curvature.update()
    (whole,) = parts_of(net, curvature)
    monkeypatch.setitem(directions.DIRECTION_CHUNK_NUMEL, "cpu", 1)
    parts = list(parts_of(net, curvature))
    assert len(parts) > 4
    names = {p: name for name, p in net.named_parameters()}
    found = [names[p] for part in parts for p in part]
    assert sorted(found) == sorted(names.values())
    for part in parts:
        for p, direction in part.items():
            torch.testing.assert_close(direction, whole[p], rtol=0, atol=0, msg=names[p])


@pytest.mark.parametrize("at_once", [1, 300])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "clip_norm": 0.01},
        {"weight_decay": 0.1, "decoupled_weight_decay": False, "match_rms": None, "lr": 1e-4},
        {"momentum": 0.0},
        {"match_rms": None, "kl_clip": 1e-3, "lr": 1.0},
    ],
    ids=str,
)
def test_a_step_in_parts_is_bitwise_the_step(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], at_once: int
) -> None:
    def train() -> list[Tensor]:
        net, curvature = observed(update_every_n_steps=2)
        groups = [{"params": list(net.layers.parameters()), "nesterov": False}, {"params": [net.temperature]}]
        groups += [{"params": [*net.norm.parameters(), *net.attention.parameters()]}]
        optimizer = Thor(groups, preconditioner=curvature, **options)
        for seed in range(4):
            optimizer.zero_grad()
            net(torch.randn(6, 3, 12, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()
        assert all(torch.isfinite(p).all() for p in net.parameters())
        return [p.detach() for p in net.parameters()]

    monkeypatch.setitem(directions.DIRECTION_CHUNK_NUMEL, "cpu", 10**9)
    expected = train()
    monkeypatch.setitem(directions.DIRECTION_CHUNK_NUMEL, "cpu", at_once)
    assert_bitwise(train(), expected)


def test_a_part_is_gone_when_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a model's directions would take as much memory as its weights."""
    monkeypatch.setitem(directions.DIRECTION_CHUNK_NUMEL, "cpu", 1)
    made: list[StorageWeakRef] = []
    alive: list[int] = []

    class Watched(Curvature):
        def directions(self, tensors: Any, mode: str = "natural") -> Iterator[dict[nn.Parameter, Tensor]]:
            for part in super().directions(tensors, mode):
                made.extend(StorageWeakRef(direction.untyped_storage()) for direction in part.values())
                yield part
                alive.append(sum(not one.expired() for one in made))

    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    optimizer = Thor(net.parameters(), preconditioner=Watched(net))
    net(torch.randn(5, 8)).square().mean().backward()
    optimizer.step()
    assert len(made) == 4
    assert alive == [0] * 4


def test_nothing_moves_where_a_later_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(directions.DIRECTION_CHUNK_NUMEL, "cpu", 1)
    net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    curvature = Curvature(net)
    net(torch.randn(5, 4)).square().mean().backward()
    curvature.update()
    parts = curvature.directions({p: torch.ones(4, 4) for p in net.parameters()} | {net[3].weight: torch.ones(2, 4)})
    with pytest.raises(ValueError, match="a shard of its weight"):
        next(parts)


def test_a_gradient_of_another_shape_with_as_many_numbers_is_refused() -> None:
    layer = nn.Linear(128, 64, bias=False)
    curvature = Curvature(layer)
    with pytest.raises(ValueError, match=r"\[128, 64\].*\[64, 128\]"):
        curvature.precondition({layer.weight: torch.randn(128, 64)})
