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
