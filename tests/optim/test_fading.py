"""Laws of fading: a direction of rounding errors takes no step of full size, and nothing else changes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

from lightning_thor import Curvature, Thor
from lightning_thor.linalg import memory
from lightning_thor.optim import fading
from lightning_thor.optim.fading import ROUNDINGS, fade_factors, gradient_rms
from tests.helpers.boring import assert_bitwise
from tests.helpers.preconditioners import Identity

HOSTS = pytest.mark.parametrize("host", [{"cpu"}, set()], ids=["as on a CPU", "as on a GPU"])
EPS = torch.finfo(torch.float32).eps


def factors(sources: list[Tensor], largest: Any = 0.0, *shares: float) -> tuple[list[float], float]:
    r = gradient_rms(sources, sources, shares or [1.0] * len(sources))
    found, after = fade_factors(r, sources, largest)
    return [float(one) for one in found], float(after)


@pytest.mark.fuzz
@HOSTS
@given(
    own=some.lists(some.tuples(some.integers(-130, 110), some.sampled_from([1.0, 0.1])), min_size=1, max_size=6),
    before=some.one_of(some.just(0.0), some.floats(1e-30, 1e30)),
    numel=some.sampled_from([1, 5, 2**14, 2**14 + 1, 9 * 2**12]),
)
def test_a_factor_is_the_square_of_r_over_so_many_roundings_of_the_largest(
    host: set[str], own: list[tuple[int, float]], before: float, numel: int
) -> None:
    sources = [torch.full((numel,), 2.0**exponent) for exponent, _ in own]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "HOST", host)
        found, largest = factors(sources, before, *(share for _, share in own))
    r = [share * 2.0**exponent for exponent, share in own]
    assert largest == pytest.approx(max(before, min(max(r), 2 * before)) if before else max(r), rel=1e-6)
    assert found == pytest.approx([min(1.0, each / (ROUNDINGS * EPS * largest)) ** 2 for each in r], rel=1e-5)


@HOSTS
@pytest.mark.parametrize("where", [0, -1, 2**13 + 1])
def test_a_large_tensor_of_which_little_is_there_is_looked_at_whole(
    monkeypatch: pytest.MonkeyPatch, host: set[str], where: int
) -> None:
    """Most of a table's rows have no gradient in a step."""
    monkeypatch.setattr(memory, "HOST", host)
    table = torch.zeros(5 * 2**12)
    table[where] = 1e-4
    (found, _), largest = factors([table, torch.ones(1)])
    assert largest == 1.0
    assert found == pytest.approx((1e-4 / math.sqrt(5 * 2**12) / (ROUNDINGS * EPS)) ** 2, rel=1e-5)


