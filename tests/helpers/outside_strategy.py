"""A strategy as a user adds one, outside of the package."""

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_thor import ThorStrategyMixin


class MyDDP(ThorStrategyMixin, DDPStrategy):
    """DDP with THOR, as a user of another subclass of DDPStrategy would make it."""


NAME = "my_ddp"
StrategyRegistry.register(NAME, MyDDP, description="DDP with THOR", factor_bucket_mb=1e-3)
