"""`setup_fabric`: a module and its `Thor` under Lightning Fabric."""

from __future__ import annotations

from typing import Any
from weakref import ref

from lightning.fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.optim.thor import Thor
from lightning_thor.preconditioning.modes import common_mode
from lightning_thor.trainer.packages import is_lightnings
from lightning_thor.trainer.thors import loss_scale, parameters_of


def setup_fabric(
    fabric: Fabric, module: nn.Module, optimizer: Thor, *, accumulate_grad_batches: int = 1, **options: Any
) -> tuple[Any, Any, Curvature]:
    """Does what ``fabric.setup(module, optimizer)`` does, and gives the optimizer its curvature.

    Call it after ``fabric.launch()``. The loop is then Fabric's: ``fabric.backward(loss)``, ``optimizer.step()``. Under
    a loss scale the curvature reads the scale, and forgets a step that the scaler skipped. Save and restore the
    curvature beside the others: ``fabric.save(path, {"model": model, "optimizer": optimizer, "curvature": curvature})``
    and ``fabric.load`` with the same dict.

    Args:
        fabric: on a single device, or with ``strategy="ddp"``.
        module: of the optimizer's parameters.
        optimizer: its ``preconditioner`` is set.
        accumulate_grad_batches: the number that your loop divides the loss by, if it adds up the gradients of so many
            batches before a step.
        **options: of `Curvature`; but ``mode``, ``loss_multiplier`` and ``parameters`` are known.

    Returns:
        ``(module, optimizer, curvature)``, the first two as Fabric wraps them.

    Raises:
        TypeError: the optimizer is no `Thor`, or an option is one that is known.
        ValueError: the strategy is not supported, the optimizer has a preconditioner, or an option is out of its range.
    """
    if not is_lightnings(fabric.strategy, "SingleDeviceStrategy", "DDPStrategy"):
        raise ValueError(
            f"setup_fabric does not support {type(fabric.strategy).__name__}: it knows where layers and gradients are "
            'on a single device and with Fabric(strategy="ddp"). A model that fully_shard shards trains under a '
            'Trainer, strategy="thor_fsdp2", or in a plain loop, preconditioner=ShardedCurvature(Curvature(model)).'
        )
    if type(accumulate_grad_batches) is not int or accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches must be an int of at least 1, got {accumulate_grad_batches!r}.")
    if not isinstance(optimizer, Thor):
        raise TypeError(
            f"setup_fabric takes a Thor, got a {type(optimizer).__name__}: build it by configure_thor(module, lr=...). "
            "fabric.setup(module, optimizer) is for other optimizers."
        )
    known = options.keys() & {"mode", "loss_multiplier", "parameters"}
    if known:
        raise TypeError(
            f"setup_fabric takes no {', '.join(sorted(known))}: the mode is the optimizer's, configure_thor(module, "
            "mode=...), as are the parameters, and the loss's multiplier follows from accumulate_grad_batches."
        )
    if optimizer.preconditioner is not None:
        raise ValueError("setup_fabric makes the curvature itself: build the optimizer without preconditioner=...")
    model = fabric.setup_module(module)  # which moves the parameters to their device
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    curvature = Curvature(
        module,
        mode=common_mode(group["mode"] for group in optimizer.param_groups).name,
        loss_multiplier=lambda: loss_scale(scaler, fabric.device) / accumulate_grad_batches,
        parameters=parameters_of(optimizer),
        **options,
    )
    optimizer.preconditioner = curvature
    if scaler is not None:
        fabric._callbacks.append(_ForgetSkippedSteps(curvature, optimizer))  # before, or an empty list is not shared
    return model, fabric.setup_optimizers(optimizer), curvature


class _ForgetSkippedSteps:
    """Empties the curvature's window after a step that the scaler skipped: Fabric calls no ``step`` then."""

    def __init__(self, curvature: Curvature, optimizer: Thor) -> None:
        # Fabric keeps its callbacks as long as it lives; models of earlier trainings are to go.
        self.curvature, self.optimizer, self.applied = ref(curvature), ref(optimizer), curvature.step

    def on_after_optimizer_step(self, strategy: Any, optimizer: Optimizer) -> None:
        curvature = self.curvature()
        if curvature is not None and optimizer is self.optimizer():
            if curvature.step == self.applied:
                curvature.discard()
            self.applied = curvature.step
