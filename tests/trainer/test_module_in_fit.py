"""Laws of what people do with a module while it is in a fit: pickle, save, script, trace it; lazy layers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, configure_thor
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, trainer


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def traced(module: Any) -> Any:
    return torch.jit.trace(module.net, torch.ones(2, 1, 8, 8))


def scripted(module: Any) -> Any:
    with callback_of(module.trainer).curvature.without_hooks():
        return torch.jit.script(module.net)


class Taken(Boring):
    """What is taken of it after each batch gives its outputs, and changes nothing."""

    def __init__(self, take: Callable[[Any], Any]) -> None:
        super().__init__()
        self.taken: list[Any] = []
        self.take = take
        self.attention = nn.MultiheadAttention(4, 2)  # hooks of other kinds

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        x = torch.ones(3, 2, 4)
        loss = super().training_step(batch, batch_idx)
        return None if loss is None else loss + self.attention(x, x, x)[0].square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        take, self.take = self.take, copy.copy  # a lambda could not be pickled
        try:
            taken = take(self)
            x = next(iter(self.data()))[0]
            assert_bitwise(taken(x), self(x))
        finally:
            self.take = take


@pytest.mark.parametrize(
    "take", [lambda module: pickle.loads(pickle.dumps(module)), saved, copy.deepcopy, traced, scripted]
)
def test_a_module_can_be_taken_in_the_middle_of_a_fit(tmp_path: Path, take: Callable[[Any], Any]) -> None:
    found, plain = trainer(tmp_path), trainer(tmp_path)
    found.fit(Taken(take))
    plain.fit(Taken(lambda module: module))
    assert_bitwise(everything(found), everything(plain))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in found.lightning_module.modules())


def test_a_pickled_module_is_observed_by_a_curvature_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    curvature = Curvature(model)
    twin = pickle.loads(pickle.dumps(model))
    other = Curvature(twin)
    twin(torch.ones(4, 3)).sum().backward()
    assert (curvature._accumulator.has_pairs, other._accumulator.has_pairs) == (False, True)


def test_the_callback_can_be_pickled_and_copied_in_and_after_a_fit(tmp_path: Path) -> None:
    """The copy takes part in another fit as a new one does."""
    taken: list[Any] = []

    class Taking(Boring):
        def on_train_batch_end(self, *_: Any) -> None:
            callback = callback_of(self.trainer)
            taken[:] = [copy.deepcopy(vars(callback)["_options"]), pickle.dumps(callback)]

    found = trainer(tmp_path)
    found.fit(Taking())
    callbacks = [
        pickle.loads(taken[1]),
        pickle.loads(pickle.dumps(callback_of(found))),
        copy.deepcopy(callback_of(found)),
    ]
    for callback in callbacks:
        assert callback.curvature is None
        again = trainer(tmp_path, callback)
        again.fit(Boring())
        assert_bitwise(everything(again), everything(found))


# ── lazy layers ──


class Lazy(Boring):
    """Its layers have their shapes from the first forward pass, after configure_optimizers."""

    def __init__(self, runs_before: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(
            nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(3)
        )
        if runs_before:
            self(next(iter(self.data()))[0])

    def configure_optimizers(self) -> Thor:
        optimizer = configure_thor(self, lr=self.lr, weight_decay=0.1)
        assert [len(group["params"]) for group in optimizer.param_groups] == [3, 5]
        return optimizer


def test_lazy_layers_have_curvature_from_the_batch_after_the_one_that_makes_them(tmp_path: Path) -> None:
    torch.manual_seed(3)
    found = trainer(tmp_path, limit_val_batches=0)
    found.fit(Lazy())
    curvature = callback_of(found).curvature
    assert list(curvature.layers) == ["net.0", "net.2", "net.3", "net.4"]
    assert (curvature.step, curvature.factors.updates.tolist()) == (8, [4.0] * 4)  # steps 1, 3, 5, 7
    assert curvature.left_out == {}


def test_layers_that_a_pass_made_before_are_as_any(tmp_path: Path) -> None:
    found = trainer(tmp_path, limit_val_batches=0)
    found.fit(Lazy(runs_before=True))
    assert callback_of(found).curvature.factors.updates.tolist() == [4.0] * 4
