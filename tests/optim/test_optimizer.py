"""Laws of Thor, apart from any curvature."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor
from tests.helpers.boring import assert_bitwise
from tests.helpers.preconditioners import Identity


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6, generator=generator).to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def thor(model: nn.Module, **options: Any) -> Thor:
    plain = {"match_rms": None, "decoupled_weight_decay": False, "preconditioner": Identity()}
    return Thor(model.parameters(), **{**plain, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0, "nesterov": False},
        {"momentum": 0.9, "nesterov": False},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": False, "weight_decay": 0.1},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_with_an_identity_preconditioner_thor_is_sgd(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Bitwise: the fused one, where weights are of float32."""
    ours, theirs = net().to(dtype), net().to(dtype)
    fused = {"fused": True} if dtype == torch.float32 else {"foreach": True}
    found = train(ours, thor(ours, lr=0.1, **options))
    expected = train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, **fused, **options))
    assert_bitwise(found, expected)


def test_the_order_in_which_a_weight_lies_in_memory_changes_no_step() -> None:
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=memory_format))
        optimizer = Thor([weight], lr=0.1, preconditioner=Identity())
        for _ in range(3):
            weight.grad = torch.randn(4, 3, 2, 2)
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found)


def test_without_momentum_there_is_nothing_to_be_ahead_of() -> None:
    one, other = net(), net()
    found = train(one, thor(one, lr=0.1, momentum=0.0, nesterov=True))
    assert_bitwise(found, train(other, thor(other, lr=0.1, momentum=0.0, nesterov=False)))


def test_decoupled_weight_decay_shrinks_weights_by_lr_times_decay() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = thor(model, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in model.parameters()], [0.95 * p for p in before])


