"""torch's own laws for optimizers and schedulers, as its test database has them, hold for Thor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler

from lightning_thor import Thor
from tests.helpers.boring import assert_bitwise
from tests.helpers.preconditioners import Identity

database = pytest.importorskip("torch.testing._internal.common_optimizers", reason="it needs expecttest")
OF_SGD = next(info for info in database.optim_db if info.optim_cls is SGD)
OPTIONS = {"lr", "momentum", "nesterov", "weight_decay"}
"""Those that SGD and Thor share."""


def thor(params: Any, **options: Any) -> Thor:
    """Without curvature, and without what SGD does not have."""
    plain = {"lr": 1e-3, "momentum": 0.0, "nesterov": False, "match_rms": None, "max_relative_step": None}
    return Thor(params, **{**plain, "decoupled_weight_decay": False, "preconditioner": Identity(), **options})


def sgd(params: Any, **options: Any) -> SGD:
    return SGD(params, foreach=True, **options)


def steps(make: Callable[..., Any], schedules: list[Callable[[Any], Any]], **options: Any) -> list[list[Tensor]]:
    """Weights and learning rates of twelve steps of a small model in float64, with a group of its own for biases."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": [p for p in model.parameters() if p.ndim == 2]}, {"params": biases, "lr": 0.02}]
    optimizer = make(groups, **options)
    made = [schedule(optimizer) for schedule in schedules]
    found = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(torch.randn(7, 5, dtype=torch.float64)).square().mean()
        loss.backward()
        optimizer.step()
        for one in made:
            one.step(*[loss.detach()] if isinstance(one, lr_scheduler.ReduceLROnPlateau) else [])
        rates = torch.tensor([[group["lr"], group["momentum"]] for group in optimizer.param_groups])
        found.append([rates, *(p.detach().clone() for p in model.parameters())])
    return found


INPUTS = [one for one in OF_SGD.optim_inputs_func("cpu") if not isinstance(one.kwargs.get("lr"), Tensor)]


@pytest.mark.parametrize("given", INPUTS, ids=lambda one: one.desc.replace(" ", "_"))
def test_it_takes_the_steps_of_sgd_or_says_which_option_it_does_not_know(given: Any) -> None:
    if foreign := given.kwargs.keys() - OPTIONS:
        with pytest.raises(TypeError, match=f"Thor does not know {', '.join(sorted(foreign))}"):
            thor([nn.Parameter(torch.ones(2))], **given.kwargs)
    else:
        assert_bitwise(steps(thor, [], **given.kwargs), steps(sgd, [], **given.kwargs))


@pytest.mark.parametrize(
    "given", OF_SGD.optim_error_inputs_func("cpu", torch.float32), ids=lambda one: one.optimizer_error_input.desc
)
def test_it_refuses_what_sgd_refuses(given: Any) -> None:
    wrong = given.optimizer_error_input
    params = [nn.Parameter(torch.ones(2))] if wrong.params is None else wrong.params
    is_warning = issubclass(given.error_type, Warning)
    with pytest.warns(given.error_type) if is_warning else pytest.raises((given.error_type, ValueError, TypeError)):
        thor(params, **wrong.kwargs)


@pytest.mark.parametrize("number", range(len(OF_SGD.scheduler_inputs)))
def test_it_follows_the_schedules_with_which_torch_tests_sgd(number: int) -> None:
    schedules = list(OF_SGD.scheduler_inputs[number])
    assert_bitwise(steps(thor, schedules, lr=0.1), steps(sgd, schedules, lr=0.1))


EVERY: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 8),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 3),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 9),
}


@pytest.mark.parametrize("name", sorted({*lr_scheduler.__all__} - {"LRScheduler"}))
def test_every_scheduler_of_torch_steps_thor_as_it_steps_sgd(name: str) -> None:
    """Those that move the momentum too; one that a later torch adds has no entry here, and fails."""
    schedule = [EVERY[name]]
    assert_bitwise(steps(thor, schedule, momentum=0.9), steps(sgd, schedule, momentum=0.9))


def test_hooks_of_steps_and_states_are_called_as_torch_says() -> None:
    called: list[str] = []
    optimizer = thor([p := nn.Parameter(torch.ones(2))])
    optimizer.register_step_pre_hook(lambda *_: called.append("before the step"))
    optimizer.register_step_post_hook(lambda *_: called.append("after the step"))
    optimizer.register_state_dict_post_hook(lambda *_: called.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["before the step", "after the step", "saved", "loaded"]


def test_a_state_that_a_hook_replaced_is_the_one_that_is_loaded() -> None:
    """As one that goes by names where parameters have come into another order."""
    params = [nn.Parameter(torch.full((n,), float(n))) for n in (2, 3)]
    saved, loaded = (thor(some, mode="adam") for some in (params, params[::-1]))
    for p in params:
        saved.state[p].update(step=1, exp_avg=p.detach().clone(), exp_avg_sq=p.detach().square())
    loaded.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "state": dict(enumerate(reversed(state["state"].values())))}
    )
    loaded.load_state_dict(saved.state_dict())
    assert_bitwise([loaded.state[p] for p in params], [saved.state[p] for p in params])
