"""Laws of damaged and incomplete states: they are refused in words, and a refused one changes nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_thor import Curvature, Thor, ThorCallback
from tests.helpers.boring import Boring, assert_bitwise, trainer, without_words
from tests.helpers.models import Words

State = dict[str, Any]
NAN, INF = float("nan"), float("inf")

# Lightning 2.5 has no such argument.
WEIGHTS_ONLY: dict[str, Any] = {"weights_only": True} if "weights_only" in signature(L.Trainer.fit).parameters else {}


def trained(mode: Any = "natural", n_steps: int = 3) -> Curvature:
    torch.manual_seed(1)
    model = Words()
    curvature = Curvature(model, mode=mode, update_every_n_steps=2)
    optimizer = Thor(model.parameters(), mode=mode, preconditioner=curvature)
    for step in range(n_steps):
        model(torch.arange(6) * (step + 1) % 6).sin().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return curvature


def assert_refused(state: Any, message: str, mode: str = "natural") -> None:
    """By a curvature that has a state of its own, which stays as it is."""
    curvature = trained(mode, n_steps=1)
    before = copy.deepcopy(curvature.state_dict())
    with pytest.raises(ValueError, match=message) as refused:
        curvature.load_state_dict(state)
    assert re.search("Go on from another checkpoint|Use the model", str(refused.value))
    assert "deleting checkpoint['callbacks']['ThorCallback']" in str(refused.value)
    torch.testing.assert_close(
        without_words(curvature.state_dict()), without_words(before), rtol=0, atol=0, equal_nan=True
    )


def saved(mode: str = "natural") -> State:
    return copy.deepcopy(trained(mode).state_dict())


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
def test_a_sound_state_is_taken(mode: Any) -> None:
    curvature = trained(mode, n_steps=1)
    curvature.load_state_dict(saved(mode))
    assert_bitwise(without_words(curvature.state_dict()), without_words(trained(mode).state_dict()))


@pytest.mark.parametrize("key", ["step", "refreshes", "turns", "failed_inversions", "rejected_windows", "layers"])
def test_a_state_that_lacks_a_part_is_refused(key: str) -> None:
    state = saved()
    del state[key]
    assert_refused(state, f"damaged or incomplete: it has no {key}")


def test_a_state_of_before_there_were_modes_is_taken() -> None:
    state = saved()
    del state["mode"]
    curvature = trained(n_steps=1)
    curvature.load_state_dict(state)
    assert_bitwise(without_words(curvature.state_dict()), without_words(saved()))


@pytest.mark.parametrize(
    "damage",
    [
        {"step": -1},
        {"step": None},
        {"layers": [9], "decisions": [1]},
        {"layers": [-1], "decisions": [1]},
        {"layers": [0.0], "decisions": [1]},
        {"layers": (0,), "decisions": [1]},
        {"decisions": [1]},
        {"decisions": [1, 7]},
        {"decisions": [1, "1"]},
    ],
)
def test_pending_decisions_that_are_none_are_refused(damage: State) -> None:
    sound = {"step": 2, "layers": [0, 1], "decisions": [1, 2]}
    for one in (sound, list(sound.values())):  # the former is of former versions
        trained().load_state_dict(saved() | {"pending": [one]})
    for one in (sound | damage, list((sound | damage).values()), [2, [0]], 2, {}):
        assert_refused(saved() | {"pending": [one]}, "its pending decisions are none, but")


@pytest.mark.parametrize("costs", [None, [1.0], [1.0, NAN], [1.0, -1.0], [1, 1]])
def test_costs_of_refreshes_that_are_none_are_refused(costs: Any) -> None:
    trained().load_state_dict(saved() | {"refresh_costs": [1.0] * len(saved()["layers"])})
    assert_refused(saved() | {"refresh_costs": costs}, "its refresh_costs are no number of at least 0 for each layer")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", 1.5),
        ("step", True),
        ("step", None),
        ("refreshes", -3),
        ("turns", "4"),
        ("failed_inversions", torch.tensor(-1)),
        ("rejected_windows", torch.tensor(NAN)),
        ("rejected_windows", torch.zeros(2, dtype=torch.int64)),
        ("failed_inversions", torch.zeros((), dtype=torch.int64, device="meta")),
        ("turns", 10**30),
    ],
)
def test_counts_that_are_none_are_refused(key: str, value: Any) -> None:
    assert_refused(saved() | {key: value}, f"its {key} is no whole number of at least 0, but")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "it is a NoneType, not a dict"),
        ([1, 2], "it is a list, not a dict"),
        ({"layers": [1]}, "its layers are a list, not a dict"),
        ({"layers": {"out": 3}}, "layer 'out' is a int, not a dict"),
        ({"layers": {0: {}, "out": {}}}, "the name of a layer is 0, not a string"),
    ],
)
def test_what_is_no_state_is_refused(state: Any, message: str) -> None:
    assert_refused({**saved(), **state} if isinstance(state, dict) else state, message)


@pytest.mark.parametrize(
    "key",
    ["updates", "positions", "next_turn", "has_stopped", "A", "G", "A_added", "table_A", "table_G"],
)
def test_a_layer_that_lacks_a_tensor_is_refused(key: str) -> None:
    state = saved()
    del state["layers"]["out"][key]
    assert_refused(state, rf"out\.{key}: nothing in the checkpoint, \(.*\) here")


@pytest.mark.parametrize("value", [[1.0], 3, None, torch.zeros(5)])
@pytest.mark.parametrize("key", ["G", "G_inverse", "G_inverted", "updates"])
def test_a_tensor_of_another_type_or_shape_is_refused(key: str, value: Any) -> None:
    state = saved()
    state["layers"]["out"][key] = value
    assert_refused(state, rf"out\.{key}: .* in the checkpoint, \(.*\) here")


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("G", torch.int64),
        ("A_inverse", torch.bool),
        ("A_inverse", torch.complex64),
        ("G_inverted", torch.float32),
        ("next_turn", torch.float32),
        ("has_stopped", torch.int64),
    ],
)
def test_a_tensor_of_another_kind_of_numbers_is_refused(key: str, dtype: torch.dtype) -> None:
    state = saved()
    state["layers"]["out"][key] = state["layers"]["out"][key].to(dtype)
    assert_refused(state, f"{key} of layer 'out' is of {dtype}, not of")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("mode", "key"),
    [
        *(("natural", key) for key in ("A", "G", "A_inverse", "G_inverse", "A_added", "positions", "updates")),
        ("natural", "table_A"),
        ("natural", "table_G"),
        ("polar", "A_root"),
        ("adam", "A_eigenvectors"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_with_layer_and_factor(mode: str, key: str, value: float) -> None:
    state = saved(mode)
    state["layers"]["out"][key].view(-1)[-1] = value
    assert_refused(state, f"{key} of layer 'out' is not finite", mode)


@pytest.mark.parametrize("key", ["updates", "positions", "next_turn", "G_added"])
def test_negative_counts_of_a_layer_are_refused(key: str) -> None:
    state = saved()
    state["layers"]["norm"][key].fill_(-1)
    assert_refused(state, f"{key} of layer 'norm' is negative")


def test_of_many_faults_some_are_named() -> None:
    state = saved()
    for layer in state["layers"].values():
        layer["G"].fill_(NAN)
        layer["G_inverse"].fill_(NAN)
    message = "G of layer 'table' is not finite; G_inverse of layer 'table' is not.*and 3 more such faults"
    assert_refused(state, message)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "but got None"),
        ([], r"but got \[\]"),
        ({"block_size": 3}, r"but got a dict with \['block_size'\]"),
    ],
)
def test_a_callback_refuses_what_is_no_state_of_one(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"takes what ThorCallback.state_dict gave.*{message}.*start without"):
        ThorCallback().load_state_dict(state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda callbacks: callbacks.update(ThorCallback=[1]), r"but got \[1\]"),
        (lambda callbacks: callbacks["ThorCallback"].pop("curvature"), r"but got a dict with \['block_size'\]"),
        (lambda callbacks: callbacks["ThorCallback"]["curvature"].pop("turns"), "it has no turns"),
        (lambda callbacks: callbacks["ThorCallback"].update(curvature=5), "it is a int, not a dict"),
    ],
)
def test_a_fit_does_not_go_on_from_a_damaged_checkpoint(
    damage: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Boring())
    first.save_checkpoint(tmp_path / "sound.ckpt")
    checkpoint = torch.load(tmp_path / "sound.ckpt", weights_only=True)
    damage(checkpoint["callbacks"])
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    module = Boring()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module, ckpt_path=tmp_path / "damaged.ckpt", **WEIGHTS_ONLY)
    assert not any(m._forward_hooks for m in module.modules())