def test_match_rms_gives_every_tensor_the_same_root_mean_square() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, thor(model, lr=0.1, match_rms=0.2, max_relative_step=None, nesterov=False), steps=1)
    for p, q in zip(before, after, strict=True):
        assert (p - q).square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize("numel", [1, 399, 400, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("options", [{"match_rms": 0.2}, {"match_rms": None, "kl_clip": 1e-3}], ids=str)
def test_a_tensor_without_gradient_moves_nowhere_whatever_its_size(
    options: dict[str, Any], numel: int, dtype: torch.dtype
) -> None:
    """0 times a factor that overflowed would be NaN."""
    weight = nn.Parameter(torch.ones(numel, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    Thor([weight], lr=0.1, preconditioner=Identity(), **options).step()
    assert_bitwise(weight.detach(), torch.ones(numel, dtype=dtype))


def test_a_head_that_starts_at_zero_trains() -> None:
    """Its zeros make every gradient below it exactly zero in the first step."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    nn.init.zeros_(model[2].weight)
    optimizer = Thor(model.parameters(), lr=0.01, preconditioner=Curvature(model, update_every_n_steps=1))
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(16, 32)) - 1.0).square().mean().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model[2].weight.abs().sum() > 0


@pytest.mark.parametrize(("kl_clip", "lr"), [(1e-3, 0.5), (1e6, 0.5), (1e-8, 0.01)])
def test_kl_clip_bounds_lr_squared_times_direction_times_gradient(kl_clip: float, lr: float) -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, thor(model, lr=lr, momentum=0.0, kl_clip=kl_clip), steps=1)
    grads = [p.grad for p in model.parameters()]
    unclipped = lr**2 * sum(g.square().sum() for g in grads if g is not None)
    factor = min(1.0, (kl_clip / float(unclipped)) ** 0.5)
    expected = [p - lr * factor * g for p, g in zip(before, grads, strict=True) if g is not None]
    torch.testing.assert_close(after, expected)


def test_a_complex_parameter_is_clipped_as_its_two_real_parts_are() -> None:
    numbers = torch.tensor([3.0 + 4.0j, 1.0 - 2.0j])
    weights = [nn.Parameter(torch.zeros(2, dtype=torch.complex64)), nn.Parameter(torch.zeros(2, 2))]
    for weight, grad in zip(weights, (numbers, torch.view_as_real(numbers)), strict=True):
        weight.grad = grad.clone()
        Thor([weight], lr=1.0, kl_clip=1e-2, match_rms=None, preconditioner=Identity()).step()
    torch.testing.assert_close(torch.view_as_real(weights[0]), weights[1])


def test_gradients_are_left_as_they_were() -> None:
    model = net()
    optimizer = thor(model, lr=0.1, match_rms=0.2)
    train(model, optimizer, 2)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert_bitwise([p.grad for p in model.parameters()], grads)


def test_closure_runs_once_with_gradients_before_anything_else() -> None:
    model, calls = net(), []
    optimizer = thor(model)

    def closure() -> Tensor:
        calls.append((torch.is_grad_enabled(), optimizer.preconditioner.updates))
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(4, 6)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert calls == [(True, 0)]
    assert optimizer.preconditioner.updates == 1


def test_a_step_without_gradients_does_nothing() -> None:
    model = net()
    optimizer = thor(model)
    optimizer.step(lambda: None)
    assert optimizer.preconditioner.updates == 0
    assert not optimizer.state


def test_options_are_per_group_and_reach_schedulers() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.01}]
    optimizer = Thor(groups, momentum=0.0, nesterov=False, match_rms=None, preconditioner=Identity())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=10)
    for group, lr in zip(optimizer.param_groups, (0.1, 0.01), strict=True):
        group["lr"] = lr
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert a[0].item() == pytest.approx(0.9)
    assert b[0].item() == pytest.approx(0.99)


def test_copies_and_old_states_get_what_torch_forgets() -> None:
    model = net()
    optimizer = thor(model, lr=0.1)
    train(model, optimizer, 2)
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert twin.preconditioner is None
        assert twin.param_groups[0]["lr"] == 0.1
    state = optimizer.state_dict()
    del state["param_groups"][0]["kl_clip"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["kl_clip"] is None
    assert optimizer.state_dict()["param_groups"][0].keys() == state["param_groups"][0].keys() | {"kl_clip"}
    assert isinstance(optimizer.preconditioner, Identity)


def test_without_a_curvature_the_error_says_what_to_add() -> None:
    model = net()
    with pytest.raises(RuntimeError, match=r"Add ThorCallback\(\) to Trainer.*preconditioner=Curvature\(model\)"):
        train(model, Thor(model.parameters()), 1)


def test_a_sparse_gradient_is_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        Thor(table.parameters(), preconditioner=Curvature(nn.Linear(1, 1))).step()


@pytest.mark.parametrize(("before", "after"), [("natural", "polar"), ("polar", "natural"), ("adam", "natural")])
def test_a_state_of_another_mode_is_refused_and_changes_nothing(before: str, after: str) -> None:
    model = net()
    saved, optimizer = Thor(model.parameters(), mode=before).state_dict(), Thor(model.parameters(), mode=after, lr=0.5)
    with pytest.raises(ValueError, match=rf"is of Thor\(mode='{before}'\), this optimizer of mode='{after}'.*weights"):
        optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["mode"], optimizer.param_groups[0]["lr"]) == (after, 0.5)


class Swapped(nn.Module):
    """Two layers, by the same names in either order."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, {"first": nn.Linear(6, 8), "last": nn.Linear(8, 3)}[name])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
def test_momenta_of_other_shapes_than_the_parameters_in_their_places_are_refused(mode: Any) -> None:
    states = []
    for names in (("first", "last"), ("last", "first")):
        model = Swapped(*names)
        optimizer = Thor(model.parameters(), mode=mode, preconditioner=Curvature(model, mode=mode))
        train(model, optimizer, 2)
        states.append(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"parameter 0 has a .* of \[8, 6\], but the parameter is \[3, 8\].*order"):
        optimizer.load_state_dict(states[0])
    assert_bitwise(optimizer.state_dict()["state"], states[1]["state"])


@pytest.mark.parametrize(
    ("mode", "damage", "fault"),
    [
        ("natural", {"momentum_buffer": None}, "has None for its momentum_buffer"),
        ("adam", {"exp_avg": 0.0}, "has 0.0 for its exp_avg"),
        ("adam", {"step": ...}, "lacks step"),
    ],
)
def test_a_damaged_state_is_refused(mode: Any, damage: dict[str, Any], fault: str) -> None:
    model = net()
    optimizer = Thor(model.parameters(), mode=mode, preconditioner=Curvature(model, mode=mode))
    train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    own = state["state"][2] | damage
    state["state"][2] = {key: value for key, value in own.items() if value is not ...}
    with pytest.raises(ValueError, match=f"parameter 2 {fault}: it is damaged"):
        optimizer.load_state_dict(state)


def test_a_parameter_that_grew_is_told_before_anything_is_written() -> None:
    table = nn.Parameter(torch.ones(10, 8))
    optimizer = thor(nn.ParameterList([table]), momentum=0.9)
    table.grad = torch.ones_like(table)
    optimizer.step()
    table.data = torch.ones(5000, 8)
    table.grad = torch.ones_like(table)
    with pytest.raises(RuntimeError, match=r"is \[5000, 8\] now, and was \[10, 8\] when its momentum began"):
        optimizer.step()
    assert table.eq(1).all()
    optimizer.state.pop(table)
    optimizer.step()
    assert table.lt(1).all()


def test_a_state_of_before_there_were_modes_is_of_natural_mode() -> None:
    model = net()
    state = Thor(model.parameters(), lr=0.5).state_dict()
    del state["param_groups"][0]["mode"]
    optimizer = Thor(model.parameters())
    optimizer.load_state_dict(state)
    assert (optimizer.param_groups[0]["mode"], optimizer.param_groups[0]["lr"]) == ("natural", 0.5)
    with pytest.raises(ValueError, match="is of Thor\\(mode='natural'\\)"):
        Thor(model.parameters(), mode="polar").load_state_dict(state)
