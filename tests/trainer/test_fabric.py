"""A loop of Fabric trains as a plain loop does: on one device, with a loss scale, from a checkpoint, on two ranks."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, configure_thor, setup_fabric
from tests.helpers.boring import assert_bitwise

X = torch.randn(5, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
"""Five batches of 8 samples."""


class Net(nn.Module):
    """From inputs to the loss, in float64: Fabric converts what a forward pass returns to float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.net(x).sin().sum(1).mean()
        return loss


def train(fabric: Fabric, model: Any, optimizer: Any, batches: Tensor, pieces: int = 1) -> list[Tensor]:
    """One step for each batch, of ``pieces`` equal micro-batches; returns the weights."""
    for x in batches:
        for number, piece in enumerate(x.chunk(pieces), start=1):
            with fabric.no_backward_sync(model, enabled=number < pieces):
                fabric.backward(model(piece) / pieces)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def on_one_device(pieces: int = 1, **options: Any) -> tuple[Fabric, Any, Any, Curvature]:
    fabric, module = Fabric(accelerator="cpu", devices=1, **{"precision": "64-true", **options}), Net()
    optimizer = configure_thor(module, lr=0.01)
    return fabric, *setup_fabric(fabric, module, optimizer, accumulate_grad_batches=pieces, update_every_n_steps=2)


def test_it_is_bitwise_the_plain_loop() -> None:
    fabric, model, optimizer, _ = on_one_device()
    found = train(fabric, model, optimizer, X)
    module = Net()
    plain = configure_thor(module, lr=0.01, preconditioner=Curvature(module, update_every_n_steps=2))
    for x in X:
        module(x).backward()
        plain.step()
        plain.zero_grad()
    assert_bitwise(found, list(module.parameters()))


def test_four_micro_batches_are_one_batch() -> None:
    whole, parts = (train(*on_one_device(pieces)[:3], X, pieces) for pieces in (1, 4))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_a_run_from_a_checkpoint_is_bitwise_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = train(*on_one_device()[:3], X)
    fabric, model, optimizer, curvature = on_one_device()
    train(fabric, model, optimizer, X[:3])
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "curvature": curvature})
    fabric, model, optimizer, curvature = on_one_device()
    assert torch.load(tmp_path / "a.ckpt", weights_only=True).keys() == {"model", "optimizer", "curvature"}
    fabric.load(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "curvature": curvature})
    assert curvature.step == 3
    assert_bitwise(train(fabric, model, optimizer, X[3:]), unbroken)


def test_a_loss_scale_changes_nothing_and_a_skipped_step_leaves_no_statistics() -> None:
    """In float64, but with Fabric's scaler."""

    class Scaled(MixedPrecision):
        def forward_context(self) -> Any:
            return torch.autocast("cpu", enabled=False)

        def convert_input(self, data: Any) -> Any:
            return data

        convert_output = convert_input

    plugins = Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fabric, model, optimizer, curvature = on_one_device(precision=None, plugins=[plugins])
    before = train(fabric, model, optimizer, X[:1] / 0.0)
    assert curvature.step == 0
    assert_bitwise(before, list(Net().parameters()))
    assert not curvature.factors.flat_sums.any()
    found = train(fabric, model, optimizer, X)
    assert curvature.step == 5
    assert not int(curvature.factors.rejected_windows)
    torch.testing.assert_close(found, train(*on_one_device()[:3], X), rtol=1e-9, atol=1e-12)


def test_a_fabric_with_a_loss_scale_holds_no_model_of_an_earlier_training() -> None:
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fabric, *trained = on_one_device(precision=None, plugins=[scaled])
    curvature = ref(trained[-1])
    del trained
    gc.collect()
    assert curvature() is None
    fabric.call("on_after_optimizer_step", strategy=None, optimizer=None)


def test_two_ranks_are_one_rank(clean_process: None) -> None:
    def on_each(fabric: Fabric) -> list[Any]:  # a process that ended takes the memory of its tensors with it
        module = Net()
        wrapped = setup_fabric(fabric, module, configure_thor(module, lr=0.01), update_every_n_steps=2)
        return [p.tolist() for p in train(fabric, *wrapped[:2], X.chunk(2, dim=1)[fabric.global_rank])]

    strategy = DDPStrategy(start_method="fork")
    two = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision="64-true").launch(on_each)
    two = [torch.tensor(p, dtype=torch.float64) for p in two]
    torch.testing.assert_close(two, train(*on_one_device()[:3], X), rtol=1e-9, atol=1e-12)


def test_the_optimizers_mode_is_the_curvatures() -> None:
    fabric, module = Fabric(accelerator="cpu", devices=1), Net().float()
    _, optimizer, curvature = setup_fabric(fabric, module, configure_thor(module, mode="polar"))
    assert (curvature.mode, optimizer.preconditioner) == ("polar", curvature)


def test_what_cannot_be_is_told() -> None:
    module = Net()
    taken = Thor(module.parameters(), preconditioner=Curvature(module))
    with pytest.raises(ValueError, match="makes the curvature itself"):
        setup_fabric(Fabric(accelerator="cpu", devices=1), module, taken)
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(TypeError, match="takes a Thor, got a AdamW"):
        setup_fabric(fabric, module, torch.optim.AdamW(module.parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes no loss_multiplier, mode: the mode is the optimizer's"):
        setup_fabric(fabric, module, configure_thor(module), mode="polar", loss_multiplier=lambda: 2.0)
    with pytest.raises(ValueError, match="accumulate_grad_batches must be an int of at least 1, got 0"):
        setup_fabric(fabric, module, configure_thor(module), accumulate_grad_batches=0)
    fabric._strategy = object.__new__(FSDPStrategy)
    with pytest.raises(ValueError, match=r'setup_fabric does not support FSDPStrategy.*Fabric\(strategy="ddp"\)'):
        setup_fabric(fabric, module, configure_thor(module))
