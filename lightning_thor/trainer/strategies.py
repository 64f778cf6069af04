"""What THOR's strategies have in common, as a mixin; and which of Lightning's strategies `ThorCallback` works with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.distributed import factor_reducer, process_group
from lightning_thor.distributed.communicator import WorkerGrid
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.optim.thor import Preconditioner
from lightning_thor.trainer.checkpoints import whole

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


class FactorCommOptions:
    """How the strategies send factors, checked.

    Args:
        factor_bucket_mb: megabytes (2²⁰ bytes) after which a bucket is closed; None for 4.
        split_indices: instead, the last layer of each bucket.
        bf16_factors: has no effect any more.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, or both ways of making buckets.
    """

    def __init__(
        self, factor_bucket_mb: float | None, split_indices: Sequence[int] | None, bf16_factors: bool = False
    ) -> None:
        self._bucket_bytes = factor_reducer.bucket_bytes(factor_bucket_mb)
        factor_reducer.check_split_indices(split_indices)
        if factor_bucket_mb is not None and split_indices is not None:
            raise ValueError(
                f"factor_bucket_mb={factor_bucket_mb!r} and split_indices={split_indices!r} both say which layers' "
                "factors are sent together: give one of them."
            )
        if not isinstance(bf16_factors, bool):
            raise TypeError(f"bf16_factors must be True or False, got {bf16_factors!r}.")
        if bf16_factors:
            warnings.warn(
                "bf16_factors=True has no effect any more: factors are sent in their own precision. 99 % of their "
                "messages are hidden behind backward, and from 64 ranks on half the bytes took longer. Remove it.",
                DeprecationWarning,
                stacklevel=4,
            )
        self._split_indices = split_indices

    def bucket_fn(self, curvature: Curvature) -> factor_reducer.BucketFn:
        """Which layers' factors are sent together.

        Args:
            curvature: whose layers.

        Returns:
            What `Curvature.connect` takes as ``bucket_fn``.

        Raises:
            ValueError: ``split_indices`` names a layer that the model does not have.
        """
        if self._split_indices is None:
            return factor_reducer.by_size(self._bucket_bytes)
        has_A = [layer.A is not None for layer in curvature.layers.values()]
        return factor_reducer.by_layer(self._split_indices, has_A)


if TYPE_CHECKING:
    _Base = ParallelStrategy
else:
    _Base = object


class ThorStrategyMixin(_Base):
    """Makes a parallel strategy of Lightning's one of THOR's; it goes before that in the list of bases.

    The factors have a process group of their own, a rank that fails ends the others, and checkpoints are there as a
    whole or not at all. A subclass may say more by the methods `is_sync_step`, `new_worker_grid` and
    `connect_curvature`.

    Args:
        *args, **kwargs: of the strategy.
        factor_bucket_mb, split_indices, bf16_factors: see `lightning_thor.ThorDDPStrategy`.
    """

    has_sharded_checkpoints = False
    """Whether every rank writes files of its own into a folder."""

    def __init__(
        self,
        *args: Any,
        factor_bucket_mb: float | None = None,
        split_indices: Sequence[int] | None = None,
        bf16_factors: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._comm_options = FactorCommOptions(factor_bucket_mb, split_indices, bf16_factors)
        self._factor_group: Any = None
        self._worker_grid: WorkerGrid | None = None

    def is_sync_step(self) -> bool:
        """True in a backward pass that is the last before the optimizer's step: factors may be sent from it on. False,
        the default, always sends them in the step."""
        return False

    def new_worker_grid(self) -> WorkerGrid | None:
        """Which ranks store which inverses; None, the default, stores all everywhere. Called once, on every rank."""
        return None

    def connect_curvature(self, curvature: Curvature, parameters: Mapping[str, nn.Parameter]) -> Preconditioner:
        """Let ``curvature`` reach the other ranks.

        Args:
            curvature: of the model.
            parameters: all that the optimizer has, by name.

        Returns:
            What `Thor` is to precondition with.

        Raises:
            ValueError: the options do not go with the model.
        """
        curvature.connect(
            ProcessGroupCommunicator(self._factor_group),
            bucket_fn=self._comm_options.bucket_fn(curvature),
            is_sync_step=self.is_sync_step,
            worker_grid=self._worker_grid,
        )
        return curvature

    def setup_environment(self) -> None:
        super().setup_environment()
        # Once, though fit, validate and test of one Trainer all come here.
        if self._factor_group is None:
            self._factor_group = process_group.new_factor_group(getattr(self, "_timeout", None))
            self._worker_grid = self.new_worker_grid()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As of Lightning's strategy, but the file or folder is there as a whole or not at all, and all ranks raise."""
        with whole(self, filepath, by_all=self.has_sharded_checkpoints) as path:
            super().save_checkpoint(checkpoint, path, storage_options)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        process_group.abort_process_groups(exception, self._factor_group)


def check_strategy(strategy: Strategy) -> None:
    """Check that `ThorCallback` finds gradients as it needs them.

    Args:
        strategy: of the trainer.

    Raises:
        ValueError: it would not; says what to use instead.
    """
    if isinstance(strategy, ThorStrategyMixin):
        return
    for refused, advice in REFUSED:
        if isinstance(strategy, refused):
            raise ValueError(f"ThorCallback does not support {type(strategy).__name__}: {advice}")
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"ThorCallback does not support {type(strategy).__name__}: it knows how layers and gradients lie with "
            '"thor_ddp", "ddp", "thor_fsdp2" and on a single device. Use Trainer(strategy=...) with one of them.'
        )
