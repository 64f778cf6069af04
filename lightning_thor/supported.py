"""Which of Lightning's strategies `ThorCallback` works with, and what to use instead of the others."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy

from lightning_thor.model_parallel import ThorModelParallelStrategy

SHARD = (
    'Use Trainer(strategy="thor_fsdp2"), and shard the model in configure_model by '
    'fully_shard(self.net, mesh=self.device_mesh["data_parallel"])'
)
# DeepSpeed's and XLA's strategies are subclasses of those that work.
REFUSED: tuple[tuple[Any, str], ...] = (
    (FSDPStrategy, f"FSDP1 flattens weights, and layers have none of their own any more. {SHARD}."),
    (DeepSpeedStrategy, f'its engine keeps gradients to itself. {SHARD}, or "thor_ddp" for a model that fits.'),
    (ModelParallelStrategy, f"it would have whole gradients on no rank. {SHARD}, as you do already."),
    (
        XLAStrategy | SingleDeviceXLAStrategy,
        'it has not been tried on XLA devices. Use GPUs or CPUs with "thor_ddp", "thor_fsdp2" or a single device.',
    ),
)


def check_strategy(strategy: Strategy) -> None:
    """Raise a ValueError that says what to use, unless gradients lie as `ThorCallback` needs them with ``strategy``."""
    if isinstance(strategy, ThorModelParallelStrategy):
        return
    for refused, advice in REFUSED:
        if isinstance(strategy, refused):
            raise ValueError(f"ThorCallback does not support {type(strategy).__name__}: {advice}")
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"ThorCallback does not support {type(strategy).__name__}: it knows how layers and gradients lie with "
            '"thor_ddp", "ddp", "thor_fsdp2" and on a single device. Use Trainer(strategy=...) with one of them.'
        )
