"""Lightning strategies that carry the curvature's factors."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor

from lightning_thor import collectives


class ThorDDPStrategy(DDPStrategy):
    """Distributed data parallel, registered as ``"thor_ddp"``, with a process group of its own for the factors.

    The results are those of ``"ddp"``. All factors of a refresh travel in one flat all-reduce; in their own group it
    does not queue behind the all-reduces of gradients.
    """

    strategy_name = "thor_ddp"

    def setup_environment(self) -> None:
        super().setup_environment()
        self._factor_group = collectives.new_factor_group()

    def sum_factors_(self, flat: Tensor) -> None:
        """Add up ``flat`` over all ranks, in place."""
        collectives.sum_across_ranks_(flat, self._factor_group)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register(
            cls.strategy_name, cls, description="DDP with its own process group for THOR's factors"
        )
        strategy_registry.register(
            f"{cls.strategy_name}_find_unused_parameters_true",
            cls,
            description="thor_ddp with find_unused_parameters=True",
            find_unused_parameters=True,
        )


if ThorDDPStrategy.strategy_name not in StrategyRegistry:
    ThorDDPStrategy.register_strategies(StrategyRegistry)
