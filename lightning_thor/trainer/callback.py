"""ThorCallback: owns the curvature during fit, and decides when it listens; it computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelSummary
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_thor.block_size.choose import BlockSplit
from lightning_thor.curvature.callables import BatchFn, IntStepFn, StepFn
from lightning_thor.curvature.curvature import Curvature
from lightning_thor.curvature.options import check_options
from lightning_thor.factors.damping import DampingRule
from lightning_thor.layers.discovery import uncompiled_name
from lightning_thor.optim.thor import Preconditioner, Thor
from lightning_thor.preconditioning.modes import MODES, common_mode
from lightning_thor.schedules import PerStepLR
from lightning_thor.trainer.block_size_trial import try_block_sizes
from lightning_thor.trainer.checkpoints import saved_callback_state
from lightning_thor.trainer.fit_report import FitFigures, print_fit
from lightning_thor.trainer.report import report_split
from lightning_thor.trainer.start_report import print_curvature
from lightning_thor.trainer.strategies import ThorStrategyMixin, check_strategy
from lightning_thor.trainer.update_ratio import Sample, sample_weights, update_ratio


class ThorCallback(Callback):
    """Gives the `Thor` optimizer of a fit its curvature, for the mode it has; use it with ``return
    configure_thor(self)``. It serves one `Thor`, beside any other optimizers; a Trainer takes one of it. `Curvature`
    explains its options at length.

    Args:
        damping: greater than 0, added to the eigenvalues of the factors, or a function of the step. (A function is in a
            configuration file a class of such, by ``class_path``: one of `lightning_thor.schedules`, or your own.)
        damping_rule: how damping is shared between A and G: ``"trace"`` (relative to their mean eigenvalues), ``"pi"``
            or ``"sqrt"`` (absolute).
        block_size: size of the largest diagonal block of a factor; None keeps factors whole; ``"auto"`` chooses it when
            fit starts, on the first training batch, by `lightning_thor.choose_block_size`, and a resumed run goes on
            with its checkpoint's.
        update_every_n_steps: steps from one refresh of the curvature to the next, or a function of the step. None: 1 at
            first, a tenth of the steps so far from step 20 on, 10 from step 100 on.
        averaging: weight of the past in the factors' moving average, in [0, 1); 0 uses the last batch alone.
        precondition_bias: take biases of linear layers and convolutions into A; otherwise they take plain momentum.
        stagger: refresh each layer at a step of its own within the interval, so that step times stay flat.
        trace_rule: invert a layer only if the trace of its curvature moved: ``"THOR"``, ``"THOR_stop"``, ``"THOR_NT"``
            or ``(update_above, stop_below)``; None inverts all.
        max_rows: rows of a batch to take statistics from, shared by all processes; None for all.
        statistics: ``"expand"`` takes each position of a convolution or sequence as a row, ``"reduce"`` each sample,
            ``"thor"`` what MindSpore's nn.thor does.
        loss_reduction: ``"mean"`` or ``"sum"``: how the loss reduces over samples.
        fused: number of parts of linear layers whose outputs are a concatenation, by pattern of the name, such as
            ``{"*.qkv": 3}``.
        loss_terms: gives, of a training batch, how many terms the mean of its loss has: a number, or a 0-dimensional
            tensor. As in `Curvature`; needed where labels are left out of the mean and their number differs between
            micro-batches or processes: ``lambda batch: (batch["labels"] != -100).sum()``.
        summary: print what is preconditioned when fit starts, and how a block size was chosen; the latter is also
            saved, as ``thor_split.json`` and, where matplotlib is, ``thor_split.png``, beside the logger's files.
            Equal layers are one row; ``"full"`` has a row for each. With ``Trainer(enable_model_summary=False)``
            nothing is printed.

    Raises:
        ValueError: an option out of its range.

    Logs, where there is a logger, every ``log_every_n_steps`` of the Trainer: ``thor/refreshes``, the refreshes of a
    layer so far, on average; ``thor/inverse_age``, the steps since its last one; ``thor/damping``, as of then; and
    ``thor/update_to_weights``, the norm of the step over the norm of the weights, from a sample of their entries (of
    sharded ones, of rank 0's). At each epoch's end: ``thor/failed_inversions`` and ``thor/rejected_windows``, the
    blocks that kept an old inverse and the layers' windows that were left out for not being finite, so far: both stay 0
    as long as all is well; with a trace rule ``thor/refreshed_share``, the refreshes that were done over those that
    there would have been without it. When fit ends, these figures are printed with advice, unless ``summary`` is False
    or the model's summary or the progress bar is off.
    """

    def __init__(
        self,
        *,
        damping: float | StepFn = 0.2,
        damping_rule: DampingRule = "trace",
        block_size: int | Literal["auto"] | None = 64,
        update_every_n_steps: int | IntStepFn | None = None,
        averaging: float = 0.8,
        precondition_bias: bool = False,
        stagger: bool = False,
        trace_rule: Literal["THOR", "THOR_stop", "THOR_NT"] | tuple[float, float] | None = None,
        max_rows: int | None = 1024,
        statistics: Literal["expand", "reduce", "thor"] = "expand",
        loss_reduction: str = "mean",
        fused: dict[str, int] | None = None,
        loss_terms: BatchFn | None = None,
        summary: bool | Literal["full"] = True,
    ) -> None:
        super().__init__()
        # "auto" is the callback's own value.
        self._options = check_options(locals() | {"block_size": None if block_size == "auto" else block_size})
        self._options["block_size"] = block_size
        if loss_terms is not None and not callable(loss_terms):
            raise ValueError(f"loss_terms must be a function of a batch, or None, got {loss_terms!r}.")
        if not (isinstance(summary, bool) or summary == "full"):
            raise ValueError(f'summary must be True, False or "full", got {summary!r}.')
        self._loss_terms = loss_terms
        self._batch: Any = None
        """The training batch under way, where `loss_terms` is to be asked of it."""
        self.summary = summary
        self._is_measuring = False
        self.curvature: Curvature | None = None
        """The curvature of the present or last fit."""
        self.block_size: int | None = None
        """Of that curvature."""
        self.split: BlockSplit | None = None
        """How it was chosen, if this fit did."""
        self._restored: dict[str, Any] | None = None
        self._fitting = False
        self._optimizer: Thor | None = None
        """The optimizer that has the curvature: None outside of fit."""
        self._applied = 0
        self._called = 0
        self._told = 0
        self._begin = FitFigures()
        """The counts when training began."""
        self._weights: Sample | None = None
        """A sample of the weights before the step that is logged."""
        self._ratio_sum: float | Tensor = 0.0
        self._n_ratios = 0

    @property
    def state_key(self) -> str:
        # Constant: the default is the class's name, and a subclass would lose the state.
        return "ThorCallback"

    def measure_block_size(self) -> None:
        """From now on choose the block size when a fit starts, whatever was given, and report it."""
        self._options["block_size"] = "auto"
        self.summary = self.summary or True
        self._is_measuring = True

    # ── wiring ──

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        check_strategy(trainer.strategy)
        # Lightning's own error comes first, unless one was appended to the list.
        if sum(isinstance(one, ThorCallback) for one in _callbacks_of(trainer)) > 1:
            raise ValueError("Trainer(callbacks=...) has more than one ThorCallback: leave one, with all the options.")
        # To the front: LearningRateFinder and BatchSizeFinder train inside their own on_fit_start, after ours then.
        callbacks = _callbacks_of(trainer)
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._restored = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = _the_thor_of(trainer)
        if optimizer.preconditioner is not None:
            raise ValueError(
                f"ThorCallback found a {type(optimizer).__name__} that has a preconditioner already. Remove the "
                "callback, or build the optimizer without preconditioner=..."
            )
        self._close()
        # Now: while ``fully_shard`` holds weights whole, a model has other parameters.
        optimizer.numbered = tuple(pl_module.parameters())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.block_size, self.split = self._decide_block_size(trainer, pl_module, parameters)
        self.curvature = Curvature(
            pl_module,
            mode=common_mode(group["mode"] for group in optimizer.param_groups).name,
            loss_multiplier=_LossMultiplier(trainer, pl_module),
            loss_terms=None if self._loss_terms is None else self._terms_of_the_batch,
            parameters=parameters,
            **{**self._options, "block_size": self.block_size},
        )
        preconditioner: Preconditioner = self.curvature
        if isinstance(trainer.strategy, ThorStrategyMixin):
            own = set(parameters)
            named = {name: p for name, p in pl_module.named_parameters() if p in own}
            preconditioner = trainer.strategy.connect_curvature(self.curvature, named)
        # The trainer's stage, not the model's mode: fit trains a model that was left in eval mode too.
        self.curvature.is_listening = lambda: trainer.training
        optimizer.preconditioner = preconditioner
        self._optimizer = optimizer
        if self._restored is not None:
            self.curvature.load_state_dict(self._restored["curvature"])
            self._restored = None
        _warn_of_clipping(trainer, optimizer)
        _warn_of_intervals(trainer)
        if not self.curvature.layers:
            rank_zero_warn(
                "ThorCallback found no layer to precondition: all parameters take "
                f"{MODES[self.curvature.mode].fallback}. What it prints when fit starts says why (summary=True)."
            )
        quiet = self._is_quiet(trainer)
        if self.summary and self.split is not None:
            folder = trainer.log_dir or trainer.default_root_dir  # on all ranks: it is a broadcast
            if trainer.is_global_zero:
                report_split(self.split, folder, quiet=quiet)
        if self.summary and trainer.is_global_zero:
            print_curvature(self.curvature, full=self.summary == "full", quiet=quiet)

    def _decide_block_size(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, parameters: list[torch.nn.Parameter]
    ) -> tuple[int | None, BlockSplit | None]:
        block_size = self._options["block_size"]
        if block_size != "auto":
            return block_size, None
        restored = saved_callback_state(trainer, self.state_key) if self._restored is None else self._restored
        if restored is not None:
            if "block_size" not in restored:
                raise ValueError(
                    'The checkpoint is of a version that did not note its block size, so block_size="auto" cannot go '
                    "on with it. Give ThorCallback the block_size of the run that was saved."
                )
            return restored["block_size"], None
        options = {name: self._options[name] for name in ("precondition_bias", "max_rows", "statistics", "fused")}
        split = try_block_sizes(trainer, pl_module, parameters, **options)
        return split.block_size, split

    # ── each step ──

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not when fit starts: some strategies restore a checkpoint after that.
        if self.curvature is not None:
            self._applied, self._called = self.curvature.step, trainer.global_step
            self._told = sum(self._troubles())
            self._begin, self._ratio_sum, self._n_ratios = self._figures(), 0.0, 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._loss_terms is not None:
            self._batch = batch
        self._weights = None
        if self._optimizer is not None and trainer._logger_connector.should_update_logs:
            self._weights = sample_weights(self._optimizer)

    def _terms_of_the_batch(self) -> Any:
        assert self._loss_terms is not None
        return self._loss_terms(self._batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None
        if self.curvature is None:
            return
        # A GradScaler that found an overflow calls no Optimizer.step and tells nobody: only the counters differ.
        skipped = trainer.global_step != self._called and self.curvature.step == self._applied
        # In manual optimization another optimizer may have stepped; what is not finite is left out all the same.
        if skipped and pl_module.automatic_optimization and _scaler_of(trainer) is not None:
            self.curvature.discard()
        if self.curvature.step != self._applied and self._weights:
            self._log_step(trainer, pl_module, update_ratio(self._weights))
        self._weights = None
        self._called, self._applied = trainer.global_step, self.curvature.step

    def _log_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, ratio: Tensor) -> None:
        assert self.curvature is not None
        self._ratio_sum, self._n_ratios = self._ratio_sum + ratio, self._n_ratios + 1
        if trainer.logger is not None:
            done, _ = self.curvature.refreshes
            figures: dict[str, Any] = {
                "thor/refreshes": done / max(len(self.curvature.layers), 1),
                "thor/inverse_age": self.curvature.inverse_age,
                "thor/update_to_weights": ratio,
            }
            if self.curvature.last_damping is not None:
                figures["thor/damping"] = self.curvature.last_damping
            pl_module.log_dict(figures, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.curvature is None:
            return
        failed, rejected = self._troubles()
        if failed + rejected > self._told:
            rank_zero_warn(
                f"THOR kept old curvature {failed + rejected - self._told} times in epoch {trainer.current_epoch}: "
                f"so far {failed} blocks could not be inverted and {rejected} layers' statistics were not finite. If "
                "this goes on, raise damping, lower lr, or look for overflows in the loss."
            )
            self._told = failed + rejected
        if trainer.logger is not None:
            # The same on all ranks; without sync_dist Lightning would warn that they might not be.
            pl_module.log("thor/failed_inversions", float(failed), sync_dist=True)
            pl_module.log("thor/rejected_windows", float(rejected), sync_dist=True)
            if self._options["trace_rule"] is not None:
                done, turns = self.curvature.refreshes
                pl_module.log("thor/refreshed_share", done / max(turns, 1), sync_dist=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.curvature is None:
            return
        modules = {uncompiled_name(name): module for name, module in self.curvature.model.named_modules()}
        for name, reason in self.curvature.left_out.items():
            if reason == "frozen" and _weight_trains(name, modules):
                self.curvature.left_out[name] = "frozen when fit began"
                rank_zero_warn(
                    f"{name!r} was frozen when fit began and has no curvature: it takes "
                    f"{MODES[self.curvature.mode].fallback} now that it trains. Start another fit from this one's "
                    "weights to precondition it."
                )

    def _troubles(self) -> tuple[int, int]:
        """Blocks that could not be inverted, and layers' windows that were not finite, so far. Waits for the device."""
        assert self.curvature is not None
        return int(self.curvature.factors.failed_inversions), int(self.curvature.factors.rejected_windows)

    def _figures(self) -> FitFigures:
        """Counts so far. Waits for the device."""
        assert self.curvature is not None
        (done, turns), (failed, rejected) = self.curvature.refreshes, self._troubles()
        return FitFigures(self.curvature.step, done, turns, failed, rejected)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_silent = not self.summary or self._is_quiet(trainer) or trainer.progress_bar_callback is None
        if self.curvature is None or is_silent or not trainer.is_global_zero:
            return
        figures = self._figures() - self._begin
        if not figures.n_steps:
            return
        updates = self.curvature.factors.updates.tolist()
        idle = [name for name, n in zip(self.curvature.layers, updates, strict=True) if not n]
        ratio = float(self._ratio_sum) / self._n_ratios if self._n_ratios else None
        print_fit(replace(figures, update_ratio=ratio, idle=tuple(idle)), len(self.curvature.layers))

    def _is_quiet(self, trainer: pl.Trainer) -> bool:
        return not self._is_measuring and not any(isinstance(one, ModelSummary) for one in _callbacks_of(trainer))

    # ── leaving ──

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown after an error.
        self._close()

    def _close(self) -> None:
        if self.curvature is not None:
            self.curvature.close()
        if self._optimizer is not None:
            self._optimizer.preconditioner = None
            self._optimizer = None

    # ── checkpoints ──

    def state_dict(self) -> dict[str, Any]:
        # Never empty: Lightning neither stores nor restores an empty state.
        curvature = None if self.curvature is None else self.curvature.state_dict()
        return {"curvature": curvature, "block_size": self.block_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not isinstance(state_dict, Mapping) or "curvature" not in state_dict:
            got = f"a dict with {sorted(map(str, state_dict))}" if isinstance(state_dict, Mapping) else repr(state_dict)
            raise ValueError(
                "ThorCallback.load_state_dict takes what ThorCallback.state_dict gave, a dict with 'curvature' and "
                f"'block_size', but got {got[:200]}. The checkpoint is damaged: go on from another one, or start "
                f"without its curvature by deleting checkpoint['callbacks']['{self.state_key}']."
            )
        # Before on_fit_start, but not on every strategy; and in validate and test, which setup of a fit forgets.
        state = state_dict["curvature"]
        if state is None:
            return
        if self.curvature is not None and self._optimizer is not None:
            self.curvature.load_state_dict(state)
        else:
            self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        # What is no dict at all is refused in load_state_dict.
        if self._fitting and (own is None or (isinstance(own, Mapping) and own.get("curvature", own) is None)):
            rank_zero_warn(
                "This checkpoint was saved without ThorCallback's curvature: the weights go on, the curvature starts "
                "anew with a refresh in the first step."
            )


@dataclass(frozen=True)
class _LossMultiplier:
    """What Lightning multiplied the loss by before backward: read where it lives, each time it is needed."""

    trainer: pl.Trainer
    pl_module: pl.LightningModule

    def __call__(self) -> float | Tensor:
        # Manual optimization divides by nothing; automatic divides by N, in a shorter last window too.
        n = self.trainer.accumulate_grad_batches if self.pl_module.automatic_optimization else 1
        scaler = _scaler_of(self.trainer)
        if scaler is None:
            return 1.0 / n
        # Scaling a one instead of get_scale(), which waits for the device.
        scale: Tensor = scaler.scale(torch.ones((), device=self.trainer.strategy.root_device))
        return scale / n


def _callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """The trainer's own list."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _scaler_of(trainer: pl.Trainer) -> Any | None:
    return getattr(trainer.precision_plugin, "scaler", None)


def _weight_trains(name: str, modules: Mapping[str, torch.nn.Module]) -> bool:
    # The projections of an attention are no modules, but parameters of one; perhaps all packed into one.
    owner, _, role = name.rpartition(".")
    places = ((name, "weight"), (owner, f"{role}_weight"), (owner, "in_proj_weight"))
    found = (getattr(modules.get(module), weight, None) for module, weight in places)
    return any(weight.requires_grad for weight in found if isinstance(weight, Tensor))


def _warn_of_clipping(trainer: pl.Trainer, optimizer: Thor) -> None:
    by_norm = trainer.gradient_clip_val and str(trainer.gradient_clip_algorithm or "norm").endswith("norm")
    matched = (
        group["match_rms"] is not None and MODES[group["mode"]].matches_rms and not MODES[group["mode"]].momentum_first
        for group in optimizer.param_groups
    )
    if by_norm and all(matched):
        rank_zero_warn(
            "gradient_clip_val clips the gradient's norm before it is preconditioned, and match_rms sets the scale "
            "afterwards: the clipping changes nothing. Lower lr, or set match_rms=None."
        )


def _warn_of_intervals(trainer: pl.Trainer) -> None:
    wrong = any(
        isinstance(config.scheduler, PerStepLR) and config.interval != "step" for config in trainer.lr_scheduler_configs
    )
    if wrong and trainer.lightning_module.automatic_optimization:
        rank_zero_warn(
            "PerStepLR is stepped once an epoch here, but its schedule counts steps: the learning rate hardly moves. "
            'Return {"optimizer": optimizer, "lr_scheduler": {"scheduler": PerStepLR(...), "interval": "step"}} from '
            "configure_optimizers (the command lightning-thor does so by itself)."
        )


def _the_thor_of(trainer: pl.Trainer) -> Thor:
    found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Thor)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"ThorCallback found {len(found)} Thor optimizers; it serves one. Put all parameters into one Thor, as "
            "parameter groups."
        )
    names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
    raise ValueError(
        f"ThorCallback found no Thor optimizer (configure_optimizers returned: {names}). Return configure_thor(self, "
        "lr=...) there (with LightningCLI: optimizer.class_path: lightning_thor.Thor), or remove the callback."
    )
