"""THOR for PyTorch Lightning: second-order training as a callback, a strategy and an optimizer."""

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.layers.registry import register_layer
from lightning_thor.optim.param_groups import configure_thor
from lightning_thor.optim.thor import Thor
from lightning_thor.trainer.callback import ThorCallback
from lightning_thor.trainer.ddp_strategy import ThorDDPStrategy
from lightning_thor.trainer.fsdp2_strategy import ThorModelParallelStrategy

__version__ = "0.1.0"
__all__ = [
    "Curvature",
    "Thor",
    "ThorCallback",
    "ThorDDPStrategy",
    "ThorModelParallelStrategy",
    "configure_thor",
    "register_layer",
]
