"""Laws of ThorCallback, with a real Trainer."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, ThorCallback, configure_thor
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, trainer


def fit(folder: Path, module: Boring | None = None, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    found = trainer(folder, *callbacks, **options)
    found.fit(Boring() if module is None else module)
    return found


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in module.modules())


def test_a_fit_is_the_plain_loop(tmp_path: Path) -> None:
    """The whole of Lightning changes nothing: the same loop by hand gives the same bits."""
    found = fit(tmp_path)
    module = Boring()
    curvature = Curvature(module, update_every_n_steps=2)
    optimizer = configure_thor(module, lr=0.01, preconditioner=curvature)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(2):
        for batch in module.data():
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
            optimizer.step()
            schedule.step()
    assert curvature.step == found.global_step == 8
    assert_bitwise([p.detach() for p in found.lightning_module.parameters()], [p.detach() for p in module.parameters()])


def test_no_hook_outlives_fit(tmp_path: Path) -> None:
    assert hooks_of(fit(tmp_path).lightning_module) == 0


def test_no_hook_outlives_an_exception(tmp_path: Path) -> None:
    class Failing(Boring):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            if batch_idx == 1:
                assert hooks_of(self) > 0
                raise KeyError("broken data")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(KeyError, match="broken data"):
        fit(tmp_path, module)
    assert hooks_of(module) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_captures_nothing(tmp_path: Path, accumulate: int) -> None:
    """Also between micro-batches, where no `zero_grad` follows."""

    class Validating(Boring):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            grads = [p.grad for p in self.parameters()]
            self.zero_grad()
            with torch.enable_grad():
                self(100 * batch[0]).sum().backward()
            for p, grad in zip(self.parameters(), grads, strict=True):
                p.grad = grad

    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    with_it = fit(tmp_path, Validating(), val_check_interval=1, inference_mode=False, **options)
    without = fit(tmp_path, limit_val_batches=0, **options)
    assert_bitwise(everything(with_it), everything(without))


def test_a_second_fit_starts_anew_and_what_is_between_does_not_disturb(tmp_path: Path) -> None:
    once = fit(tmp_path)
    module, twice = Boring(), trainer(tmp_path)
    twice.fit(module)
    twice.validate(module, verbose=False)
    twice.test(module, module.data(), verbose=False)
    assert len(twice.predict(module, module.data()) or []) == 4
    module.load_state_dict(Boring().state_dict())
    twice.fit_loop.epoch_progress.reset()
    twice.fit_loop.epoch_loop.reset()
    again = trainer(tmp_path, callback_of(twice))
    again.fit(module)
    assert_bitwise(everything(again), everything(once))


# ── batches in parts ──


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_batches_are_one_batch(tmp_path: Path, parts: int) -> None:
    """The whole run in float64: weights, momentum, factors and inverses."""
    options: dict[str, Any] = {"precision": "64-true", "limit_val_batches": 0}
    whole = fit(tmp_path, Boring(n=64, batch_size=16).double(), **options)
    module = Boring(n=64, batch_size=16 // parts).double()
    found = fit(tmp_path, module, accumulate_grad_batches=parts, **options)
    torch.testing.assert_close(everything(found), everything(whole), rtol=1e-8, atol=1e-11)


def test_the_terms_of_the_loss_can_be_told_of_the_batch(tmp_path: Path) -> None:
    """G is of the gradients times so many terms: twice as many make it four times as large."""
    factors = []
    for loss_terms in (None, lambda batch: 2 * len(batch[0])):
        callback = ThorCallback(loss_terms=loss_terms, summary=False)
        done = fit(tmp_path, Boring(lr=0.0).double(), callback, max_steps=1, precision="64-true")
        assert "training_step" not in vars(done.strategy)
        factors.append([layer["G"] for layer in callback.curvature.state_dict()["layers"].values()])
    torch.testing.assert_close(factors[1], [4 * G for G in factors[0]])


def test_an_uneven_last_window_is_weighed_by_its_rows(tmp_path: Path) -> None:
    """7 batches in windows of 3: the last has one batch, of 4 samples, and Lightning divides by 3 all the same."""
    module = Boring(n=52, batch_size=8, lr=0.0).double()
    found = fit(
        tmp_path,
        module,
        ThorCallback(update_every_n_steps=1, averaging=0.0, summary=False),
        accumulate_grad_batches=3,
        max_epochs=1,
        precision="64-true",
        limit_val_batches=0,
    )
    assert found.global_step == 3
    reference = Curvature(module, averaging=0.0)
    x, y = list(module.data())[-1]
    assert len(x) == 4
    nn.functional.cross_entropy(module(x), y).backward()
    reference.update()
    curvature = callback_of(found).curvature
    for size, stack in reference.factors.batches.items():
        torch.testing.assert_close(curvature.factors.batches[size].average, stack.average, rtol=1e-9, atol=1e-12)


def test_a_training_step_without_loss_is_no_step(tmp_path: Path) -> None:
    class Skipping(Boring):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    found = fit(tmp_path, Skipping(), max_epochs=1)
    curvature = callback_of(found).curvature
    assert (found.global_step, curvature.step) == (4, 3)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_before_they_are_preconditioned(tmp_path: Path, algorithm: str) -> None:
    """Under match_rms a clipped norm shortens no step, a clipped value does; neither touches the curvature."""
    options: dict[str, Any] = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": algorithm, "max_steps": 1}
    clipped, plain = fit(tmp_path, **options), fit(tmp_path, max_steps=1)
    for a, b in zip(callback_state(clipped), callback_state(plain), strict=True):
        assert_bitwise(a, b)
    weights = [list(t.lightning_module.parameters()) for t in (clipped, plain)]
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*weights, strict=True))
    assert same is (algorithm == "norm")


def callback_state(found: L.Trainer) -> list[Tensor]:
    curvature = callback_of(found).curvature
    return [stack.inverse for stack in curvature.factors.batches.values()]


def test_manual_optimization(tmp_path: Path) -> None:
    class Manual(Boring):
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self.lr_schedulers().step()

    assert_bitwise(everything(fit(tmp_path, Manual())), everything(fit(tmp_path)))


# ── what a Lightning user has beside it ──


def test_learning_rates_reach_the_monitor_and_the_schedule(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    found = fit(tmp_path, Boring(weight_decay=0.1), LearningRateMonitor("step"), logger=logger, log_every_n_steps=1)
    (optimizer,) = found.optimizers
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01 * 0.9**8] * 2)
    metrics = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "lr-Thor/pg1" in metrics
    assert "thor/failed_inversions" in metrics
    assert "thor/rejected_windows" in metrics


class DataFromTheStart(L.Callback):
    """Early releases of Lightning 2.5 go on after a search, with any optimizer, with the batches that it left."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop._combined_loader = None


