"""Laws of copies and of resumed trainings: both go on as the original, and copies leave it alone."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, configure_thor
from lightning_thor.optim.thor import Preconditioner
from lightning_thor.schedules import GrowingInterval
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, trainer, without_words
from tests.helpers.models import Words

Parts = tuple[nn.Module, Thor, Curvature]


class Net(Words):
    """With a norm over images, an attention, and dropout of nothing."""

    def __init__(self) -> None:
        torch.manual_seed(6)
        super().__init__()
        self.conv, self.norms = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.norms(self.conv(x.mT)).mT
        logits: Tensor = self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))
        return logits


OPTIONS: dict[str, dict[str, Any]] = {
    "natural": {"precondition_bias": True},
    "polar": {},
    "adam": {},
    "staggered": {"stagger": True, "update_every_n_steps": 3},
    "probed": {"trace_rule": (0.01, 0.0)},
    "stopping": {"trace_rule": (0.3, 0.2)},
    "stopping, staggered": {"trace_rule": (0.3, 0.2), "stagger": True, "update_every_n_steps": 3},
    "staggered, growing": {"stagger": True, "update_every_n_steps": GrowingInterval(start=1, end=3, growth=0.4)},
    "a growing interval": {"update_every_n_steps": GrowingInterval(start=1, end=3), "damping_rule": "pi"},
}


def parts(name: str = "natural", dtype: torch.dtype = torch.float32) -> Parts:
    model = Net().to(dtype)
    mode = name if name in ("polar", "adam") else "natural"
    options = {"update_every_n_steps": 2, **OPTIONS[name]}
    curvature = Curvature(model, mode=mode, block_size=3, **options)
    optimizer = configure_thor(model, lr=0.01, weight_decay=0.1, mode=mode, preconditioner=curvature)
    return model, optimizer, curvature


def backward(model: nn.Module, step: int, scale: float = 1.0) -> None:
    tokens = torch.randint(6, (5, 7), generator=torch.Generator().manual_seed(step))
    (model(tokens).sin().square().mean() * scale).backward()


def train(model: nn.Module, optimizer: Thor, steps: range, scale: float = 1.0) -> None:
    for step in steps:
        backward(model, step, scale)
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: Thor, curvature: Preconditioner | None) -> Any:
    assert isinstance(curvature, Curvature)
    return copy.deepcopy([model.state_dict(), optimizer.state_dict(), without_words(curvature.state_dict())])


def assert_same(one: Any, other: Any) -> None:
    assert_bitwise(without_words(one), without_words(other))


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@functools.cache
def unbroken_training(name: str, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Any, list[bytes]]:
    """The state after 9 steps, and what was saved after each number of steps before; saving changes nothing."""
    whole, files = parts(name, dtype), []
    for step in range(9):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in whole], file)
        files.append(file.getvalue())
        train(*whole[:2], range(step, step + 1), scale)
    return state_of(*whole), files


ORDERS = ((2, 1, 0), (0, 1, 2), (1, 2, 0))


@pytest.mark.parametrize(
    ("name", "order"), [(name, order) for name in OPTIONS for order in ORDERS[: 3 if name == "natural" else 1]]
)
@pytest.mark.parametrize("n_before", [0, 4])
def test_copies_train_on_as_the_originals_which_they_leave_alone(
    name: str, order: tuple[int, int, int], n_before: int
) -> None:
    unbroken, _ = unbroken_training(name)
    originals = parts(name)
    train(*originals[:2], range(n_before))
    before = state_of(*originals)
    shuffled = copy.deepcopy(tuple(originals[index] for index in order))
    copied: Any = tuple(shuffled[order.index(index)] for index in range(3))
    assert copied[1].preconditioner is copied[2] is not originals[2]
    assert copied[2].model is copied[0] is not originals[0]
    train(*copied[:2], range(n_before, 9))
    assert_same(state_of(*copied), unbroken)
    assert_same(state_of(*originals), before)
    train(*originals[:2], range(n_before, 9))
    assert_same(state_of(*originals), unbroken)
    assert hooks_of(copied[0]) == hooks_of(originals[0])


def resumed(name: str, saved_after: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Any:
    """The state after 9 steps of which the first ``saved_after`` were taken before a file was written and read."""
    _, files = unbroken_training(name, dtype, scale)
    fresh = parts(name, dtype)
    saved = torch.load(io.BytesIO(files[saved_after]), weights_only=True)
    for part, state in zip(fresh, saved, strict=True):
        part.load_state_dict(state)
    train(*fresh[:2], range(saved_after, 9), scale)
    return state_of(*fresh)


@pytest.mark.parametrize("saved_after", range(1, 9))
@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_training_is_bitwise_the_unbroken_one(name: str, saved_after: int) -> None:
    """Also between two refreshes, between a decision and the inversion that follows it, and after a layer stopped."""
    unbroken, _ = unbroken_training(name)
    assert_same(resumed(name, saved_after), unbroken)
    assert any(bool(layer["has_stopped"]) for layer in unbroken[2]["layers"].values()) == name.startswith("stopping")


@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["natural", "polar", "adam"])
def test_so_it_is_in_any_precision_and_for_a_loss_of_any_scale(name: str, dtype: torch.dtype, scale: float) -> None:
    """In half precision too, where moments of the adam mode have more digits than weights."""
    assert_same(resumed(name, 3, dtype, scale), unbroken_training(name, dtype, scale)[0])


def test_a_copy_between_micro_batches_has_those_that_were_seen() -> None:
    unbroken, originals = parts(), parts()
    for model in (unbroken[0], originals[0]):
        backward(model, 0)
    copied = copy.deepcopy(originals)
    for p, own in zip(copied[0].parameters(), originals[0].parameters(), strict=True):
        p.grad = own.grad.clone()  # of which torch makes no copies
    for three in (unbroken, copied):
        train(*three[:2], range(1, 4))
    assert_same(state_of(*copied), state_of(*unbroken))


@pytest.mark.parametrize("name", ["natural", "polar"])
def test_layers_that_were_frozen_since_stay_layers_of_the_copy(name: str) -> None:
    originals = parts(name)
    train(*originals[:2], range(2))
    for module in (originals[0].conv, originals[0].norm):
        module.requires_grad_(False)
    copied = copy.deepcopy(originals)
    assert list(copied[2].layers) == list(originals[2].layers)
    assert [p.requires_grad for p in copied[0].parameters()] == [p.requires_grad for p in originals[0].parameters()]
    for three in (originals, copied):
        train(*three[:2], range(2, 6))
    assert_same(state_of(*copied), state_of(*originals))


def test_what_was_left_out_is_left_out_of_the_copy() -> None:
    model = Net()
    model.conv.requires_grad_(False)
    curvature = Curvature(model, parameters=[p for p in model.parameters() if p is not model.norm.weight])
    model.conv.requires_grad_(True)
    copied = copy.deepcopy(curvature)
    assert list(copied.layers) == list(curvature.layers)
    assert copied.left_out == curvature.left_out
    assert copied.left_out["conv"] == "frozen"


def test_a_copy_of_a_curvature_alone_has_a_model_of_its_own() -> None:
    model, optimizer, curvature = parts()
    train(model, optimizer, range(3))
    copied = copy.deepcopy(curvature)
    assert copied.model is not model
    before = state_of(model, optimizer, curvature)
    train(copied.model, configure_thor(copied.model, preconditioner=copied), range(3))
    assert copied.step == 6
    assert_same(state_of(model, optimizer, curvature), before)


def test_a_copy_of_an_optimizer_alone_has_a_curvature_and_a_model_of_its_own() -> None:
    originals = parts()
    train(*originals[:2], range(3))
    copied = copy.deepcopy(originals[1])
    curvature = copied.preconditioner
    assert isinstance(curvature, Curvature)
    assert curvature is not originals[2]
    own = {id(p) for p in curvature.model.parameters()}
    assert own == {id(p) for group in copied.param_groups for p in group["params"]}
    for model, optimizer in ((curvature.model, copied), originals[:2]):
        train(model, optimizer, range(3, 7))
    assert_same(state_of(curvature.model, copied, curvature), state_of(*originals))


def test_a_copy_of_the_model_alone_is_silent_and_leaves_the_originals_alone() -> None:
    """As SWA and EMA make it."""
    unbroken, originals = parts(), parts()
    train(*unbroken[:2], range(4))
    train(*originals[:2], range(2))
    twin = copy.deepcopy(originals[0])
    backward(twin, 7)
    train(*originals[:2], range(2, 4))
    assert_same(state_of(*originals), state_of(*unbroken))


def test_a_model_that_holds_its_optimizer_and_curvature_can_be_copied() -> None:
    model, optimizer, curvature = parts()
    model.held = optimizer, curvature
    train(model, optimizer, range(2))
    twin: Any = copy.deepcopy(model)
    backward(twin, 7)
    twin_optimizer, twin_curvature = twin.held
    assert twin_optimizer.preconditioner is None
    assert twin_curvature.model is twin
    assert not curvature.factors.flat_sums.any()
    train(model, optimizer, range(2, 4))
    unbroken = parts()
    train(*unbroken[:2], range(4))
    assert_same(state_of(model, optimizer, curvature), state_of(*unbroken))


def test_damping_and_averaging_that_were_set_since_stay_so() -> None:
    """In a copy, and where layers are included."""
    _, _, curvature = parts()
    curvature.damping, curvature.averaging = 1.5, 0.25
    curvature.include()
    for one in (curvature, copy.deepcopy(curvature)):
        assert (one.damping, one.averaging) == (1.5, 0.25)


def test_a_closed_curvatures_copy_is_closed_and_a_paused_ones_paused() -> None:
    _, _, curvature = parts()
    with curvature.paused():
        paused = copy.deepcopy(curvature)
    backward(paused.model, 0)
    assert not paused.factors.flat_sums.any()
    curvature.close()
    closed = copy.deepcopy(curvature)
    assert not any(hooks_of(closed.model))


def test_a_function_that_says_when_to_listen_is_shared() -> None:
    _, _, curvature = parts()
    listens = [True]
    curvature.is_listening = lambda: listens[0]
    copied = copy.deepcopy(curvature)
    listens[0] = False
    backward(copied.model, 0)
    assert not copied.factors.flat_sums.any()


def test_without_a_function_a_copy_listens_when_its_own_model_trains() -> None:
    model, _, curvature = parts()
    copied = copy.deepcopy(curvature)
    model.eval()
    backward(copied.model, 0)
    assert copied.factors.flat_sums.any()


def test_a_fit_whose_optimizer_and_module_are_copied_goes_on_unmoved(tmp_path: Path) -> None:
    class Copied(Boring):
        def on_train_batch_end(self, *_: Any) -> None:
            optimizer = copy.deepcopy(self.trainer.optimizers[0])
            assert optimizer.preconditioner.step == self.trainer.optimizers[0].preconditioner.step
            copy.deepcopy(self)

    found, plain = trainer(tmp_path), trainer(tmp_path)
    found.fit(Copied())
    plain.fit(Boring())
    assert_bitwise(everything(found), everything(plain))
    twin = copy.deepcopy(callback_of(found).curvature)
    assert not any(hooks_of(twin.model))
