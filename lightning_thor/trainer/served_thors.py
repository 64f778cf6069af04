"""The `Thor` optimizers of a fit, each served with a curvature: at its start, and when the trainer gets another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.curvature.part_timer import PartTimer
from lightning_thor.distributed.dtensor import reshard
from lightning_thor.layers.base import Layer
from lightning_thor.layers.discovery import matrix_layers, name_some
from lightning_thor.optim.thor import Thor
from lightning_thor.preconditioning.modes import common_mode
from lightning_thor.trainer.monitor import ThorMonitor
from lightning_thor.trainer.strategies import ThorStrategyMixin
from lightning_thor.trainer.thors import (
    TrainingSteps,
    callbacks_of,
    is_training,
    loss_multiplier,
    parameters_of,
    takes_iterator,
    thors_of,
    trained_of,
    warn_of_clipping,
)
from lightning_thor.trainer.unfreezing import warn_of_layers_still_frozen, warn_of_layers_without_optimizer, wrap_again


class ServedThors:
    """Gives each `Thor` of a trainer a curvature, and takes it away when the fit ends.

    Args:
        trainer: in a fit.
        pl_module: its module.
        options: of each `Curvature`; ``loss_terms`` is given a batch.
        restored: state of the callback in a checkpoint that the fit goes on from, if it was loaded already.
        before_step: called before each training step.

    Attributes:
        curvatures: one for each `Thor`, in the order in which they came; also after the fit.
        by_optimizer: the same, until `close`.
        monitor: of the trainer, if it has one.
        looks: whether the next `look` looks at every parameter, whatever the trainer's optimizers say.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        options: Mapping[str, Any],
        *,
        restored: Mapping[str, Any] | None,
        before_step: Callable[[], None],
    ) -> None:
        self.curvatures: list[Curvature] = []
        self.by_optimizer: dict[Thor, Curvature] = {}
        self.monitor = next((one for one in callbacks_of(trainer) if isinstance(one, ThorMonitor)), None)
        self.looks = False
        self._trainer, self._pl_module, loss_terms = trainer, pl_module, options["loss_terms"]
        if loss_terms is not None and takes_iterator(pl_module):
            raise ValueError(
                f"loss_terms is given each batch, but {type(pl_module).__name__}.training_step takes dataloader_iter: "
                "let it take batch, or leave loss_terms out."
            )
        self._steps = steps = TrainingSteps(trainer.strategy, before_step)
        own = {"loss_terms": None if loss_terms is None else lambda: loss_terms(steps.batch)}
        self._options: dict[str, Any] = {**options, **own}
        self._restored = restored
        """State of curvatures, some of which may come later."""
        self._trained: dict[Thor, set[nn.Parameter]] = {}
        """The parameters of each that have trained so far in this fit."""
        self._wrapped = {p for p in pl_module.parameters() if p.requires_grad}
        """Those of the module that trained when its strategy wrapped it last."""
        self._seen: tuple[list[Optimizer], list[int]] = [], []
        """The trainer's optimizers, and how many groups each had, when they were looked at last."""
        self._unfrozen_there: list[Layer] = []
        """Layers of a checkpoint that were frozen here when it was loaded."""

    def serve(self) -> list[Thor]:
        """Give each new `Thor` of the trainer its curvature, and what a checkpoint has of it; returns the new ones."""
        trainer = self._trainer
        new = [optimizer for optimizer in thors_of(trainer) if optimizer not in self.by_optimizer]
        for optimizer in new:
            self._connect(optimizer, self._curvature_for(optimizer))
        # Manual optimization may take several backward passes to a step.
        if len(self.curvatures) > 1 or not self._pl_module.automatic_optimization:
            for curvature in self.curvatures:
                curvature.send_in_update()
        for optimizer in new:
            self._restore(self.by_optimizer[optimizer])
            self._warn_of(optimizer)
        self._seen = list(trainer.optimizers), [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        return new

    def _curvature_for(self, optimizer: Thor) -> Curvature:
        trainer, pl_module = self._trainer, self._pl_module
        if optimizer.preconditioner is not None:
            raise ValueError(
                f"ThorCallback found a {type(optimizer).__name__} that has a preconditioner already. Remove the "
                "callback, or build the optimizer without preconditioner=..."
            )
        own = {*parameters_of(optimizer)}
        others = {p for other in {*thors_of(trainer), *self.by_optimizer} for p in parameters_of(other)} - own
        curvature = Curvature(
            pl_module,
            mode=common_mode(group["mode"] for group in optimizer.param_groups).name,
            loss_multiplier=partial(loss_multiplier, trainer, pl_module),
            parameters=own,
            # Networks with a Thor each, as a GAN's, have an output layer each.
            output_layer=next(reversed(matrix_layers(pl_module, without=others)), None) if others else None,
            **self._options,
        )
        if curvature.factors.device.type != "cuda" or self.monitor is not None:
            curvature.timer = PartTimer(curvature.factors.device)
        curvature.measures_change = True
        # The trainer's stage, not the model's mode: fit trains a model that was left in eval mode too.
        curvature.is_listening = partial(is_training, trainer, optimizer)
        return curvature

    def _connect(self, optimizer: Thor, curvature: Curvature) -> None:
        trainer, pl_module = self._trainer, self._pl_module
        # Now: while ``fully_shard`` holds weights whole, a model has other parameters.
        optimizer.numbered = tuple(pl_module.parameters())
        self.curvatures.append(curvature)
        self.by_optimizer[optimizer] = curvature
        self._trained[optimizer] = trained_of(optimizer)
        optimizer.preconditioner = curvature
        if isinstance(trainer.strategy, ThorStrategyMixin):
            own = {*parameters_of(optimizer)}
            named = {name: p for name, p in pl_module.named_parameters() if p in own}
            optimizer.preconditioner = trainer.strategy.connect_curvature(curvature, named)

    def _warn_of(self, optimizer: Thor) -> None:
        """Warn of what has no effect."""
        curvature = self.by_optimizer[optimizer]
        warn_of_clipping(self._trainer, optimizer)
        for other in self.curvatures:
            # The layers of another Thor are not left out.
            if other is not curvature:
                for own, others in ((curvature, other.layers), (other, curvature.layers)):
                    own.left_out = {name: why for name, why in own.left_out.items() if name not in others}

    def look(self) -> list[Thor]:
        """Serve a `Thor` that the trainer has got, and give curvature to layers that began to train; between two steps.
        Returns the optimizers that are new."""
        trainer, strategy = self._trainer, self._trainer.strategy
        n_groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        if not (self.looks or self._seen != (trainer.optimizers, n_groups)):
            return []
        reshard(self._pl_module)  # after a validation it has other parameters than the optimizers
        new = self.serve()
        self.looks = any(is_lazy(p) for optimizer in self.by_optimizer for p in parameters_of(optimizer))
        further = {
            optimizer: more for optimizer, trained in self._trained.items() if (more := trained_of(optimizer) - trained)
        }
        if further and isinstance(strategy, ThorStrategyMixin):
            began = {p for more in further.values() for p in more}
            strategy.check_parameters({name: p for name, p in self._pl_module.named_parameters() if p in began})
        # Not only what is new: it may have been frozen while the model was wrapped.
        if any(trained_of(optimizer) - self._wrapped for optimizer in self._trained):
            wrap_again(strategy)
            self._wrapped = {p for p in self._pl_module.parameters() if p.requires_grad}
        for optimizer, more in further.items():
            self._trained[optimizer] |= more
            names = self.by_optimizer[optimizer].include(more)
            if names:
                rank_zero_info(f"THOR: {name_some(names)} began to train, and have curvature from this step on.")
        for curvature in self.curvatures:
            warn_of_layers_without_optimizer(curvature, trainer.optimizers)
        warn_of_layers_still_frozen(self._unfrozen_there)
        self._unfrozen_there = []
        return new

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load the curvatures that a checkpoint's ``state`` of the callback has; what it has of others waits until they
        come."""
        self._restored = state
        for curvature in self.curvatures:
            self._restore(curvature)

    def _restore(self, curvature: Curvature) -> None:
        """Load the state that the checkpoint has of a curvature, by its place among all."""
        place = self.curvatures.index(curvature)
        states = [] if self._restored is None else [self._restored["curvature"], *self._restored.get("others", ())]
        if place < len(states):
            before = set(curvature.layers)
            curvature.load_state_dict(states[place])
            self._unfrozen_there += [layer for name, layer in curvature.layers.items() if name not in before]
        if place >= len(states) - 1:
            self._restored = None

    def end_batch(self) -> None:
        """Hold on to the batch no longer."""
        self._steps.batch = None

    def close(self) -> None:
        """Take the curvatures from their optimizers, and their hooks off the model."""
        for optimizer, curvature in self.by_optimizer.items():
            curvature.close()
            optimizer.preconditioner = None
        self.by_optimizer, self._trained = {}, {}
        self._steps.close()
