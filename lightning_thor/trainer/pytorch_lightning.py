"""For the separate package ``pytorch_lightning``, on which other libraries build: its own callback and ``"thor_ddp"``.

`lightning_thor.ThorCallback` works under its Trainer as it is, on a single device and with ``"ddp"``. Importing this
module also registers ``"thor_ddp"`` there. Under `LightningCLI` take the callback from here, since it looks at classes.
"""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from lightning_thor.trainer import callback
from lightning_thor.trainer.ddp_strategy import ThorDDPMixin
from lightning_thor.trainer.strategies import register


class ThorCallback(callback.ThorCallback, pl.Callback):  # type: ignore[misc]
    """As `lightning_thor.ThorCallback`."""


class ThorDDPStrategy(ThorDDPMixin, DDPStrategy):  # type: ignore[misc]
    """As `lightning_thor.ThorDDPStrategy`."""


register(ThorDDPStrategy, StrategyRegistry)
