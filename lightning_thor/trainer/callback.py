"""ThorCallback: owns the curvature during fit, and decides when it listens; it computes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_thor.block_size.choose import BlockSplit
from lightning_thor.curvature.callables import BatchFn, IntStepFn, StepFn
from lightning_thor.curvature.curvature import Curvature
from lightning_thor.curvature.options import check_options
from lightning_thor.distributed.dtensor import reshard
from lightning_thor.factors.damping import DampingRule
from lightning_thor.optim.options import unknown_options
from lightning_thor.optim.thor import Thor
from lightning_thor.trainer.block_size_trial import report_split, try_block_sizes
from lightning_thor.trainer.checkpoints import folder_advice, is_folder_of_shards, weights_advice
from lightning_thor.trainer.fit_log import FitLog
from lightning_thor.trainer.packages import is_lightnings
from lightning_thor.trainer.served_thors import ServedThors
from lightning_thor.trainer.start_report import print_curvature
from lightning_thor.trainer.strategies import check_strategy
from lightning_thor.trainer.thors import (
    callbacks_of,
    no_thor,
    parameters_of,
    run_folder,
    scaler_of,
    thors_of,
    warn_of_intervals,
)


class ThorCallback(Callback):
    """Gives the `Thor` optimizer of a fit its curvature, for the mode it has.

    Use it with ``return configure_thor(self)``. A Trainer takes one of it. `Curvature` explains its options at length.

    It serves any number of `Thor`, beside other optimizers: each has a curvature of its own parameters, with these
    options, and takes the last matrix that no other `Thor` has for its output layer. One that ``trainer.optimizers``
    gets in mid-run is served from the next batch on. Layers that are unfrozen in mid-run, as by Lightning's
    ``BackboneFinetuning``, get curvature in the first batch of an epoch, or as soon as ``add_param_group`` adds their
    parameters; DDP then averages their gradients too. Statistics are of the gradients that a step uses:
    ``optimizer.zero_grad()`` empties them as well, and where ``toggle_optimizer`` freezes a layer, another optimizer's
    loss adds nothing to them.

    Args:
        damping: greater than 0, added to the eigenvalues of the factors, or a function of the step. (A function is in a
            configuration file a class of such, by ``class_path``: one of `lightning_thor.schedules`, or your own.)
        damping_rule: how damping is shared between A and G: ``"trace"`` (relative to their mean eigenvalues), ``"pi"``
            or ``"sqrt"`` (absolute).
        block_size: size of the largest diagonal block of a factor; None keeps factors whole; ``"auto"`` chooses it when
            fit starts, on the first training batch, by `lightning_thor.choose_block_size`, and a resumed run goes on
            with its checkpoint's.
        update_every_n_steps: steps from one refresh of the curvature to the next, or a function of the step. None: 1 at
            first, a tenth of the steps so far from step 20 on, 10 from step 100 on, a hundredth of the steps so far
            from step 1,000 on, 100 from step 10,000 on.
        averaging: weight of the past in the factors' moving average, in [0, 1); 0 uses the last batch alone.
        precondition_bias: take biases of linear layers and convolutions into A; otherwise they take plain momentum.
        stagger: refresh each layer at a step of its own within the interval, so that step times stay flat.
        trace_rule: invert a layer only if the trace of its curvature moved: ``"THOR"``, ``"THOR_stop"``, ``"THOR_NT"``
            or ``(update_above, stop_below)``; None inverts all.
        max_rows: rows of a batch to take statistics from, shared by all processes; None for all.
        statistics: ``"expand"`` takes each position of a convolution or sequence as a row, ``"masked"`` those that the
            loss depends on (no padding), ``"reduce"`` each sample, ``"thor"`` what MindSpore's nn.thor does.
        loss_reduction: ``"mean"`` or ``"sum"``: how the loss reduces over samples.
        fused: number of parts of linear layers whose outputs are a concatenation, by pattern of the name, such as
            ``{"*.qkv": 3}``.
        skip_layers: names of modules, or patterns of names, that take plain momentum with all that is inside of them,
            such as ``["head"]``.
        loss_terms: gives, of a training batch, how many terms the mean of its loss has: a number, or a 0-dimensional
            tensor. As in `Curvature`; needed where labels are left out of the mean and their number differs between
            micro-batches or processes: ``lambda batch: (batch["labels"] != -100).sum()``.
        waits_for_thor: let a fit begin without a `Thor`, which ``trainer.optimizers`` gets later; False: its absence is
            an error.
        summary: print what is preconditioned when fit starts, and how a block size was chosen; the latter is also
            saved, as ``thor_split.json`` and, where matplotlib is, ``thor_split.png``, beside the logger's files.
            Equal layers are one row; ``"full"`` has a row for each. None, the default: with the model's summary, thus
            not with ``Trainer(enable_model_summary=False)``.
        **others: none; the error of an option of `Thor` says where it belongs.

    Raises:
        TypeError: an option of another name.
        ValueError: an option out of its range.

    Logs, where there is a logger, every ``log_every_n_steps`` of the Trainer: ``thor/refreshes``, the refreshes of a
    layer so far, on average; ``thor/inverse_age``, the steps since its last one; ``thor/damping``, as of then;
    ``thor/update_to_weights``, the norm of the step (of all steps of the batch together, where manual optimization
    takes several) over the norm of the weights, from a sample of their entries (of sharded ones, of rank 0's);
    ``thor/factor_change``, ``‖F - F_old‖ / ‖F_old‖`` at a refresh since the last logged step, or before, the geometric
    mean over all A and G that were not 0 before (0 if none changed yet); and the shares of the time since then that
    steps spent in THOR's parts, ``thor/time_in_statistics``, ``_inversion``, ``_communication`` and ``_directions`` (on
    a GPU only with a `ThorMonitor`). At each epoch's end: ``thor/failed_inversions`` and ``thor/rejected_windows``, the
    blocks that kept an old inverse and the windows of layers that were left out for not being finite, so far: both stay
    0 as long as all is well; with a trace rule ``thor/refreshed_share``, the refreshes that were done over those that
    there would have been without it. When fit ends, these figures are printed with advice, if what ``summary`` says is
    printed and there is a progress bar.
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
        statistics: Literal["expand", "masked", "reduce", "thor"] = "expand",
        loss_reduction: str = "mean",
        fused: dict[str, int] | None = None,
        skip_layers: Sequence[str] = (),
        loss_terms: BatchFn | None = None,
        waits_for_thor: bool = False,
        summary: bool | Literal["full"] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            names = unknown_options(others, inspect.signature(ThorCallback).parameters)
            if own := sorted(others.keys() & {"loss_multiplier", "parameters", "output_layer"}):
                raise TypeError(f"ThorCallback takes no {', '.join(own)}, which it finds by itself: leave it out.")
            raise TypeError(
                f"ThorCallback does not know {names}. lr, mode, weight_decay and what else concerns steps are options "
                "of the optimizer: configure_thor(self, lr=...), or Thor. A strategy is an option of the Trainer: "
                "Trainer(strategy=...)."
            )
        if loss_terms is not None and not callable(loss_terms):
            raise ValueError(f"loss_terms must be a function of a batch, or None, got {loss_terms!r}.")
        # "auto" is the callback's own value.
        self._options = check_options(locals() | {"block_size": None if block_size == "auto" else block_size})
        self._options["block_size"] = block_size
        if not (summary is None or isinstance(summary, bool) or summary == "full"):
            raise ValueError(f'summary must be True, False, "full" or None, got {summary!r}.')
        if not isinstance(waits_for_thor, bool):
            raise ValueError(f"waits_for_thor must be True or False, got {waits_for_thor!r}.")
        self._waits_for_thor = waits_for_thor
        self.summary = summary
        self.curvatures: list[Curvature] = []
        """Of the present or last fit, one for each `Thor`, in the order in which they came."""
        self.block_size: int | None = None
        """Of these curvatures."""
        self.split: BlockSplit | None = None
        """How it was chosen, if this fit did."""
        self._restored: dict[str, Any] | None = None
        self._fitting = False
        self._served: ServedThors | None = None
        """Of the present fit; None outside of one."""
        self._fit_log: FitLog | None = None
        """None before training began, and so in a fit of a run that was finished."""
        self._window_is_open = False
        self._applied: list[int] = []
        """Steps of each curvature when the last batch ended."""
        self._called = 0

    @property
    def curvature(self) -> Curvature | None:
        """The first of `curvatures`, if there is one."""
        return self.curvatures[0] if self.curvatures else None

    def __getstate__(self) -> dict[str, Any]:
        # A fit's curvatures and all that belongs to them have functions of the trainer; copies start anew.
        own = {key: value for key, value in self.__dict__.items() if key not in ("log", "log_dict")}  # the module's
        return own | {"curvatures": [], "_served": None, "_fit_log": None}

    @property
    def state_key(self) -> str:
        # Constant: the default is the class's name, and a subclass would lose the state.
        return "ThorCallback"

    def measure_block_size(self) -> None:
        """From now on choose the block size when a fit starts, whatever was given, and report it."""
        self._options["block_size"] = "auto"
        self.summary = self.summary or True

    # ── wiring ──

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        check_strategy(trainer.strategy)
        # Lightning's own error comes first, unless one was appended to the list.
        if sum(isinstance(one, ThorCallback) for one in callbacks_of(trainer)) > 1:
            raise ValueError("Trainer(callbacks=...) has more than one ThorCallback: leave one, with all the options.")
        # To the front: LearningRateFinder and BatchSizeFinder train inside their own on_fit_start, after ours then.
        callbacks = callbacks_of(trainer)
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._restored = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        self.curvatures = []
        thors = thors_of(trainer)
        if not thors and not self._waits_for_thor:
            raise ValueError(no_thor(trainer))
        if not thors and self._options["block_size"] == "auto":
            raise ValueError('block_size="auto" needs the Thor when fit starts. Give ThorCallback a number instead.')
        parameters = [p for optimizer in thors for p in parameters_of(optimizer)]
        self.block_size, self.split = self._decide_block_size(trainer, pl_module, parameters)
        if self.summary is not False and self.split is not None and trainer.is_global_zero:
            report_split(self.split, run_folder(trainer), quiet=self._is_quiet(trainer))
        self._serve(trainer, pl_module)
        warn_of_intervals(trainer)

    def _decide_block_size(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, parameters: list[torch.nn.Parameter]
    ) -> tuple[int | None, BlockSplit | None]:
        block_size = self._options["block_size"]
        if block_size != "auto":
            return block_size, None
        if self._restored is not None:
            return _saved_block_size(self._restored), None
        names = ("precondition_bias", "max_rows", "statistics", "fused", "skip_layers")
        split = try_block_sizes(trainer, pl_module, parameters, **{name: self._options[name] for name in names})
        return split.block_size, split

    def _serve(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give each `Thor` of the trainer its curvature."""
        options = {**self._options, "block_size": self.block_size}
        served = ServedThors(
            trainer,
            pl_module,
            options,
            restored=self._restored,
            before_step=partial(self._look, trainer),  # again: hooks of the module come after this callback's
        )
        self._served, self._restored, self.curvatures = served, None, served.curvatures
        self._print(trainer, served.serve())
        self._applied = [curvature.step for curvature in self.curvatures]

    def _print(self, trainer: pl.Trainer, new: list[Thor]) -> None:
        """Print what is preconditioned of optimizers that got their curvature."""
        if self._served is not None and trainer.is_global_zero and not self._is_quiet(trainer):
            for optimizer in new:
                print_curvature(self._served.by_optimizer[optimizer], full=self.summary == "full")

    def _look(self, trainer: pl.Trainer) -> None:
        """Serve what is new, between two steps of training."""
        if self._served is None or self._fit_log is None or self._window_is_open:
            return
        if new := self._served.look():
            self._print(trainer, new)
            self._applied = [curvature.step for curvature in self.curvatures]

    # ── each step ──

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not when fit starts: some strategies restore a checkpoint after that.
        assert self._served is not None
        self._served.looks, self._window_is_open = True, False
        self._applied, self._called = [curvature.step for curvature in self.curvatures], trainer.global_step
        self._fit_log = FitLog(self._served, has_trace_rule=self._options["trace_rule"] is not None)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._served is not None:
            self._served.looks = True
            reshard(pl_module)  # for what is unfrozen in this hook, by others that come after

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._served is None or self._fit_log is None:
            return
        self._look(trainer)
        self._fit_log.start_batch(trainer)
        for curvature in self.curvatures:
            if curvature.timer is not None:
                curvature.timer.begin_step()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._served is None or self._fit_log is None:
            return
        self._served.end_batch()
        for curvature in self.curvatures:
            if curvature.timer is not None:
                curvature.timer.end_step()
        steps = [curvature.step for curvature in self.curvatures]
        self._window_is_open = trainer.global_step == self._called
        # A GradScaler that found an overflow calls no Optimizer.step and tells nobody: only the counters differ.
        skipped = not self._window_is_open and steps == self._applied
        # In manual optimization another optimizer may have stepped; what is not finite is left out all the same.
        if skipped and pl_module.automatic_optimization and scaler_of(trainer) is not None:
            for optimizer in self._served.by_optimizer.keys() & thors_of(trainer):  # one may have come in this step
                self._served.by_optimizer[optimizer].discard()
        self._fit_log.end_batch(trainer, pl_module, self._applied)
        self._called, self._applied = trainer.global_step, steps

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit_log is not None:
            self._fit_log.end_epoch(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_silent = self._is_quiet(trainer) or trainer.progress_bar_callback is None
        if self._fit_log is not None and trainer.is_global_zero and not is_silent:
            self._fit_log.print()

    def _is_quiet(self, trainer: pl.Trainer) -> bool:
        if self.summary is not None:
            return self.summary is False
        return not any(is_lightnings(one, "ModelSummary") for one in callbacks_of(trainer))

    # ── leaving ──

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown after an error.
        self._close()
        # Strategies of Lightning's own open it as a file; the words of the error on its way are changed.
        if isinstance(exception, IsADirectoryError) and is_folder_of_shards(exception.filename):
            exception.strerror = folder_advice(exception.filename)
        elif isinstance(exception, KeyError) and "save_weights_only" in str(exception):
            rank_zero_warn(weights_advice(trainer.ckpt_path))

    def _close(self) -> None:
        if self._served is not None:
            self._served.close()
        self._served = self._fit_log = None

    # ── checkpoints ──

    def state_dict(self) -> dict[str, Any]:
        # Never empty: Lightning neither stores nor restores an empty state.
        first, *others = [None] if not self.curvatures else [curvature.state_dict() for curvature in self.curvatures]
        return {"curvature": first, "block_size": self.block_size} | ({"others": others} if others else {})

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # What `state_dict` returned, which rank 0 writes; a subclass may save something else.
        own = checkpoint.get("callbacks", {}).get(self.state_key, {})
        states = [own["curvature"], *own.get("others", ())] if "curvature" in own else []
        for curvature, state in zip(self.curvatures, states, strict=False):
            curvature.gather_inverses(state, keeps=trainer.is_global_zero)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not isinstance(state_dict, Mapping) or "curvature" not in state_dict:
            got = f"a dict with {sorted(map(str, state_dict))}" if isinstance(state_dict, Mapping) else repr(state_dict)
            raise ValueError(
                "ThorCallback.load_state_dict takes what ThorCallback.state_dict gave, a dict with 'curvature' and "
                f"'block_size', but got {got[:200]}. The checkpoint is damaged: go on from another one, or start "
                f"without its curvature by deleting checkpoint['callbacks']['{self.state_key}']."
            )
        # Before on_fit_start, but not on every strategy; and in validate and test, which setup of a fit forgets.
        if state_dict["curvature"] is not None:
            if self._served is None:
                self._restored = dict(state_dict)
            else:
                self._served.restore(dict(state_dict))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        # What is no dict at all is refused in load_state_dict.
        if self._fitting and (own is None or (isinstance(own, Mapping) and own.get("curvature", own) is None)):
            rank_zero_warn(
                "This checkpoint was saved without ThorCallback's curvature: the curvature starts anew, with a refresh "
                "in the first step."
            )
        # A strategy that loads checkpoints after on_fit_start has chosen a block size by then.
        chose = self._served is not None and self._options["block_size"] == "auto"
        if chose and isinstance(own, Mapping) and own.get("curvature") is not None:
            saved = _saved_block_size(own)
            if saved != self.block_size:
                self._close()
                self.block_size, self.split = saved, None
                self._serve(trainer, pl_module)


def _saved_block_size(state: Mapping[str, Any]) -> int | None:
    """The block size of a checkpoint's run; raises a ValueError where ``block_size="auto"`` cannot know it."""
    if "block_size" not in state:
        raise ValueError(
            'The checkpoint is of a version that did not note its block size, so block_size="auto" cannot go on with '
            "it. Give ThorCallback the block_size of the run that was saved."
        )
    size: int | None = state["block_size"]
    return size
