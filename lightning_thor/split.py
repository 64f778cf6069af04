"""The former address of `lightning_thor.block_size.choose`, for one release."""

import warnings

from lightning_thor.block_size.choose import BlockSplit, choose_block_size

__all__ = ["BlockSplit", "choose_block_size"]
warnings.warn("lightning_thor.split is now lightning_thor.choose_block_size.", DeprecationWarning, stacklevel=2)
