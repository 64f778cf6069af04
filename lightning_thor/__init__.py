"""THOR for PyTorch Lightning: second-order training as a callback, a strategy and an optimizer."""

from importlib import import_module
from typing import Any

from lightning_thor import former_addresses
from lightning_thor import schedules as schedules
from lightning_thor.block_size.choose import choose_block_size
from lightning_thor.curvature.curvature import Curvature
from lightning_thor.curvature.exact import exact_factors
from lightning_thor.fsdp.sharded_curvature import ShardedCurvature
from lightning_thor.layers.registry import register_layer
from lightning_thor.optim.param_groups import configure_thor
from lightning_thor.optim.thor import Thor
from lightning_thor.trainer.callback import ThorCallback
from lightning_thor.trainer.ddp_strategy import ThorDDPStrategy
from lightning_thor.trainer.fabric import setup_fabric
from lightning_thor.trainer.fsdp2_strategy import ThorModelParallelStrategy
from lightning_thor.trainer.monitor import ThorMonitor
from lightning_thor.trainer.strategies import ThorStrategyMixin

former_addresses.install()

__version__ = "0.1.0"
__all__ = [
    "Curvature",
    "ShardedCurvature",
    "Thor",
    "ThorCallback",
    "ThorDDPStrategy",
    "ThorModelParallelStrategy",
    "ThorMonitor",
    "ThorStrategyMixin",
    "choose_block_size",
    "configure_thor",
    "exact_factors",
    "register_layer",
    "setup_fabric",
]


def __getattr__(name: str) -> Any:
    # An ``import lightning_thor`` alone brought its modules along.
    if name in former_addresses.FORMER:
        return import_module(f"lightning_thor.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
