"""Every precision of the Trainer, loss scaling by a real GradScaler among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_thor import Curvature, Thor, ThorCallback
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, trainer


def scaled(**options: Any) -> dict[str, Any]:
    """Trainer(accelerator="cpu", precision="16-mixed") silently means bf16-mixed: the plugin does not."""
    scaler = torch.amp.GradScaler("cpu", **options)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def fit(folder: Path, module: Boring, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    found = trainer(folder, *callbacks, **options)
    found.fit(module)
    return found


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true", "bf16-true", "16-true"])
def test_every_precision_trains_with_factors_of_at_least_float32(tmp_path: Path, precision: Any, mode: str) -> None:
    module = Boring(n=16, mode=mode)
    if precision == "64-true":
        module = module.double()
    elif precision.endswith("16-true"):
        module = module.to(torch.bfloat16 if precision == "bf16-true" else torch.float16)
    found = fit(tmp_path, module, precision=precision)
    curvature = callback_of(found).curvature
    assert curvature.factors.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert all(torch.isfinite(tensor).all() for tensor in everything(found))
    assert (curvature.factors.updates > 0).all()
    assert curvature.factors.rejected_windows == 0


class Full(Boring):
    """Computes in float32 even under autocast, so that only the loss scale differs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


@pytest.mark.parametrize(
    ("scale", "mode"), [(1.0, "natural"), (2.0**12, "natural"), (2.0**12, "polar"), (2.0**12, "adam")]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_scale_changes_nothing(tmp_path: Path, scale: float, mode: str, accumulate: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    found = fit(tmp_path, Full(mode=mode), **scaled(init_scale=scale), **options)
    plain = fit(tmp_path, Full(mode=mode), **options)
    torch.testing.assert_close(everything(found), everything(plain), rtol=1e-5, atol=1e-7)


class Overflowing(Full):
    """Its loss cannot be scaled in the batches named; it remembers when the optimizer really stepped."""

    overflow_in: tuple[int, ...] = ()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e38 if batch_idx in self.overflow_in else loss


@pytest.mark.parametrize("refresh", [1, 2])
def test_a_skipped_step_leaves_no_trace_in_the_curvature(tmp_path: Path, refresh: int) -> None:
    """The same batches without the overflowing one, the loss scale halved by hand: bitwise the same curvature."""

    class Rest(Full):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    module = Overflowing(lr=0.0)
    module.overflow_in = (0,)

    def callback() -> ThorCallback:
        return ThorCallback(update_every_n_steps=refresh, averaging=0.5, summary=False)

    found = fit(tmp_path, module, callback(), max_epochs=1, **scaled(init_scale=2.0**8))
    rest = fit(tmp_path, Rest(lr=0.0), callback(), max_epochs=1, **scaled(init_scale=2.0**7))
    ours, theirs = callback_of(found).curvature, callback_of(rest).curvature
    assert ours.step == theirs.step == 3
    assert ours.factors.rejected_windows == 0
    for size, stack in theirs.factors.batches.items():
        assert_bitwise(ours.factors.batches[size].average, stack.average)


def test_an_overflow_in_the_middle_of_a_window_discards_the_window(tmp_path: Path) -> None:
    module = Overflowing()
    module.overflow_in = (1,)
    found = fit(tmp_path, module, max_epochs=1, accumulate_grad_batches=2, **scaled(init_scale=2.0**8))
    curvature = callback_of(found).curvature
    assert (found.global_step, curvature.step) == (2, 1)
    assert curvature.factors.rejected_windows == 0
    assert all(torch.isfinite(tensor).all() for tensor in everything(found))


def test_a_step_within_autocast_is_the_step_without() -> None:
    """A plain loop may call optimizer.step() there: its products would be in bfloat16."""
    runs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
        curvature = Curvature(model)
        optimizer = Thor(model.parameters(), preconditioner=curvature)
        model(torch.randn(16, 8)).square().mean().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    assert_bitwise(*runs)
