"""The arguments of the migration door: nn.thor's names, order, defaults and errors; settings per step; names."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_thor.mindspore.optimizer import thor
from lightning_thor.mindspore.param_groups import Named
from tests.helpers.boring import assert_bitwise, without_words


def grad_of(net: nn.Module, x: Tensor) -> None:
    net(x).square().sum(1).mean().backward()


def test_settings_per_step_hold_their_last_value_with_one_warning() -> None:
    net = nn.Linear(4, 3)
    optimizer = thor(net, [0.3, 0.2], torch.tensor([0.1, 0.2, 0.3]), 0.9)
    rates = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            grad_of(net, torch.randn(8, 4))
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.3, 0.2, 0.2, 0.2]
    told = [str(w.message) for w in caught]
    assert sum("learning_rate has 2 values, and this is step 2" in words for words in told) == 1
    assert sum("damping has 3 values, and this is step 3" in words for words in told) == 1


def test_a_scheduler_changes_a_single_rate_and_is_told_that_it_changes_no_other() -> None:
    rates: dict[str, list[float]] = {}
    for name, learning_rate in (("one", 0.5), ("per step", [0.5, 0.4, 0.3])):
        net = nn.Linear(4, 3)
        optimizer = thor(net, learning_rate, 0.1, 0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                before = net.weight.detach().clone()
                grad_of(net, torch.ones(8, 4))
                optimizer.step()
                rates.setdefault(name, []).append(optimizer.param_groups[0]["lr"])
                assert not net.weight.equal(before)
                scheduler.step()
        told = [str(w.message) for w in caught]
        assert sum("has set the learning rate to 0.05: it is lost" in words for words in told) == (name == "per step")
    assert rates == {"one": pytest.approx([0.5, 0.05, 0.005]), "per step": [0.5, 0.4, 0.3]}


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_a_grad_scaler_is_refused_and_a_later_step_without_it_goes_on(unscaled_before: bool) -> None:
    net = nn.Linear(4, 3)
    optimizer, scaler = thor(net, 0.3, 0.1, 0.9), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(net(torch.ones(8, 4)).sum()).backward()
    if unscaled_before:
        scaler.unscale_(optimizer)
    before = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match="takes no GradScaler"):
        scaler.step(optimizer)
    assert net.weight.equal(before)
    optimizer.step()
    assert not net.weight.equal(before)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    disabled.step(optimizer)


def test_a_state_that_is_refused_changes_nothing() -> None:
    """Neither half: the curvature's is loaded first, and the momenta of another grouping are refused after it."""

    def trained(seed: int) -> Any:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = thor(net, 0.3, 0.1, 0.9)
        grad_of(net, torch.randn(8, 4))
        optimizer.step()
        return optimizer

    optimizer = trained(0)
    before = copy.deepcopy(optimizer.state_dict())
    others = trained(1).state_dict()
    others["param_groups"] *= 2
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(others)
    assert_bitwise(without_words(optimizer.state_dict()), without_words(before))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_with_what_to_do(copied: Any) -> None:
    net = nn.Linear(4, 3)
    optimizer = thor(net, 0.3, 0.1, 0.9)
    with pytest.raises(TypeError, match=r"Save its state_dict\(\), and load it into the optimizer that thor\(net"):
        copied((net, optimizer))


