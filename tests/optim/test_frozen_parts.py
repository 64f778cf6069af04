"""Laws of layers of which a part is frozen in mid-run, or has no gradient: the weight goes on with its curvature."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_thor import Curvature, Thor
from lightning_thor.fsdp.sharded_curvature import ShardedCurvature
from tests.helpers.boring import assert_bitwise

Parts = tuple[nn.Module, Thor, Curvature]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 8, 3), nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last_norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).mT
        return self.head(self.last_norm(self.attention(x, x, x)[0]).tanh().mean(1))


def parts(mode: Any, is_sharded: bool) -> Parts:
    torch.manual_seed(3)
    model = Net()
    curvature = Curvature(model, mode=mode, block_size=3, precondition_bias=True, update_every_n_steps=2)
    preconditioner: Any = ShardedCurvature(curvature) if is_sharded else curvature
    return model, Thor(model.parameters(), lr=0.01, mode=mode, preconditioner=preconditioner), curvature


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(6, 2, 7, generator=torch.Generator().manual_seed(step))
    model(x).sin().square().mean().backward()


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
def test_weights_move_as_if_the_gradient_of_a_frozen_bias_were_zeros(mode: str, is_sharded: bool) -> None:
    model, optimizer, curvature = parts(mode, is_sharded)
    biases = [model.conv.bias, model.norm.bias, model.attention.in_proj_bias, model.last_norm.bias]
    for step in range(7):
        backward(model, step)
        if step >= 3:
            before, twin = [b.detach().clone() for b in biases], copy.deepcopy((model, curvature, optimizer))
            twin_model, twin_curvature, twin_optimizer = twin
            twin_optimizer.preconditioner = ShardedCurvature(twin_curvature) if is_sharded else twin_curvature
            names = [name for name, p in model.named_parameters() if any(p is b for b in biases)]
            assert len(names) == len(biases)
            for name, p in twin_model.named_parameters():
                p.grad = dict(model.named_parameters())[name].grad
                if name in names:
                    p.grad = torch.zeros_like(p)
                    # In polar mode the direction is that of the momentum.
                    twin_optimizer.state[p].get("momentum_buffer", p.grad).zero_()
            for b in biases:
                b.grad = None
            twin_optimizer.step()
            optimizer.step()
            others = [(name, p) for name, p in model.named_parameters() if name not in names]
            assert_bitwise([p for _, p in others], [twin_model.get_parameter(name) for name, _ in others])
            assert_bitwise(biases, before)
            assert not curvature.left_out.keys() & {"conv", "norm", "last_norm", "head"}
        else:
            optimizer.step()
        optimizer.zero_grad()
        for b in biases:
            b.requires_grad_(step < 4)  # before, its gradient is set to None


def test_a_bias_that_the_optimizer_does_not_have_leaves_no_state() -> None:
    model = nn.Linear(4, 2)
    curvature = Curvature(model, mode="adam", precondition_bias=True)
    optimizer = Thor([model.weight], mode="adam", preconditioner=curvature)
    model(torch.randn(8, 4)).square().mean().backward()
    model.bias.grad = None
    with pytest.warns(UserWarning, match="1 biases or shifts .* not in Thor"):
        optimizer.step()
    assert list(optimizer.state) == [model.weight]


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
def test_biases_and_shifts_that_another_optimizer_has_are_told_once_with_what_to_do(mode: Any) -> None:
    """Their weights take plain gradients, which nothing else says."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]

    def train(**options: Any) -> list[str]:
        curvature = Curvature(model, mode=mode, precondition_bias=True, **options)
        optimizer = Thor(weights, mode=mode, preconditioner=curvature)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                model.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
        curvature.close()
        return [str(warning.message) for warning in caught]

    assert train(parameters=weights) == []
    (told,) = train()
    assert "3 biases or shifts" in told
    assert "Curvature(model, parameters=[...])" in told