@HOSTS
def test_what_is_not_finite_is_not_remembered(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    monkeypatch.setattr(memory, "HOST", host)
    for bad in (math.inf, math.nan):
        for sources in ([torch.full((3,), bad), torch.ones(1)], [torch.ones(1), torch.full((9 * 2**12,), bad)]):
            found, largest = factors(sources, 0.5)
            assert largest == 0.5
            assert found == [1.0, 1.0]


@HOSTS
def test_one_batch_that_explodes_fades_no_later_one(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    monkeypatch.setattr(memory, "HOST", host)
    largest: Any = 0.0
    for size in (1.0, 1e30, 1.0):
        found, largest = factors([torch.full((4,), size), torch.full((4,), 1e-4 * size)], largest)
    assert found == [1.0, 1.0]


def test_a_measure_that_is_set_to_0_begins_anew() -> None:
    """As docs/troubleshooting.md says, after gradients that exploded at first."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = Thor([p], lr=1.0, momentum=0.0, rms_averaging=0.0, preconditioner=Identity())
    moved = []
    for size, begins_anew in ((1e9, False), (1.0, False), (1.0, True)):
        for group in optimizer.param_groups if begins_anew else ():
            group["gradient_rms"] = 0.0
        p.grad, before = torch.full((4,), size), p.detach().clone()
        optimizer.step()
        moved.append(float((p.detach() - before).square().mean().sqrt()))
    assert moved == pytest.approx([0.2, 0.2 * (1e-9 / (ROUNDINGS * EPS)) ** 2, 0.2], rel=1e-3, abs=1e-8)


# ── in training ──


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.LayerNorm(16),
        nn.Tanh(), nn.Linear(16, 4),
    )  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(64, 1, 6, 6, generator=generator), torch.randint(4, (64,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def thor(model: nn.Module, mode: Any = "natural", **options: Any) -> Thor:
    curvature = Curvature(model, mode=mode, update_every_n_steps=5)
    return Thor(model.parameters(), lr=3e-3, mode=mode, preconditioner=curvature, **options)


@pytest.mark.parametrize("mode", ["natural", "polar"])
def test_a_bias_that_a_norm_does_not_see_stays(mode: str) -> None:
    model = net()
    bias = model[0].bias
    before = bias.detach().clone()
    train(model, thor(model, mode), 60)
    moved = float((bias.detach() - before).norm())
    adam = net()
    train(adam, torch.optim.AdamW(adam.parameters(), lr=3e-3, weight_decay=0.0), 60)
    assert moved < 2.0 * float((adam[0].bias.detach() - before).norm())
    assert moved < 0.01 < 60 * 3e-3 * 0.2  # which steps of full size would be


@pytest.mark.parametrize("mode", ["natural", "polar"])
def test_a_training_that_has_gradients_is_bitwise_the_one_without_fading(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    found = []
    for roundings in (ROUNDINGS, 1e-30):
        monkeypatch.setattr(fading, "ROUNDINGS", roundings)
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)
        )
        found.append(train(model, thor(model, mode), 20))
    assert_bitwise(*found)


@HOSTS
@pytest.mark.parametrize("exponent", [-60, 60])
def test_the_unit_of_the_loss_changes_no_bit(monkeypatch: pytest.MonkeyPatch, host: set[str], exponent: int) -> None:
    monkeypatch.setattr(memory, "HOST", host)
    found = []
    for scale in (1.0, 2.0**exponent):
        model = net()
        optimizer = Thor(model.parameters(), lr=3e-3, preconditioner=Identity())
        found.append(train(model, optimizer, 10, scale))
    assert_bitwise(*found)


@HOSTS
def test_a_resumed_training_is_bitwise_the_unbroken_one(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    monkeypatch.setattr(memory, "HOST", host)
    weight = nn.Parameter(torch.zeros(3))

    def go_on(optimizer: Thor, sizes: list[float]) -> list[Tensor]:
        weights = optimizer.param_groups[0]["params"]
        for size in sizes:
            weights[0].grad = torch.full((3,), size)
            optimizer.step()
        return [p.detach().clone() for p in weights]

    optimizer = Thor([weight], preconditioner=Identity())
    go_on(optimizer, [1.0])
    state = copy.deepcopy(optimizer.state_dict())
    assert type(state["param_groups"][0]["gradient_rms"]) is float
    other = Thor([nn.Parameter(weight.detach().clone())], preconditioner=Identity())
    other.load_state_dict(state)
    twin = pickle.loads(pickle.dumps(optimizer))
    twin.preconditioner = Identity()
    expected = go_on(optimizer, [1e-9])
    for one in (other, twin):
        assert_bitwise(go_on(one, [1e-9]), expected)
    del state["param_groups"][0]["gradient_rms"]  # as of a checkpoint that did not have it yet
    other.load_state_dict(state)
    assert other.param_groups[0]["gradient_rms"] == 0.0
    go_on(other, [1e-9])
    assert float(other.param_groups[0]["gradient_rms"]) == pytest.approx(1e-9)


def test_a_momentum_is_measured_as_the_mean_gradient_that_it_adds_up() -> None:
    class Copies(Identity):
        def directions(self, tensors: dict[nn.Parameter, Tensor], mode: str) -> list[dict[nn.Parameter, Tensor]]:
            return [self.precondition(tensors)]

    weight = nn.Parameter(torch.zeros(3))
    optimizer = Thor([weight], mode="polar", nesterov=False, preconditioner=Copies())
    weight.grad = torch.full((3,), 4.0)
    for _ in range(150):
        optimizer.step()
    assert float(optimizer.param_groups[0]["gradient_rms"]) == pytest.approx(4.0, rel=1e-4)


def test_groups_have_one_measure_and_unmatched_ones_none() -> None:
    p, q, r = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = Thor([{"params": [p], "match_rms": None}, {"params": [q]}], preconditioner=Identity())
    p.grad, q.grad = torch.full((2,), 100.0), torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [r]})
    assert [group["gradient_rms"] for group in optimizer.param_groups] == [1.0, 1.0, 1.0]


# ── halves ──


@pytest.mark.parametrize("mode", ["natural", "polar"])
@pytest.mark.parametrize(
    "dtypes", [[torch.float16] * 3, [torch.bfloat16] * 3, [torch.float16, torch.float32, torch.bfloat16]]
)
@pytest.mark.parametrize("scale", [1e-3, 1e-4, 1e-5])
def test_directions_beyond_float16_are_brought_to_scale_first(
    mode: Any, dtypes: list[torch.dtype], scale: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(32, 8)
    curvature = Curvature(model, mode=mode)
    optimizer = Thor(model.parameters(), lr=0.1, mode=mode, max_relative_step=None, preconditioner=curvature)
    for layer, dtype in zip(list(model)[::2], dtypes, strict=True):
        layer.to(dtype)
    before = [p.detach().double().clone() for p in model.parameters()]
    for layer in model:
        x = layer(x.to(layer.weight.dtype) if isinstance(layer, nn.Linear) else x)
    ((x.float() - 1).square().mean() * scale).backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        moved = float((p.detach().double() - old).square().mean().sqrt())
        nesterov = 1.9 if mode == "natural" else 1.0
        assert moved == pytest.approx(0.02 * nesterov, rel=0.05 if p.dtype != torch.float32 else 1e-3)
        assert optimizer.state[p]["momentum_buffer"].dtype == p.dtype
