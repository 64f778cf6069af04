"""Laws of layers that get curvature in mid-run: they are due at once, and all others go on as if nothing had been."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, configure_thor
from lightning_thor.curvature.refresh_schedule import NEVER
from tests.helpers.boring import assert_bitwise, without_words

Parts = tuple[nn.Sequential, Thor, Curvature]
OPTIONS: dict[str, dict[str, Any]] = {
    "natural": {"damping_rule": "pi"},
    "with biases": {"precondition_bias": True},
    "polar": {},
    "adam": {},
    "staggered": {"stagger": True, "update_every_n_steps": 3},
    "probed": {"trace_rule": (0.01, 0.0)},
    "stopping, staggered": {"trace_rule": (0.3, 0.2), "stagger": True, "update_every_n_steps": 3},
}
BACKBONE = ("0", "2")


def parts(name: str = "natural", freeze: bool = True, **options: Any) -> Parts:
    """A backbone of a convolution and a linear layer, frozen, and a head of a norm and two linear layers."""
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 3)
    )
    backbone(model).requires_grad_(not freeze)
    mode = name if name in ("polar", "adam") else "natural"
    curvature = Curvature(
        model,
        mode=mode,
        block_size=3,
        parameters=[p for p in model.parameters() if p.requires_grad],
        **{"update_every_n_steps": 2, **OPTIONS[name], **options},
    )
    return model, configure_thor(model, lr=0.01, mode=mode, preconditioner=curvature), curvature


def backbone(model: nn.Sequential) -> nn.Module:
    return model[:3]


def unfreeze(model: nn.Sequential, optimizer: Thor, curvature: Curvature) -> list[str]:
    further = list(backbone(model).requires_grad_(True).parameters())
    optimizer.add_param_group({"params": further, "lr": 0.005})
    return curvature.include(further)


def train(model: nn.Module, optimizer: Thor, steps: range, scale: float = 1.0) -> None:
    for step in steps:
        x = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(step))
        (scale * model(x).sin().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: Thor, curvature: Curvature) -> Any:
    state = optimizer.state_dict()
    options = [(group["params"], group["lr"], group["gradient_rms"]) for group in state["param_groups"]]
    return copy.deepcopy([model.state_dict(), state["state"], options, without_words(curvature.state_dict())])


@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("name", OPTIONS)
def test_layers_that_are_included_are_observed_and_inverted_at_once(name: str, scale: float) -> None:
    """As a curvature of the whole model would at its first step, where the loss is not so small that it has a unit."""
    model, optimizer, curvature = parts(name)
    train(model, optimizer, range(3), scale)
    assert unfreeze(model, optimizer, curvature) == list(BACKBONE)
    reference = copy.deepcopy(model)
    fresh = Curvature(reference, mode=curvature.mode, block_size=3, **{**OPTIONS[name], "trace_rule": None})
    train(model, optimizer, range(3, 4), scale)
    train(reference, configure_thor(reference, mode=curvature.mode, preconditioner=fresh), range(3, 4), scale)
    assert fresh.gradient_unit == curvature.gradient_unit
    for layer in BACKBONE:
        found, wanted = (one.state_dict()["layers"][layer] for one in (curvature, fresh))
        torch.testing.assert_close([found["A"], found["G"]], [wanted["A"], wanted["G"]])
        if curvature._trace_rule is None:
            torch.testing.assert_close(curvature.inverses_of(layer), fresh.inverses_of(layer), rtol=1e-3, atol=1e-3)
    train(model, optimizer, range(4, 6))
    for layer in BACKBONE:
        assert all(blocks.any() for blocks in curvature.state_dict()["layers"][layer].values() if blocks.dim() > 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_all_others_go_on_as_they_are(name: str) -> None:
    """Their state after the inclusion is bitwise that before it, the counts included."""
    model, optimizer, curvature = parts(name)
    train(model, optimizer, range(4))
    before = copy.deepcopy(curvature.state_dict())
    unfreeze(model, optimizer, curvature)
    after = curvature.state_dict()
    assert list(after["layers"]) == ["0", "2", "3", "5", "6"]
    spread = {"next_turn"} if curvature._schedule.stagger else set()
    for layer, tensors in before["layers"].items():
        own = after["layers"][layer]
        assert_bitwise(
            {k: own[k] for k in tensors if k not in spread}, {k: tensors[k] for k in tensors if k not in spread}
        )
    assert_bitwise(
        [after[key] for key in ("step", "refreshes", "turns")], [before[key] for key in ("step", "refreshes", "turns")]
    )
    assert curvature.last_damping == 0.2


@pytest.mark.parametrize("saved_after", [4, 5, 6, 8])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_training_is_bitwise_the_unbroken_one(name: str, saved_after: int) -> None:
    """Before and after the layers are unfrozen, at step 5. After it they are frozen when the state is loaded."""
    unbroken, resumed = parts(name), parts(name)

    def run(three: Parts, steps: range) -> None:
        for step in steps:
            if step == 5:
                unfreeze(*three)
            train(*three[:2], range(step, step + 1))

    run(unbroken, range(saved_after))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in unbroken], file)
    run(unbroken, range(saved_after, 10))
    file.seek(0)
    weights, momenta, state = torch.load(file, weights_only=True)
    resumed[0].load_state_dict(weights)
    resumed[2].load_state_dict(state)
    if saved_after > 5:
        assert set(resumed[2].layers) == {"0", "2", "3", "5", "6"}
        unfreeze(*resumed)
    resumed[1].load_state_dict(momenta)
    run(resumed, range(saved_after, 10))
    assert_bitwise(state_of(*resumed), state_of(*unbroken))


@pytest.mark.parametrize("name", ["natural", "adam"])
def test_a_copy_goes_on_as_the_original(name: str) -> None:
    originals = parts(name)
    train(*originals[:2], range(3))
    unfreeze(*originals)
    copied = copy.deepcopy(originals)
    for three in (originals, copied):
        train(*three[:2], range(3, 7))
    assert_bitwise(state_of(*copied), state_of(*originals))


def test_without_a_choice_of_parameters_all_that_train_are_included() -> None:
    model, _, _ = parts()
    curvature = Curvature(model)
    assert curvature.include() == []
    model[2].requires_grad_(True)
    assert curvature.include() == ["2"]
    assert curvature.left_out["0"] == "frozen"


def test_a_layer_that_was_frozen_since_stays_one() -> None:
    model, optimizer, curvature = parts()
    model[5].requires_grad_(False)
    unfreeze(model, optimizer, curvature)
    assert list(curvature.layers) == ["0", "2", "3", "5", "6"]
    assert not model[5].weight.requires_grad


def test_a_layer_whose_bias_begins_to_train_is_a_new_one() -> None:
    model, optimizer, curvature = parts("with biases", freeze=False)
    model[2].bias.requires_grad_(False)
    curvature = optimizer.preconditioner = Curvature(model, block_size=3, precondition_bias=True)
    train(model, optimizer, range(2))
    model[2].bias.requires_grad_(True)
    assert curvature.include() == ["2"]
    assert curvature.layers["2"].with_bias
    assert [int(layer["updates"]) for layer in curvature.state_dict()["layers"].values()] == [2, 0, 2, 2, 2]
    train(model, optimizer, range(2, 3))


def test_a_layer_that_was_found_not_to_fit_stays_left_out() -> None:
    model, optimizer, curvature = parts()
    train(model, optimizer, range(2))
    curvature._leave_out(1, "found so")
    unfreeze(model, optimizer, curvature)
    assert curvature.left_out["5"] == "found so"
    assert curvature.state_dict()["layers"]["5"]["next_turn"] == NEVER
    before: Tensor = curvature.state_dict()["layers"]["5"]["A"].clone()
    train(model, optimizer, range(2, 5))
    assert_bitwise(curvature.state_dict()["layers"]["5"]["A"], before)


def test_a_closed_curvature_stays_closed() -> None:
    model, optimizer, curvature = parts()
    curvature.close()
    unfreeze(model, optimizer, curvature)
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_not_doubled() -> None:
    model, optimizer, curvature = parts()
    unfreeze(model, optimizer, curvature)
    assert [len(module._forward_hooks) for module in model] == [1, 0, 1, 1, 0, 1, 1]
    curvature.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_begin_to_train_unseen_are_told_of_once() -> None:
    """In a plain loop nobody includes them but the user."""
    model = backbone(parts()[0]).requires_grad_(False)
    model.append(nn.Linear(8, 3))
    curvature = Curvature(model, update_every_n_steps=1)
    optimizer, x = Thor(model.parameters(), preconditioner=curvature), torch.randn(5, 2, 6)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
        model[2].requires_grad_(True)
        with pytest.warns(UserWarning, match=r"^2: frozen when Curvature was built.*curvature\.include\(\)"):
            step()
        step()
        assert curvature.include() == ["2"]
        step()


def test_layers_that_keep_a_gradient_of_before_they_were_frozen_are_not_told_of() -> None:
    body, head, x = backbone(parts(freeze=False)[0]), nn.Linear(8, 3), torch.randn(5, 2, 6)
    model = nn.Sequential(body, head)
    model(x).sum().backward()  # of another training
    body.requires_grad_(False)
    optimizer = Thor(head.parameters(), preconditioner=Curvature(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()


@pytest.mark.parametrize(
    "module",
    [nn.LSTM(8, 8), nn.ParameterDict({"x": nn.Parameter(torch.ones(8, 8))}), nn.MultiheadAttention(8, 2), nn.PReLU()],
    ids=lambda module: type(module).__name__,
)
def test_frozen_modules_of_any_kind_are_left_out(module: nn.Module) -> None:
    model = nn.ModuleList([nn.Linear(8, 8), module.requires_grad_(False)])
    curvature = Curvature(model)
    assert list(curvature.layers) == ["0"]
    assert set(curvature.left_out.values()) == {"frozen"}
