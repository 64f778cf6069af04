"""configure_thor: groups, errors, and the numbers of parameters in a state."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lightning_thor import Curvature, ShardedCurvature, Thor, ThorCallback, configure_thor
from tests.helpers.boring import assert_bitwise


def test_biases_and_norms_do_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Embedding(3, 2), nn.Linear(2, 2))
    decayed, plain = configure_thor(model, lr=0.02, weight_decay=0.1, momentum=0.8).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[i].weight) for i in (0, 2, 3)}
    assert len(plain["params"]) == 4
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {decayed["lr"], plain["lr"]} == {0.02}
    assert {decayed["momentum"], plain["momentum"]} == {0.8}


def test_a_norm_over_two_dimensions_does_not_decay_either() -> None:
    model = nn.Sequential(nn.LayerNorm((4, 4)), nn.Linear(4, 4, bias=False))
    decayed, plain = configure_thor(model, weight_decay=0.1).param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 4)]
    assert decayed["params"][0] is model[1].weight
    assert len(plain["params"]) == 2


def test_a_group_that_is_added_later_decays_too_unless_it_says_otherwise() -> None:
    optimizer = configure_thor(nn.Linear(2, 2), weight_decay=0.1)
    optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    optimizer.add_param_group({"params": nn.Linear(2, 2).parameters(), "weight_decay": 0.0})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[0].requires_grad_(False)
    (group,) = configure_thor(model).param_groups
    assert group["params"] == [model[1].weight]


def test_nothing_to_train_is_told() -> None:
    with pytest.raises(ValueError, match="Linear has no parameter with requires_grad=True"):
        configure_thor(nn.Linear(2, 2).requires_grad_(False))


FOREIGN = [
    ({"betas": (0.9, 0.99)}, r'does not know betas\. .*momentum.*mode="adam", beta2'),
    ({"damping": 0.1}, r"does not know damping\. .*options of ThorCallback"),
    (
        {"strategy": "thor_ddp"},
        r"does not know strategy\. .*A strategy is an option of the Trainer: Trainer\(strategy=",
    ),
    ({"weight_deacy": 0.1, "foo": 1}, r"does not know foo, weight_deacy \(weight_decay\?\)"),
]
SETS_IT = "preconditioner must be a Curvature.*Under a Trainer leave it out: ThorCallback sets it"
WRONG_CALLS: list[tuple[Any, str]] = [
    (lambda model: configure_thor(model.parameters()), r"takes the module itself.*got a generator"),
    (lambda model: configure_thor(type(model)), r"takes the module itself.*got a type"),
    (lambda model: Thor(model), r"takes parameters, got a Linear: write configure_thor\(model"),
    *((lambda model, o=options: configure_thor(model, **o), words) for options, words in FOREIGN),
    *((lambda model, o=options: Thor(model.parameters(), **o), words) for options, words in FOREIGN),
    (lambda model: configure_thor(model, preconditioner=ThorCallback()), SETS_IT),
    (lambda model: Thor(model.parameters(), preconditioner="auto"), SETS_IT),
    (lambda model: Thor(model.parameters(), preconditioner=model), r"must be a Curvature\(model\), got a Linear"),
    (lambda model: Curvature(model.parameters()), r"takes the model, Curvature\(model, ...\), got a generator"),
    (lambda model: ShardedCurvature(model), r"ShardedCurvature\(Curvature\(model\)\), got a Linear"),
    (lambda model: ThorCallback(output_layer="0"), r"takes no output_layer, which it finds by itself"),
    (lambda model: ThorCallback(lr=0.1), r"does not know lr\. .*options of the optimizer: configure_thor\(self"),
    (
        lambda model: ThorCallback(strategy="thor_ddp"),
        r"does not know strategy\. .*A strategy is an option of the Trainer: Trainer\(strategy=",
    ),
    (lambda model: ThorCallback(update_every_n_step=5), r"update_every_n_step \(update_every_n_steps\?\)"),
]


@pytest.mark.parametrize(("call", "words"), WRONG_CALLS)
def test_a_wrong_call_is_told_what_was_meant(call: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        call(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", [ThorCallback, lambda **options: Curvature(nn.Linear(2, 2), **options)])
@pytest.mark.parametrize("value", ["Auto", "64", 0, 64.0])
def test_a_block_size_of_another_kind_is_told_which_there_are(kind: Any, value: Any) -> None:
    words = rf'block_size must be an int of at least 1, None .* or "auto" \(ThorCallback\), got {value!r}'
    with pytest.raises(ValueError, match=words):
        kind(block_size=value)


def make_momenta(optimizer: Thor) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


class Identity:
    def update(self) -> None:
        pass

    def precondition(self, grads: Any) -> Any:
        return {p: grad.clone() for p, grad in grads.items()}


def frozen_in_the_middle() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    model[1].requires_grad_(False)
    return model


def test_states_have_the_numbers_that_parameters_have_in_the_module() -> None:
    """Frozen ones included: as Lightning takes them, where a checkpoint goes on in a sharded model."""
    model = frozen_in_the_middle()
    optimizer = configure_thor(model, weight_decay=0.1, preconditioner=Identity())
    make_momenta(optimizer)
    state, params = optimizer.state_dict(), list(model.parameters())
    assert [group["params"] for group in state["param_groups"]] == [[0, 4], [1, 5]]
    assert state["state"].keys() == {0, 1, 4, 5}
    for number, one in state["state"].items():
        assert one["momentum_buffer"] is optimizer.state[params[number]]["momentum_buffer"]


def test_without_the_module_numbers_are_torchs() -> None:
    model = frozen_in_the_middle()
    optimizer = Thor([{"params": [model[2].weight, model[0].weight]}, {"params": [model[0].bias]}])
    assert [group["params"] for group in optimizer.state_dict()["param_groups"]] == [[0, 1], [2]]
    optimizer.preconditioner = Curvature(model)  # which knows it
    assert [group["params"] for group in optimizer.state_dict()["param_groups"]] == [[4, 0], [1]]
    optimizer.numbered = tuple(model[0].parameters())  # has not all of them
    assert [group["params"] for group in optimizer.state_dict()["param_groups"]] == [[0, 1], [2]]
    optimizer.numbered = None
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "param_groups": [{"params": ["a", "b", "c"]}]})
    assert optimizer.state_dict()["param_groups"] == [{"params": ["a", "b", "c"]}]


@pytest.mark.parametrize("numbers", [[[0, 1], [2, 3]], [[3, 2], [1, 0]], [[10, 40], [7, 8]]])
def test_numbers_mean_nothing_when_a_state_is_taken_over(numbers: list[list[int]]) -> None:
    models = [frozen_in_the_middle() for _ in range(2)]
    optimizers = [configure_thor(model, preconditioner=Identity()) for model in models]
    make_momenta(optimizers[0])
    state = optimizers[0].state_dict()
    renamed = dict(zip([0, 4, 1, 5], numbers[0] + numbers[1], strict=True))
    for group, own in zip(state["param_groups"], numbers, strict=True):
        group["params"] = own
    state["state"] = {renamed[number]: one for number, one in state["state"].items()}
    optimizers[1].load_state_dict(state)
    for p, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_bitwise(optimizers[1].state.get(other), optimizers[0].state.get(p))


class OfOnesOwn(Thor):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict()}


@pytest.mark.parametrize("kind", [Thor, OfOnesOwn])
def test_torchs_distributed_checkpoints_find_each_momentum_by_its_name(kind: type[Thor]) -> None:
    """They take the numbers for torch's own."""
    model = frozen_in_the_middle()
    optimizer = configure_thor(model, weight_decay=0.1, preconditioner=Identity())
    optimizer.__class__ = kind
    make_momenta(optimizer)
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert state[name]["momentum_buffer"] is optimizer.state[p]["momentum_buffer"]


@pytest.mark.parametrize("options", [{}, {"mode": "polar"}, {"momentum": 0.0, "rms_averaging": 0.0}])
def test_torchs_distributed_checkpoints_make_missing_state_without_a_step(options: dict[str, Any]) -> None:
    """They take one to save or restore an optimizer without state: the curvature would count it."""
    x = torch.randn(5, 4)
    ends = []
    for restores in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        curvature = Curvature(model, mode=options.get("mode", "natural"))
        optimizer = Thor(model.parameters(), preconditioner=curvature, **options)
        if restores:
            state = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(model, optimizer, state)
            assert curvature.step == 0
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert curvature.step == 3
        ends.append(optimizer.state_dict()["state"])
        ends.append(list(model.parameters()))
    assert_bitwise(ends[2:], ends[:2])


def test_the_module_is_not_in_a_pickled_optimizer() -> None:
    module = nn.Linear(2, 2)
    module.not_to_be_pickled = lambda: None
    restored = pickle.loads(pickle.dumps(configure_thor(module)))
    assert restored.numbered is None
    assert [group["params"] for group in restored.state_dict()["param_groups"]] == [[0], [1]]
