"""THOR for PyTorch Lightning: second-order training as a callback, a strategy and an optimizer."""

from lightning_thor.callback import ThorCallback
from lightning_thor.configure import configure_thor
from lightning_thor.curvature import Curvature
from lightning_thor.model_parallel import ThorModelParallelStrategy
from lightning_thor.optimizer import Thor
from lightning_thor.strategy import ThorDDPStrategy
from lightning_thor.user_layers import register_layer

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
