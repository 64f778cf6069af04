"""Laws of THOR beside what else a Trainer does: one table of fits that must be the same, and some further ones."""

from __future__ import annotations

import gc
import tempfile
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_thor import Curvature, Thor, ThorDDPStrategy
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, quiet, trainer
from tests.helpers.launching import fork, run_forked
from tests.helpers.open_files import open_files


def fit(folder: Path, *callbacks: L.Callback, module: Callable[[], Boring] = Boring, **options: Any) -> L.Trainer:
    found = trainer(folder, *callbacks, **{"num_sanity_val_steps": 0, **options})
    found.fit(module())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in found.lightning_module.modules())
    return found


class Checkpointed(Boring):
    """Runs its first half once more in backward, instead of keeping what is in it."""

    def forward(self, x: Tensor) -> Tensor:
        half: Tensor = checkpoint(self.net[:4], x, use_reentrant=False)
        out: Tensor = self.net[4:](half)
        return out


class Penalized(Boring):
    """With a penalty on the gradient by the inputs, times zero: nothing but its passes is there."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x = x.clone().requires_grad_()
        loss = self.loss(self(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 0 * slope.square().sum()


class Looks(L.Callback):
    """Validates, predicts and runs the module in the middle of training, by hand."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            pl_module.eval()
            pl_module(torch.ones(2, 1, 8, 8))
            pl_module.train()
        pl_module(torch.ones(2, 1, 8, 8))  # without a backward pass


Options = dict[str, Any]
SAME: dict[str, tuple[Callable[[], list[L.Callback]], Options, Options]] = {
    "accumulation scheduler": (
        lambda: [GradientAccumulationScheduler({0: 2})],
        {},
        {"accumulate_grad_batches": 2},
    ),
    "early stopping": (lambda: [EarlyStopping("val_loss", divergence_threshold=-1.0)], {}, {"max_epochs": 1}),
    "sanity checks": (list, {"num_sanity_val_steps": 2}, {}),
    "validation in mid-epoch": (list, {"val_check_interval": 1}, {}),
    "no validation": (list, {"limit_val_batches": 0}, {}),
    "fast_dev_run": (list, {"fast_dev_run": True}, {"max_epochs": 1, "limit_train_batches": 1}),
    "overfit_batches": (list, {"overfit_batches": 2}, {"limit_train_batches": 2}),
    "max_steps": (list, {"max_steps": 4, "max_epochs": -1}, {"max_epochs": 1}),
    "checkpointed activations": (list, {"module": Checkpointed}, {}),
    "gradient penalty": (list, {"module": Penalized}, {}),
    "passes by hand": (lambda: [Looks()], {}, {}),
    "detect_anomaly": (list, {"detect_anomaly": True}, {}),
    "barebones": (list, {"barebones": True}, {}),
}
"""What is beside THOR, and options of the Trainer with it and without it."""


@pytest.mark.parametrize("name", SAME)
def test_a_fit_with_it_is_the_fit_without_it(name: str, tmp_path: Path) -> None:
    callbacks, with_it, without = SAME[name]
    found, expected = (
        everything(fit(tmp_path, *some, **options)) for some, options in ((callbacks(), with_it), ([], without))
    )
    if name == "gradient penalty":  # another order of sums
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    else:
        assert_bitwise(found, expected)


def recorder() -> Any:
    """A callback that notes in ``called`` which of its hooks the Trainer calls."""
    hooks = [name for name in dir(L.Callback) if name.startswith("on_") or name in ("setup", "teardown")]
    called: list[str] = []
    methods = {name: (lambda self, *args, name=name, **kwargs: called.append(name)) for name in hooks}
    return type("Recorder", (L.Callback,), {**methods, "called": called})()


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}], ids=str)
def test_the_trainer_calls_its_hooks_as_beside_adamw(options: Options, tmp_path: Path) -> None:
    class WithAdamW(Boring):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    beside_adamw, beside_thor = recorder(), recorder()
    quiet(tmp_path, beside_adamw, **options).fit(WithAdamW())
    trainer(tmp_path, beside_thor, **options).fit(Boring())
    assert beside_thor.called == beside_adamw.called
    assert beside_thor.called.count("on_train_batch_end") == 8