@pytest.mark.parametrize(
    "finder",
    [LearningRateFinder(num_training_steps=5, update_attr=False), BatchSizeFinder(max_trials=2, steps_per_trial=2)],
)
def test_a_fit_after_a_search_is_the_fit_without_it(tmp_path: Path, finder: L.Callback) -> None:
    """And the search itself trains with curvature: without one Thor would raise."""
    options: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 6, "limit_val_batches": 0}
    searched = fit(tmp_path, Boring(batch_size=2), finder, DataFromTheStart(), **options)
    plain = fit(tmp_path, Boring(batch_size=searched.lightning_module.batch_size), **options)
    assert_bitwise(everything(searched), everything(plain))


@pytest.mark.parametrize(
    ("finder", "sizes"),
    [(LearningRateFinder(num_training_steps=5), {2}), (BatchSizeFinder(max_trials=2, steps_per_trial=2), {2, 4})],
)
def test_a_search_asks_for_the_terms_of_its_own_batches(tmp_path: Path, finder: L.Callback, sizes: set[int]) -> None:
    """Lightning calls no hook of another callback in it."""
    asked: list[int] = []

    def loss_terms(batch: Any) -> int:
        asked.append(len(batch[0]))
        return asked[-1]

    callback = ThorCallback(loss_terms=loss_terms, summary=False)
    found = fit(tmp_path, Boring(batch_size=2), callback, finder, max_epochs=1, limit_val_batches=0)
    # Lightning 2.5 goes on with twice the size that it found.
    assert set(asked) - {8} == sizes
    assert "training_step" not in vars(found.strategy)


@pytest.mark.parametrize("terms", [None, "8", torch.ones(2)])
def test_terms_of_the_loss_that_are_no_number_are_refused(tmp_path: Path, terms: Any) -> None:
    with pytest.raises(TypeError, match=r"loss_terms must return .*, but returned (None|'8'|a tensor)"):
        fit(tmp_path, None, ThorCallback(loss_terms=lambda batch: terms, summary=False))


def test_terms_of_a_batch_need_the_batch(tmp_path: Path) -> None:
    class FetchesItself(Boring):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(ValueError, match="loss_terms is given each batch, but FetchesItself"):
        fit(tmp_path, FetchesItself(), ThorCallback(loss_terms=len, summary=False))


