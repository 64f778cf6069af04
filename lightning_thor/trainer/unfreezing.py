"""What has to follow when layers are unfrozen in mid-run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.layers.base import Layer
from lightning_thor.layers.discovery import name_some, parameters_of
from lightning_thor.trainer.packages import is_lightnings
from lightning_thor.trainer.thors import callbacks_of


def wrap_again(strategy: Any) -> None:
    """Let DDP average the gradients of parameters that began to train: it knows those that trained when it wrapped the
    model. Call it on all ranks, between two steps."""
    if is_lightnings(strategy, "DDPStrategy") and strategy.model is not strategy.lightning_module:
        strategy.model = strategy.lightning_module
        state: Any = getattr(strategy, "_ddp_comm_state", None)
        if hasattr(state, "error_dict"):
            # PowerSGD remembers each bucket by its number, and DDP chooses them anew in its first steps.
            state.iter = 0
            for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                memory.clear()
        strategy.configure_ddp()


def restore_groups(trainer: pl.Trainer) -> None:
    """Let Lightning's finetuning callbacks bring back the parameter groups that they added in the run that was saved:
    they do so when a fit starts, and a strategy may restore a checkpoint after that."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, BaseFinetuning):
            # Does nothing but this; a subclass may do more when a fit starts, and has done it.
            BaseFinetuning.on_fit_start(callback, trainer, trainer.lightning_module)


def warn_of_layers_without_optimizer(curvature: Curvature, optimizers: Sequence[Optimizer]) -> None:
    """Warn, once, of layers that were frozen and are no more, but whose parameters no optimizer has."""
    trained = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    frozen = {name for name, reason in curvature.left_out.items() if reason == "frozen"}
    idle = []
    for name, parameters in parameters_of(curvature.model, frozen).items():
        own = {p for p in parameters if p.requires_grad}
        if own:
            curvature.left_out[name] = "not in the optimizer"
            idle += [] if own & trained else [name]
    if idle:
        names = ", ".join(map(repr, idle)) if len(idle) < 6 else name_some(idle)
        rank_zero_warn(
            f"{names} was frozen when fit began and is unfrozen now, but no optimizer has its parameters: it does not "
            'train. Add them: optimizer.add_param_group({"params": list(layer.parameters())}).'
        )


def warn_of_layers_still_frozen(layers: Sequence[Layer]) -> None:
    """Warn of layers that trained in the run that was saved and do not train now."""
    frozen = [layer.name for layer in layers if not any(use.trains for use in layer.uses)]
    if frozen:
        rank_zero_warn(
            f"{name_some(frozen)}: trained in the checkpoint and frozen now. (Lightning's BackboneFinetuning leaves "
            "the backbone frozen where a fit goes on after it unfroze it, with any optimizer.) If they are to train, "
            "unfreeze them in on_train_start; their curvature was loaded."
        )
