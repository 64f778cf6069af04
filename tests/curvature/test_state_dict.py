"""Laws of a curvature's state: its form is that of the configuration, whenever it is taken."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_thor import Curvature, Thor
from tests.helpers.boring import assert_bitwise, without_words
from tests.helpers.models import Words

N_STEPS = 5
RULE = {"trace_rule": (0.5, 0.01)}


def states(mode: Any = "natural", **options: Any) -> tuple[Curvature, list[dict[str, Any]]]:
    """A curvature, and copies of its state before the first and after each step."""
    torch.manual_seed(1)
    model = Words()
    curvature = Curvature(model, mode=mode, update_every_n_steps=2, **options)
    optimizer = Thor(model.parameters(), mode=mode, preconditioner=curvature)
    found = [copy.deepcopy(curvature.state_dict())]
    for step in range(N_STEPS):
        model(torch.arange(6) * (step + 1) % 6).sin().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(copy.deepcopy(curvature.state_dict()))
    return curvature, found


@pytest.mark.parametrize(
    "options", [{}, {"mode": "polar"}, {"mode": "adam"}, RULE, {"stagger": True}, {**RULE, "stagger": True}]
)
def test_all_states_of_a_configuration_have_the_same_keys(options: dict[str, Any]) -> None:
    """As torch.distributed.checkpoint flattens them: it loads a state into one that has the same."""
    _, found = states(**options)
    first, *others = [flatten_state_dict(state)[0].keys() for state in found]
    assert others == [first] * N_STEPS


def test_a_state_with_pending_decisions_and_one_without_are_loaded_into_each_other(tmp_path: Path) -> None:
    curvature, found = states(**RULE)
    assert {len(state["pending"]) for state in found} == {0, 1}
    for number, state in enumerate(found):
        save({"curvature": state}, checkpoint_id=tmp_path / str(number))
    for number, state in enumerate(found):
        other = {"curvature": curvature.state_dict()}
        load(other, checkpoint_id=tmp_path / str(number))
        curvature.load_state_dict(other["curvature"])
        assert_bitwise(without_words(curvature.state_dict()), without_words(state))


def test_pending_decisions_of_former_versions_are_taken() -> None:
    """They were dicts."""
    curvature, found = states(**RULE)
    (state,) = [state for state in found[3:4] if state["pending"]]
    ((step, layers, decisions),) = state["pending"]
    former = {"step": step, "layers": layers, "decisions": decisions}
    curvature.load_state_dict(state | {"pending": [former]})
    assert_bitwise(without_words(curvature.state_dict()), without_words(state))


def wrapping(wraps: bool, state: Any = None) -> tuple[Any, list[torch.Tensor]]:
    """A short training of a model, of which a part may be in torch's ``checkpoint_wrapper``: state and weights."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3))
    if wraps:
        model[0] = checkpoint_wrapper(model[0])  # type: ignore[no-untyped-call]
    curvature = Curvature(model, update_every_n_steps=2)
    optimizer = Thor(model.parameters(), preconditioner=curvature)
    parts = model, optimizer, curvature
    for part, saved in zip(parts, copy.deepcopy(state) or (), strict=False):
        part.load_state_dict(saved)  # type: ignore[attr-defined]
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return copy.deepcopy([part.state_dict() for part in parts]), list(model.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("wraps", [True, False])
def test_a_state_goes_on_where_activations_are_checkpointed_by_a_wrapper_and_where_they_are_not(wraps: bool) -> None:
    """The weights have the same names in both."""
    state, _ = wrapping(not wraps)
    assert_bitwise(wrapping(wraps, state)[1], wrapping(not wraps, state)[1])
    assert list(state[2]["layers"]) == ["0.0", "1"]


def test_a_state_of_a_version_that_took_a_wrappers_names_goes_on() -> None:
    state, _ = wrapping(True)
    own = state[2]
    former = {**own, "loss_layer": "0._checkpoint_wrapped_module.0"}
    former["layers"] = {
        name.replace("0.0", "0._checkpoint_wrapped_module.0"): one for name, one in own["layers"].items()
    }
    assert_bitwise(wrapping(True, [*state[:2], former])[1], wrapping(True, state)[1])