def test_an_average_of_the_weights_beside_the_training_does_not_change_it(tmp_path: Path) -> None:
    """Lightning's EMA: the weights of the end are the averages, curvature and momentum those of the training."""
    averaging = getattr(of_lightning, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    found, plain = fit(tmp_path, averaging(decay=0.5)), fit(tmp_path)
    n = len(list(plain.lightning_module.parameters()))
    momenta = lambda one: [state["momentum_buffer"] for state in one.optimizers[0].state.values()]  # noqa: E731
    assert_bitwise(momenta(found), momenta(plain))
    assert_bitwise(everything(found)[2 * n :], everything(plain)[2 * n :])
    weights = [[p.detach() for p in one.lightning_module.parameters()] for one in (found, plain)]
    assert not all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_stochastic_weight_averaging_ends_with_the_mean_over_the_epochs(tmp_path: Path) -> None:
    ends: list[list[Tensor]] = []

    class Ends(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            ends.append([p.detach().clone() for p in pl_module.parameters()])

    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    found = fit(tmp_path, averaging, Ends(), max_epochs=4, limit_val_batches=0)
    mean = [torch.stack(some).mean(0) for some in zip(*ends[:3], strict=True)]
    torch.testing.assert_close([p.detach() for p in found.lightning_module.parameters()], mean, rtol=1e-5, atol=1e-6)


def test_pruned_weights_stay_zero(tmp_path: Path) -> None:
    module = Boring()
    pruned = [(module.net[4], "weight"), (module.net[7], "weight")]
    fit(tmp_path, ModelPruning("l1_unstructured", pruned, amount=0.5), module=lambda: module, max_epochs=3)
    assert all(isinstance(layer.weight, nn.Parameter) for layer, _ in pruned)
    weights = torch.cat([layer.weight.detach().flatten() for layer, _ in pruned])
    assert float((weights == 0).float().mean()) == pytest.approx(
        1 - 0.5**3, abs=0.01
    )  # half of what is left, in each epoch
    assert torch.isfinite(weights).all()


def test_two_trainings_in_one_process_do_not_see_each_other(tmp_path: Path) -> None:
    """A fit within a step of another one."""
    inner: list[L.Trainer] = []

    class Outer(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                with torch.random.fork_rng():
                    inner.append(fit(tmp_path))

    outer, plain = fit(tmp_path, Outer()), fit(tmp_path)
    assert_bitwise(everything(outer), everything(plain))
    assert_bitwise(everything(inner[0]), everything(plain))


def living() -> list[Any]:
    """Objects of the package that are still there."""
    gc.collect()
    return [one for one in gc.get_objects() if str(type(one).__module__).startswith("lightning_thor")]


def leaves_nothing_behind(folder: Path, times: int) -> None:
    """Fits on one device, and with a process group, which is the user's to destroy; the first two warm up."""
    gone: list[Any] = []
    for number in range(-2, times):
        if number == 0:
            before, threads, files = len(living()), threading.active_count(), open_files()
        found = trainer(folder, strategy=ThorDDPStrategy() if number % 4 == 3 else "auto", max_epochs=1)
        module = Boring()
        found.fit(module)
        assert not any(one._forward_hooks or one._backward_hooks for one in module.modules())
        gone += [weakref.ref(one) for one in (found, module, *found.optimizers, callback_of(found).curvature)]
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        del found, module
    assert len(living()) <= before
    assert [one() for one in gone if one() is not None] == []
    assert threading.active_count() <= threads
    assert open_files() <= files


@pytest.mark.usefixtures("clean_process")
def test_fits_leave_nothing_behind(tmp_path: Path) -> None:
    leaves_nothing_behind(tmp_path, 4)


@pytest.mark.soak
@pytest.mark.usefixtures("clean_process")
def test_two_hundred_fits_leave_nothing_behind(tmp_path: Path) -> None:
    leaves_nothing_behind(tmp_path, 200)


def fit_on_two_ranks_again_and_again() -> None:
    """With and without workers; the first fit makes process groups, which the others have too."""
    with tempfile.TemporaryDirectory() as folder:
        for options in ({}, {"inverse_workers": 1}):
            files = []
            for _ in range(3):
                fit(Path(folder), strategy=ThorDDPStrategy(**options), devices=2, max_epochs=1)
                gc.collect()
                files.append(open_files())
            assert files[1:] == files[:1] * 2, files
            assert torch.distributed.get_world_size() == 2


@pytest.mark.slow
def test_fits_on_two_ranks_open_no_more_connections() -> None:
    status, printed = run_forked(partial(fork, 2, fit_on_two_ranks_again_and_again))
    assert status == 0, printed[-3000:]


def test_what_is_left_behind_is_seen() -> None:
    kept = Curvature(nn.Linear(2, 2)), Thor(nn.Linear(2, 2).parameters())
    found = {id(one) for one in living()}
    assert {id(one) for one in kept} <= found
