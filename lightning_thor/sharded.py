"""The former address of `lightning_thor.fsdp.sharded_curvature`, for one release."""

import warnings

from lightning_thor.fsdp.sharded_curvature import ShardedCurvature

__all__ = ["ShardedCurvature"]
warnings.warn("lightning_thor.sharded is now lightning_thor.ShardedCurvature.", DeprecationWarning, stacklevel=2)
