"""Laws of ``rms_averaging``: a gradient that is far smaller than those of the last steps takes a smaller step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor
from lightning_thor.linalg import memory
from lightning_thor.optim.fading import MEAN_SQUARE
from tests.helpers.boring import assert_bitwise
from tests.helpers.preconditioners import Identity

HOSTS = pytest.mark.parametrize("host", [{"cpu"}, set()], ids=["as on a CPU", "as on a GPU"])
SHAPES = [(4, 3), (5,), (), (2, 3, 2, 2)]


def step(optimizer: Thor, grads: list[Tensor | None]) -> list[Tensor]:
    """What one step moves each parameter by."""
    (group,) = optimizer.param_groups
    before = [p.detach().clone() for p in group["params"]]
    for p, grad in zip(group["params"], grads, strict=True):
        p.grad = None if grad is None else grad.clone()
    optimizer.step()
    return [p.detach() - old for p, old in zip(group["params"], before, strict=True)]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]


def gradients(n_steps: int, seed: int = 0) -> list[list[Tensor]]:
    """Of sizes that differ by three powers of ten from step to step."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...]) -> Tensor:
        size = 10 ** (3 * torch.rand((), generator=generator, dtype=torch.float64))
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    return [[one(shape) for shape in SHAPES] for _ in range(n_steps)]


@HOSTS
@pytest.mark.parametrize("limit", [None, 0.3])
def test_steps_are_divided_by_a_third_of_the_running_root_mean_square_or_by_their_own_if_that_is_larger(
    monkeypatch: pytest.MonkeyPatch, host: set[str], limit: float | None
) -> None:
    monkeypatch.setattr(memory, "HOST", host)
    lr, past = 0.5, 0.7
    optimizer = Thor(
        parameters(), lr=lr, momentum=0.0, rms_averaging=past, max_relative_step=limit, preconditioner=Identity()
    )
    means = [0.0] * len(SHAPES)
    for grads in gradients(12):
        moved = step(optimizer, list(grads))
        for i, grad in enumerate(grads):
            square = float(grad.square().mean())
            means[i] = past * means[i] + (1 - past) * square
            factor = 0.2 / math.sqrt(max(means[i] / 9, square))
            if limit and grad.dim() > 1:
                factor = min(factor, limit / lr / math.sqrt(3 * grad[0].numel() * square))
            torch.testing.assert_close(moved[i], -lr * factor * grad, rtol=1e-9, atol=0)