def test_a_step_that_a_search_skips_leaves_no_trace(tmp_path: Path) -> None:
    """In a fit the callback discards the statistics of an overflow; in a search it is not called."""
    rejected = []

    class Overflows(Boring):
        def loss(self, logits: Tensor, y: Tensor) -> Tensor:
            return super().loss(logits, y) * (float("inf") if self.trainer.global_step == 2 else 1.0)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert callback.curvature is not None
            rejected.append((callback.curvature.step, int(callback.curvature.factors.rejected_windows)))

    callback = ThorCallback(update_every_n_steps=1, summary=False)
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
    fit(tmp_path, Overflows(), callback, finder, plugins=[scaler], max_steps=1)
    assert rejected[:6] == [(1, 0), (2, 0), (2, 0), (3, 0), (4, 0), (5, 0)]


def test_lr_find_of_the_tuner(tmp_path: Path) -> None:
    found = trainer(tmp_path, limit_val_batches=0)
    module = Boring()
    finder = L.pytorch.tuner.Tuner(found).lr_find(module, num_training=20, update_attr=True)
    assert len(finder.results["loss"]) > 5
    found.fit(module)
    assert found.global_step == 8


def test_the_callback_can_be_pickled_and_copied(tmp_path: Path) -> None:
    callback = ThorCallback(update_every_n_steps=2, summary=False)
    twins = pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)
    plain = fit(tmp_path)
    for twin in twins:
        assert_bitwise(everything(fit(tmp_path, None, twin)), everything(plain))


def test_the_summary_names_every_layer_and_why_others_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Boring()
    module.net[4].requires_grad_(False)
    module.product = nn.Bilinear(2, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, module, ThorCallback(summary=True), max_steps=1, enable_model_summary=True)
    printed = capsys.readouterr().out
    for words in (
        "THOR curvature",
        "net.0",
        "4×1×3×3",
        "A 1 × 9², G 1 × 4²",
        "G diagonal",
        "frozen",
        "no curvature for Bilinear",
    ):
        assert words in printed
    assert "layers preconditioned" in printed


def test_a_model_left_in_eval_mode_trains_as_any(tmp_path: Path) -> None:
    """Lightning keeps the modes of modules; no layer here depends on them."""
    assert_bitwise(everything(fit(tmp_path, Boring().eval())), everything(fit(tmp_path)))


def test_an_optimizer_kept_from_one_fit_to_the_next(tmp_path: Path) -> None:
    class Decomposition(Boring):
        kept: Any = None

        def configure_optimizers(self) -> Any:
            self.kept = self.kept or super().configure_optimizers()
            return self.kept

    module = Decomposition()
    for _ in range(2):
        fit(tmp_path, module)
        assert module.kept["optimizer"].preconditioner is None


def test_a_thor_that_comes_within_a_step_that_is_skipped_is_served_at_the_next_one(tmp_path: Path) -> None:
    class Swapping(Boring):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            if batch_idx != 2 or loss is None:
                return loss
            self.trainer.strategy.optimizers = [configure_thor(self)]
            return loss * float("inf")

    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    found = fit(tmp_path, Swapping(), max_epochs=1, plugins=[scaler])
    assert [curvature.step for curvature in callback_of(found).curvatures] == [2, 1]


def test_another_optimizer_between_two_steps_throws_no_window_away(tmp_path: Path) -> None:
    """Manual optimization under a GradScaler: only the other optimizer steps in every second batch."""

    class TwoOptimizers(Boring):
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            thor, other = self.optimizers()
            self.manual_backward(self.loss(self(batch[0]), batch[1]))
            other.step()
            if batch_idx % 2:
                assert callback_of(self.trainer).curvature.factors.counts[0, 1] == 16
                thor.step()
                thor.zero_grad()

        def configure_optimizers(self) -> Any:
            return [configure_thor(self.net[:4]), torch.optim.SGD(self.net[4:].parameters(), lr=0.0)]

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    fit(tmp_path, TwoOptimizers(), ThorCallback(update_every_n_steps=1, summary=False), max_epochs=1, plugins=[plugin])


def test_a_layer_that_is_unfrozen_during_fit_is_told_once(tmp_path: Path) -> None:
    class Unfreezing(Boring):
        def on_train_epoch_start(self) -> None:
            self.net[4].requires_grad_(self.trainer.current_epoch > 0)

    module = Unfreezing()
    module.net[4].requires_grad_(False)
    with pytest.warns(UserWarning, match="'net.4' was frozen when fit began") as caught:
        fit(tmp_path, module, max_epochs=4)
    assert sum("was frozen" in str(w.message) for w in caught) == 1


