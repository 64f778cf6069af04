"""SIGTERM, and the signal by which SLURM requeues a job, on several ranks."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_thor.distributed.joint_step import SECONDS_ALONE, JointStep


class JointSignals(pl.Callback):
    """Lets all ranks of a fit follow a signal at the end of one and the same training batch.

    Lightning's own handlers broadcast, or save a checkpoint, wherever a signal happens to interrupt a rank; another
    rank is in another collective then, and each waits for the other. Here a handler only takes note. The ranks agree on
    one of the next batches, and follow the signal when the optimizer has stepped in it: after SIGTERM all end, and
    ``ModelCheckpoint(save_on_exception=True)`` saves; after SLURM's signal all save, and rank 0 requeues the job. So
    they do with SIGTERM on one of the next batches of a validation. In tests and predictions it ends a rank after the
    batch at hand.

    Args:
        trainer: has not registered its handlers yet.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        connector: Any = trainer._signal_connector
        self._trainer, self._connector, self._type = trainer, connector, type(connector)
        self._end, self._requeue, self._evaluation = JointStep(), JointStep(), JointStep()
        self._has_warned = False
        self._step = 0
        # By these names Lightning finds its handlers when it registers them.
        connector._sigterm_notifier_fn, connector._slurm_sigusr_handler_fn = self._note_sigterm, self._note_requeue

    def _note_sigterm(self, signum: Any, frame: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None and not self._end.is_told:
            launcher.kill(signum)
        self._end.tell()
        self._evaluation.tell()
        if self._trainer.state.fn != "fit":
            self._connector.received_sigterm = True

    def _note_requeue(self, signum: Any, frame: Any) -> None:
        if self._trainer.state.fn == "fit":
            self._requeue.tell()
        else:
            self._type._slurm_sigusr_handler_fn(self._connector, signum, frame)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to agree on one of its batches."""
        self._evaluation = JointStep()
        if self._end.is_told:
            self._evaluation.tell()

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Agree on the batch, if SIGTERM came."""
        self._evaluation.begins(1, trainer.strategy.root_device)

    def on_validation_batch_end(self, *_: Any) -> None:
        """End in the batch that was agreed on."""
        self._end_if_due(self._evaluation)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End before results are averaged over ranks, if others end in a batch; or agree on one of training's."""
        self._evaluation.ends()
        if self._evaluation.is_due and trainer.state.fn == "fit":
            raise SIGTERMException

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Agree on the batch, if a signal came."""
        self._step = trainer.global_step
        for signal in (self._end, self._requeue):
            signal.begins(trainer.accumulate_grad_batches, trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Follow signals in the batch that was agreed on, or in the first one after it in which the optimizer steps."""
        if trainer.global_step == self._step:
            return
        if self._requeue.is_due:
            self._requeue = JointStep()
            self._type._slurm_sigusr_handler_fn(self._connector, None, None)
        elif self._requeue.is_alone and not self._has_warned:
            self._has_warned = True
            _warn_of_one_alone("SLURM's signal", "Until it has, nothing is saved and requeued")
        self._end_if_due(self._end)

    def _end_if_due(self, signal: JointStep) -> None:
        if signal.is_due:
            rank_zero_info(f"Received SIGTERM: all ranks end after step {self._trainer.global_step}.")
            self._connector.received_sigterm = True
        elif signal.is_alone:
            _warn_of_one_alone("SIGTERM", "It ends now, and the others with errors")
            self._connector.received_sigterm = True


def _warn_of_one_alone(signal: str, what: str) -> None:
    warnings.warn(
        f"This rank received {signal}, and {SECONDS_ALONE:.0f} seconds and some steps later some other rank had not. "
        f"{what}. Send it to all ranks, as srun, torchrun and Lightning's own launcher do.",
        stacklevel=3,
    )
