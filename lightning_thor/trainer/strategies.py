"""What the strategies have in common: options of communication, and which strategies are supported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.distributed import factor_reducer
from lightning_thor.distributed.communicator import Workers
from lightning_thor.distributed.process_group import Ranks

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
    if hasattr(strategy, "connect_curvature"):
        return
    for refused, advice in REFUSED:
        if isinstance(strategy, refused):
            raise ValueError(f"ThorCallback does not support {type(strategy).__name__}: {advice}")
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"ThorCallback does not support {type(strategy).__name__}: it knows how layers and gradients lie with "
            '"thor_ddp", "ddp", "thor_fsdp2" and on a single device. Use Trainer(strategy=...) with one of them.'
        )


class Travel:
    """The options that the strategies have in common, checked.

    Args:
        factor_bucket_mb: see `lightning_thor.ThorDDPStrategy`, as all of them.
        split_indices: likewise.
        bf16_factors: likewise.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, or both ways of making buckets.
    """

    def __init__(self, factor_bucket_mb: float | None, split_indices: Sequence[int] | None, bf16_factors: bool) -> None:
        self._bucket_bytes = factor_reducer.bucket_bytes_of(factor_bucket_mb)
        factor_reducer.check_split_indices(split_indices)
        if factor_bucket_mb is not None and split_indices is not None:
            raise ValueError(
                f"factor_bucket_mb={factor_bucket_mb!r} and split_indices={split_indices!r} both say which layers' "
                "factors travel together: give one of them."
            )
        if not isinstance(bf16_factors, bool):
            raise TypeError(f"bf16_factors must be True or False, got {bf16_factors!r}.")
        self._split_indices = split_indices
        self._bf16 = bf16_factors

    def connect(
        self, curvature: Curvature, group: Any, *, may_start: Callable[[], bool], workers: Workers | None = None
    ) -> None:
        """Let ``curvature`` reach the ranks of a process group; see `Curvature.connect`.

        Raises:
            ValueError: ``split_indices`` names a layer that the model does not have.
        """
        cut = factor_reducer.by_size(self._bucket_bytes)
        if self._split_indices is not None:
            has_A = [layer.A is not None for layer in curvature.layers.values()]
            cut = factor_reducer.by_layer(self._split_indices, has_A)
        curvature.connect(Ranks(group, self._bf16), cut=cut, may_start=may_start, workers=workers)