# ── errors ──


def test_clipping_that_shortens_no_step_is_told(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="match_rms sets the scale afterwards: the clipping at most evens out the steps"
    ):
        fit(tmp_path, gradient_clip_val=1.0, max_steps=1)


def test_clipping_counts_in_the_polar_mode(tmp_path: Path) -> None:
    """It comes before momentum there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the clipping at most evens")
        fit(tmp_path, Boring(mode="polar"), gradient_clip_val=1.0, max_steps=1)


class WithOptimizers(Boring):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self)


def test_the_callback_without_thor_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no Thor optimizer \(configure_optimizers returned: SGD\)"):
        fit(tmp_path, WithOptimizers(lambda m: torch.optim.SGD(m.parameters(), 0.1)))
    with (
        pytest.warns(UserWarning, match="returned `None`"),
        pytest.raises(ValueError, match=r"\(configure_optimizers returned: none\)"),
    ):
        fit(tmp_path, WithOptimizers(lambda m: None))


def test_thor_without_the_callback_is_told(tmp_path: Path) -> None:
    found = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path, max_epochs=1
    )
    with pytest.raises(RuntimeError, match=r"Add ThorCallback\(\)"):
        found.fit(Boring())


def test_two_callbacks_are_told(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    found.callbacks.append(ThorCallback())
    with pytest.raises(ValueError, match="more than one ThorCallback"):
        found.fit(Boring())
    # Lightning's own error, which docs/troubleshooting.md lists.
    with pytest.raises(RuntimeError, match="Found more than one stateful callback of type `ThorCallback`"):
        trainer(tmp_path, ThorCallback(), ThorCallback())


def test_an_option_of_the_optimizer_is_told_where_it_belongs() -> None:
    with pytest.raises(TypeError, match=r"does not know lr, mode\. .* of the optimizer: configure_thor\(self, lr="):
        ThorCallback(mode="adam", lr=0.1)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("FSDPStrategy", r'strategy="thor_fsdp2".*fully_shard\(self.net, mesh=self.device_mesh\["data_parallel"\]\)'),
        ("DeepSpeedStrategy", 'strategy="thor_fsdp2".*, or "thor_ddp" for a model that fits'),
        ("XLAStrategy", '"thor_ddp", "thor_fsdp2" or a single device'),
        ("SingleDeviceXLAStrategy", '"thor_ddp", "thor_fsdp2" or a single device'),
        ("ModelParallelStrategy", 'strategy="thor_fsdp2"'),
    ],
)
def test_a_strategy_that_is_not_supported_is_told(tmp_path: Path, name: str, advice: str) -> None:
    strategy = object.__new__(getattr(L.pytorch.strategies, name))
    found = trainer(tmp_path)
    found._accelerator_connector.strategy = strategy
    with pytest.raises(ValueError, match=f"does not support {name}: .*{advice}"):
        callback_of(found).setup(found, Boring(), "fit")


def test_a_model_without_layers_is_told_why_and_what_to_do(tmp_path: Path) -> None:
    class Bare(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (self.weight * batch[0].mean()).square().sum()

        def configure_optimizers(self) -> Thor:
            return configure_thor(self)

        def train_dataloader(self) -> Any:
            return Boring().data()

    with pytest.warns(UserWarning, match=r"0% of the weights .*\(no curvature for Bare\)\. .*register_layer"):
        trainer(tmp_path, max_steps=1).fit(Bare())


def test_a_layer_that_never_fires_is_named_once(tmp_path: Path) -> None:
    module = Boring()
    module.unused = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="1 of 6 layers.* unused: its module was not called") as caught:
        fit(tmp_path, module)
    assert sum("not observed" in str(w.message) for w in caught) == 1


def test_trouble_is_counted_and_told_once_per_epoch(tmp_path: Path) -> None:
    class Overflowing(Boring):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.batch_idx == 2:
                grads = [p.grad for p in self.parameters()]
                self.zero_grad()
                x = torch.full((8, 1, 8, 8), float("inf"))  # an extra pair with bad inputs
                (self.net[0](x).sum() * 0.0).backward()
                for p, grad in zip(self.parameters(), grads, strict=True):
                    p.grad = grad

    with pytest.warns(UserWarning, match="THOR kept old curvature 1 times in epoch 0.*1 layers' statistics") as caught:
        found = fit(tmp_path, Overflowing(), max_epochs=1)
    assert sum("kept old curvature" in str(w.message) for w in caught) == 1
    assert all(torch.isfinite(p).all() for p in found.lightning_module.parameters())


logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
