"""Laws of ``max_relative_step``: no weight takes a step that is large beside the initial weights of its fan-in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor
from tests.helpers.preconditioners import Identity


def moved(model: nn.Module, x: Tensor, preconditioner: Any = None, **options: Any) -> list[float]:
    """The root mean square of each parameter's change in one step without momentum."""
    curvature = preconditioner or Curvature(model, mode=options.get("mode", "natural"))
    optimizer = Thor(model.parameters(), **{"momentum": 0.0, **options}, preconditioner=curvature)
    before = [p.detach().double() for p in model.parameters()]
    model(x).square().sum().backward()
    optimizer.step()
    pairs = zip(model.parameters(), before, strict=True)
    return [float((p.detach().double() - old).square().mean().sqrt()) for p, old in pairs]


def limit(fan_in: int, share: float = 0.01) -> float:
    return share / math.sqrt(3 * fan_in)


def transposed(inputs: int, outputs: int) -> nn.Module:
    """A linear layer whose weight is ``[in, out]``, as a GPT-2 has."""
    reason = "transformers is not installed (the dev extra has it)"
    made: nn.Module = pytest.importorskip("transformers.pytorch_utils", reason=reason).Conv1D(outputs, inputs)
    return made


TOKENS = torch.arange(12).view(4, 3) % 8
FAN_IN = {
    "linear": (lambda: nn.Linear(30, 4, bias=False), torch.ones(5, 30), 30),
    "convolution": (lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), torch.ones(2, 6, 5, 5), 27),
    "transposed linear": (lambda: transposed(30, 4), torch.ones(5, 30), 30),
    "embedding": (lambda: nn.Embedding(8, 30), TOKENS, 1),
    "packed attention": (lambda: Attends(), torch.ones(2, 3, 12), 12),
    "without curvature": (lambda: nn.Bilinear(5, 6, 4, bias=False), torch.ones(2, 11), 30),
    "experts in one parameter": (lambda: Experts(), torch.ones(3, 2, 30), 30),
}


class Attends(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(12, 2, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """Multiplies the tokens of each expert by its own matrix, ``[experts, in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 30, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Pairs(nn.Sequential):
    """Splits its input where its layer takes two."""

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self
        return layer(x[:, :5], x[:, 5:]) if isinstance(layer, nn.Bilinear) else layer(x)


@pytest.mark.parametrize("kind", FAN_IN)
def test_a_step_is_limited_by_the_number_of_inputs_of_each_output(kind: str) -> None:
    make, x, fan_in = FAN_IN[kind]
    model = Pairs(make())
    x = x + 0.1 * torch.randn(x.shape) if x.is_floating_point() else x
    (most,) = {
        round(found, 7) for p, found in zip(model.parameters(), moved(model, x, lr=0.1), strict=True) if p.dim() > 1
    }
    assert most == pytest.approx(min(0.1 * 0.2, limit(fan_in)), rel=1e-3)


def test_vectors_and_small_steps_are_not_limited_and_none_has_no_limit() -> None:
    x = torch.randn(5, 30)
    at = {lr: moved(nn.Sequential(nn.Linear(30, 4), nn.LayerNorm(4)), x, lr=lr) for lr in (0.1, 1e-3)}
    assert at[0.1] == pytest.approx([limit(30), 0.02, 0.02, 0.02], rel=1e-3)
    assert at[1e-3] == pytest.approx([2e-4] * 4, rel=1e-3)
    moved(nn.Linear(0, 4), torch.ones(5, 0), Identity(), lr=0.1)  # no inputs, no division by their number
    (free,) = moved(nn.Linear(30, 4, bias=False), x, lr=0.1, max_relative_step=None)
    assert free == pytest.approx(0.02, rel=1e-3)


def test_it_is_of_the_rate_of_each_step_and_a_rate_of_zero_moves_nothing() -> None:
    weight = nn.Parameter(torch.zeros(4, 30))
    optimizer = Thor([weight], lr=0.1, momentum=0.0, rms_averaging=0.0, preconditioner=Identity())
    for lr, expected in (0.1, limit(30)), (1e-3, 2e-4), (0.0, 0.0), (0.2, limit(30)):
        before = weight.detach().clone()
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.randn(4, 30)
        optimizer.step()
        assert float((weight.detach() - before).square().mean().sqrt()) == pytest.approx(expected, rel=1e-5)


def test_polar_directions_of_a_momentum_may_be_as_large_as_the_momentum_of_limited_ones() -> None:
    x = torch.randn(5, 30)
    model = nn.Sequential(nn.Linear(30, 4, bias=False), nn.Linear(4, 2, bias=False))
    found = moved(model, x, lr=0.3, mode="polar", momentum=0.9, nesterov=False)
    assert found == pytest.approx([limit(30, 0.1), limit(4, 0.1)], rel=1e-3)


def test_the_largest_fan_in_counts_where_a_table_is_tied_to_the_output_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(8, 30), nn.Linear(30, 8, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens))

    (found,) = moved(Tied(), TOKENS, lr=0.1)
    assert found == pytest.approx(limit(30), rel=1e-3)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, "all"])
def test_it_is_a_number_greater_than_zero(value: Any) -> None:
    with pytest.raises(ValueError, match="max_relative_step must be"):
        Thor([nn.Parameter(torch.zeros(2, 2))], max_relative_step=value)


def test_a_state_of_an_earlier_version_goes_on_without_a_limit() -> None:
    weight = nn.Parameter(torch.zeros(4, 30))
    optimizer = Thor([weight], lr=0.1, preconditioner=Identity())
    state = optimizer.state_dict()
    assert state["param_groups"][0].pop("max_relative_step") == 0.01
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["max_relative_step"] is None


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
@pytest.mark.parametrize("lr", [5e-324, 1e-320, 1e-300])
def test_the_smallest_rates_that_a_schedule_ends_at_move_nothing(mode: Any, lr: float) -> None:
    model = nn.Linear(3, 2)
    optimizer = Thor(model.parameters(), lr=lr, mode=mode, preconditioner=Curvature(model, mode=mode))
    before = model.weight.detach().clone()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0)