@HOSTS
def test_without_a_past_each_step_has_one_size(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    """Of a tensor without one beside others too."""
    monkeypatch.setattr(memory, "HOST", host)
    first, *others = parameters()
    groups = [{"params": [first], "rms_averaging": 0.0}, {"params": others}]
    optimizer = Thor(groups, lr=1.0, momentum=0.0, max_relative_step=None, preconditioner=Identity())
    sizes = []
    for grads in gradients(12):
        for p, grad in zip((first, *others), grads, strict=True):
            p.grad = grad.clone()
        before = [p.detach().clone() for p in (first, *others)]
        optimizer.step()
        moved = [p.detach() - old for p, old in zip((first, *others), before, strict=True)]
        sizes.append([float(one.square().mean().sqrt()) for one in moved])
    assert [size[0] for size in sizes] == pytest.approx([0.2] * 12, rel=1e-12)
    assert all(min(size) < 0.15 for size in zip(*(size[1:] for size in sizes), strict=True))


class Rescaled(Identity):
    """The identity times a power of a hundred that changes at every step, as curvature does when it is refreshed."""

    def precondition(self, grads: Any) -> Any:
        self.factor = getattr(self, "factor", 1e40) / 100
        return {p: self.factor * direction for p, direction in super().precondition(grads).items()}


@HOSTS
def test_a_change_of_the_curvatures_size_changes_no_step(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    """Gradients of 1, whose directions fall by a hundred in each step."""
    monkeypatch.setattr(memory, "HOST", host)
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Thor([p], lr=1.0, momentum=0.0, preconditioner=Rescaled())
    for _ in range(20):
        (moved,) = step(optimizer, [torch.ones(3, dtype=torch.float64)])
        torch.testing.assert_close(moved, torch.full_like(moved, -0.2), rtol=1e-12, atol=0)


@HOSTS
def test_behind_a_head_of_zeros_steps_keep_their_size(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    """The first gradient of the weights behind it is next to nothing, and the first curvature of it too."""
    monkeypatch.setattr(memory, "HOST", host)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    nn.init.zeros_(model[2].weight)
    curvature = Curvature(model, update_every_n_steps=10, stagger=True)
    optimizer = Thor(model.parameters(), lr=2e-3, preconditioner=curvature)
    centres, sizes = torch.randn(5, 20), []
    for _ in range(120):
        labels = torch.randint(5, (64,))
        nn.functional.cross_entropy(model(centres[labels] + torch.randn(64, 20)), labels).backward()
        before = model[0].weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(float((model[0].weight.detach() - before).square().mean().sqrt()))
    assert min(sizes[5:]) > 0.2 * 2e-3 * 0.2


@HOSTS
def test_one_batch_in_five_that_outweighs_the_others_decides(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    """Gradients of -1, and of 100 each fifth time: their mean is 19.2. Directions of one size go the other way."""
    monkeypatch.setattr(memory, "HOST", host)
    ends = {}
    for past in (0.0, 0.9):
        p = nn.Parameter(torch.zeros(3))
        optimizer = Thor([p], lr=0.01, rms_averaging=past, preconditioner=Identity())
        for n in range(200):
            step(optimizer, [torch.full((3,), 100.0 if n % 5 == 0 else -1.0)])
        ends[past] = float(p.detach().mean())
    # In five steps, with momentum, 3 of 0.02; or 4 of 0.06 over the root of the mean square, √2001, and one of 0.02.
    assert ends[0.0] == pytest.approx(40 * 3 * 0.02, rel=0.1)
    assert ends[0.9] == pytest.approx(40 * (4 * 3 / math.sqrt(2001) - 1) * 0.02, rel=0.1)


@HOSTS
def test_a_class_of_one_in_a_hundred_is_learnt(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    """With a hundred times the weight, batches of 50: the loss of balanced classes, which no guess has below 0.69."""
    monkeypatch.setattr(memory, "HOST", host)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = Thor(model.parameters(), preconditioner=Curvature(model))
    weight, generator = torch.tensor([1.0, 100.0]), torch.Generator().manual_seed(0)

    def loss(labels: Tensor) -> Tensor:
        x = torch.randn(len(labels), 20, generator=generator)
        x[:, :4] += 1.5 * labels[:, None]
        each = nn.functional.cross_entropy(model(x), labels, reduction="none")
        return (each * weight[labels]).mean() / 2

    for _ in range(300):
        optimizer.zero_grad()
        loss((torch.rand(50, generator=generator) < 0.01).long()).backward()
        optimizer.step()
    weight = torch.ones(2)
    with torch.no_grad():
        assert float(2 * loss(torch.arange(2000) % 2)) < 0.4


@HOSTS
def test_a_resumed_training_is_bitwise_the_unbroken_one(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    """Also where a parameter has a gradient in some steps only; and the state holds plain numbers on any device."""
    monkeypatch.setattr(memory, "HOST", host)
    grads: list[list[Tensor | None]] = [list(own) for own in gradients(9)]
    grads[1][2] = grads[6][0] = None
    unbroken, broken = (Thor(parameters(), preconditioner=Identity()) for _ in range(2))
    for own in grads:
        step(unbroken, own)
    for own in grads[:5]:
        step(broken, own)
    state = copy.deepcopy(broken.state_dict())
    assert all(type(own[MEAN_SQUARE]) is float for own in state["state"].values())
    resumed = Thor(copy.deepcopy(broken.param_groups[0]["params"]), preconditioner=Identity())
    resumed.load_state_dict(state)
    for own in grads[5:]:
        step(resumed, own)
        step(broken, own)
    for one in (resumed, broken):
        assert_bitwise(one.state_dict()["state"], unbroken.state_dict()["state"])
        assert_bitwise(one.param_groups[0]["params"], unbroken.param_groups[0]["params"])


@HOSTS
def test_a_state_dict_is_of_the_step_after_which_it_was_taken(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    """And what else the state holds, such as a note of the user's, goes with it."""
    monkeypatch.setattr(memory, "HOST", host)
    optimizer, grads = Thor(parameters(), preconditioner=Identity()), gradients(2)
    optimizer.state["note"] = 3  # type: ignore[index]
    step(optimizer, list(grads[0]))
    taken = optimizer.state_dict()["state"]
    before = copy.deepcopy(taken)
    step(optimizer, list(grads[1]))
    assert taken["note"] == 3
    for number in range(len(SHAPES)):
        assert taken[number][MEAN_SQUARE] == before[number][MEAN_SQUARE]
        assert optimizer.state_dict()["state"][number][MEAN_SQUARE] != before[number][MEAN_SQUARE]


@HOSTS
def test_a_state_that_was_moved_through_its_data_goes_on(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    """As programs that offload optimizers do; also of one parameter alone, whose number is at the same offset."""
    monkeypatch.setattr(memory, "HOST", host)
    for n_params in (1, 4):
        ends = []
        for moves in (False, True):
            optimizer = Thor(parameters()[:n_params], preconditioner=Identity())
            for own in gradients(6):
                step(optimizer, list(own[:n_params]))
                for state in optimizer.state.values():
                    if moves and isinstance(state[MEAN_SQUARE], Tensor):
                        state[MEAN_SQUARE].data = state[MEAN_SQUARE].data.clone()
            ends.append(copy.deepcopy(optimizer.state_dict()["state"]))
        assert_bitwise(ends[1], ends[0])


def test_a_state_goes_from_a_gpus_way_to_a_cpus_and_copies_and_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = gradients(6)
    ends = []
    for hosts in ([{"cpu"}] * 6, [set()] * 3 + [{"cpu"}] * 3, [{"cpu"}] * 3 + [set()] * 3):
        optimizer = Thor(parameters(), preconditioner=Identity())
        for host, own in zip(hosts, grads, strict=True):
            monkeypatch.setattr(memory, "HOST", host)
            step(optimizer, list(own))
            optimizer = copy.deepcopy(optimizer)
            optimizer.preconditioner = Identity()
        ends.append([p.detach() for p in optimizer.param_groups[0]["params"]])
    torch.testing.assert_close(ends[1:], [ends[0]] * 2, rtol=1e-12, atol=0)


def test_a_state_of_an_earlier_version_goes_on_with_steps_of_one_size() -> None:
    optimizer = Thor(parameters(), preconditioner=Identity())
    state = optimizer.state_dict()
    assert state["param_groups"][0].pop("rms_averaging") == 0.9
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["rms_averaging"] == 0.0
    step(optimizer, list(gradients(1)[0]))
    assert not any(MEAN_SQUARE in own for own in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("mode", ["polar", "adam"])
def test_modes_with_a_running_norm_or_none_of_their_own_keep_no_other(mode: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = Thor(model.parameters(), mode=mode, preconditioner=Curvature(model, mode=mode))
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    assert not any(MEAN_SQUARE in own for own in optimizer.state.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1", None, torch.ones(2)])
def test_a_damaged_running_norm_is_refused(value: Any) -> None:
    optimizer = Thor(parameters(), preconditioner=Identity())
    step(optimizer, list(gradients(1)[0]))
    state, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    state["state"][1][MEAN_SQUARE] = value
    with pytest.raises(ValueError, match=r"parameter 1 has .* for its exp_avg_mean_square"):
        optimizer.load_state_dict(state)
    assert_bitwise(optimizer.state_dict()["state"], before["state"])


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan, "0.9", None])
def test_it_lies_between_0_and_1(value: Any) -> None:
    with pytest.raises(ValueError, match="rms_averaging must"):
        Thor(parameters(), rms_averaging=value)


@HOSTS
@pytest.mark.parametrize("size", [0.0, 1e-300, 5e-324, 1e300, math.inf, math.nan])
def test_after_any_gradient_the_next_ones_move_again(
    monkeypatch: pytest.MonkeyPatch, host: set[str], size: float
) -> None:
    """At once after nothing, and after what has no size; after the largest ones when these are forgotten."""
    monkeypatch.setattr(memory, "HOST", host)
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Thor([p], lr=1.0, momentum=0.0, rms_averaging=0.5, preconditioner=Identity())
    step(optimizer, [torch.full((3,), size, dtype=torch.float64)])
    for n in range(1100):
        with torch.no_grad():
            p.zero_()
        optimizer.param_groups[0]["gradient_rms"] = 0.0  # that is another law: lightning_thor.optim.fading
        (moved,) = step(optimizer, [torch.full((3,), 2.0, dtype=torch.float64)])
        if n == 0 and (size < 1e-200 or not math.isfinite(size)):
            assert float(moved[0]) == pytest.approx(-0.2, rel=1e-9)
    assert float(moved[0]) == pytest.approx(-0.2, rel=1e-9)


@HOSTS
@pytest.mark.parametrize("n_before", [0, 3])
def test_what_has_no_size_ends_as_without_a_past(
    monkeypatch: pytest.MonkeyPatch, host: set[str], n_before: int
) -> None:
    """A NaN is one of the whole tensor; beside an infinity, whose step is none, other numbers stay."""
    monkeypatch.setattr(memory, "HOST", host)
    for past in (0.0, 0.9):
        for size, expected in ((math.nan, [math.nan] * 3), (math.inf, [0.0, 0.0, math.nan])):
            p = nn.Parameter(torch.zeros(3))
            optimizer = Thor([p], momentum=0.0, rms_averaging=past, preconditioner=Identity())
            for _ in range(n_before):
                step(optimizer, [torch.ones(3)])
            moved = step(optimizer, [torch.tensor([1.0, 2.0, size])])
            torch.testing.assert_close(moved[0], torch.tensor(expected), equal_nan=True)