def test_the_decay_filter_sees_names() -> None:
    """Qualified as of the network that was given, without what torch.compile adds, each once; frozen ones are not asked
    about."""
    seen: list[Named] = []
    frozen = nn.Linear(3, 3).requires_grad_(False)
    compiled = nn.Module()
    compiled._orig_mod = nn.Linear(4, 3)
    net = nn.Sequential(compiled, nn.LayerNorm(3), frozen)
    optimizer = thor(net, 0.1, 0.1, 0.9, weight_decay=0.5, decay_filter=lambda p: bool(seen.append(p)) or "0" in p.name)
    assert [p.name for p in seen] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(2, 0.5), (2, 0.0)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a number, a sequence or a Tensor.*got '0.1'"),
        ({"learning_rate": None}, TypeError, "learning_rate must be a number, .* got None"),
        ({"learning_rate": True}, TypeError, "learning_rate must be a number, .* got True"),
        ({"learning_rate": [0.1, "0.2"]}, TypeError, "learning_rate must hold numbers, got '0.2' for step 1"),
        ({"learning_rate": torch.ones(2, 3)}, ValueError, "learning_rate must have one dimension.* for step 0"),
        ({"learning_rate": []}, ValueError, r"learning_rate must have at least one value, got \[\]"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate must be 0 or greater at every step, got -0.1"),
        ({"learning_rate": [0.1, float("nan")]}, ValueError, "learning_rate must be 0 or greater.*got nan for step 1"),
        ({"damping": None}, TypeError, "damping must be a number, .*got None"),
        ({"momentum": 1}, TypeError, "momentum must be a float, got 1"),
        ({"momentum": True}, TypeError, "momentum must be a float, got True"),
        ({"loss_scale": 128}, TypeError, r"loss_scale must be a float, got 128 \(int\), as in nn.thor; write 128.0"),
        ({"loss_scale": "1"}, TypeError, "loss_scale must be a float, got '1'"),
        ({"weight_decay": "no"}, TypeError, "weight_decay must be a float or an int, got 'no'"),
        ({"batch_size": 8.0}, TypeError, "batch_size must be an int, got 8.0"),
        ({"use_nesterov": 1}, TypeError, "use_nesterov must be a bool, got 1"),
        ({"enable_clip_grad": None}, TypeError, "enable_clip_grad must be a bool, got None"),
        ({"decay_filter": True}, TypeError, "decay_filter must be a function .* got True"),
        ({"frequency": 10.0}, TypeError, "frequency must be an int, got 10.0"),
        ({"split_indices": [0.5]}, TypeError, r"split_indices must be a list of ints .* got \[0.5\]"),
        ({"net": [nn.Linear(2, 2)]}, TypeError, "net must be a torch.nn.Module, got .*params="),
        ({"loss_scale": 0.0}, ValueError, "loss_scale must be greater than 0, as in nn.thor, got 0.0"),
        ({"loss_scale": -1.0}, ValueError, "loss_scale must be greater than 0, as in nn.thor, got -1.0"),
        ({"weight_decay": -1e-3}, ValueError, "weight_decay must be 0 or greater, as in nn.thor, got -0.001"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be 0 or greater, as in nn.thor, got nan"),
        ({"momentum": -0.5}, ValueError, "momentum must be 0 or greater, as in nn.thor, got -0.5"),
        ({"momentum": 1.0}, ValueError, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"frequency": 1}, ValueError, "frequency must be at least 2, as in nn.thor, got 1"),
        ({"damping": [0.1, 0.0]}, ValueError, "damping must be greater than 0 at every step, got 0.0 for step 1"),
        (
            {"split_indices": [53, 26]},
            ValueError,
            r"split_indices must .* increase from 0 on, got \[53, 26\]",
        ),
        ({"variant": "tpu"}, ValueError, "variant must be 'gpu' or 'ascend', got 'tpu'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, as in nn.thor, got 0"),
    ],
)
def test_its_documented_errors_hold(options: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"net": nn.Linear(2, 2), "learning_rate": 0.1, "damping": 0.1, "momentum": 0.9}
    with pytest.raises(error, match=message):
        thor(**{**good, **options})


def test_its_signature_and_defaults_are_nn_thors() -> None:
    """The arguments that nn.thor has, in its order; what is ours comes after them."""
    parameters = inspect.signature(thor).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults.pop("decay_filter")(Named("bias")) is True
    required = dict.fromkeys(["net", "learning_rate", "damping", "momentum"], inspect.Parameter.empty)
    theirs = {"weight_decay": 0.0, "loss_scale": 1.0, "batch_size": 32, "use_nesterov": False}
    theirs |= {"split_indices": None, "enable_clip_grad": False, "frequency": 100}
    assert list(defaults.items()) == list((required | theirs | {"variant": "gpu", "params": None}).items())


@pytest.mark.parametrize("values", [[0.25, 0.5], (0.25, 0.5), torch.tensor([0.25, 0.5]), np.array([0.25, 0.5])])
def test_settings_per_step_come_as_sequences_tensors_or_arrays(values: Any) -> None:
    net = nn.Linear(4, 3)
    optimizer = thor(net, values, values, 0.9)
    for rate in (0.25, 0.5):
        grad_of(net, torch.randn(8, 4))
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == rate
    assert [optimizer.curvature.damping(step) for step in (0, 1)] == [0.25, 0.5]


@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25), np.float32(0.25), np.array(0.25)])
def test_a_single_number_holds_for_all_steps_without_a_warning(value: Any) -> None:
    net = nn.Linear(4, 3)
    optimizer = thor(net, value, value, 0.0, use_nesterov=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            grad_of(net, torch.randn(8, 4))
            optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
