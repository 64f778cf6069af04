"""What THOR's strategies have in common, as a mixin; their names; and which of Lightning's `ThorCallback` supports."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ParallelStrategy
from torch import nn

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.distributed import factor_reducer, process_group
from lightning_thor.distributed.communicator import WorkerGrid
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.optim.thor import Preconditioner
from lightning_thor.trainer.checkpoints import folder_advice, is_folder_of_shards, weights_advice, whole
from lightning_thor.trainer.packages import is_lightnings
from lightning_thor.trainer.signals import JointSignals

SHARD = (
    'Use Trainer(strategy="thor_fsdp2") of `import lightning`, and shard the model in configure_model by '
    'fully_shard(self.net, mesh=self.device_mesh["data_parallel"])'
)
# DeepSpeed's and XLA's strategies are subclasses of supported ones.
REFUSED = {
    "FSDPStrategy": f"FSDP1 flattens weights, and layers have none of their own any more. {SHARD}.",
    "DeepSpeedStrategy": f'its engine keeps gradients to itself. {SHARD}, or "thor_ddp" for a model that fits.',
    "ModelParallelStrategy": f"it would have whole gradients on no rank. {SHARD}, as you do already.",
    **dict.fromkeys(
        ("XLAStrategy", "SingleDeviceXLAStrategy"),
        'it has not been tried on XLA devices. Use GPUs or CPUs with "thor_ddp", "thor_fsdp2" or a single device.',
    ),
}
"""By the name of Lightning's class."""
if TYPE_CHECKING:
    _Base = ParallelStrategy
else:
    _Base = object


class ThorStrategyMixin(_Base):
    """Adds THOR to a parallel strategy of Lightning, which comes after it in the list of bases.

    ``class MyDDP(ThorStrategyMixin, DDPStrategy)`` is a whole strategy: factors have a process group of their own and
    are sent while backward runs, a rank that fails ends the others, and a checkpoint is written whole or not at all.
    ``StrategyRegistry.register("my_ddp", MyDDP)`` makes it ``Trainer(strategy="my_ddp")``. A subclass may override
    `is_sync_step`, `new_worker_grid`, `check_parameters`, `connect_curvature`, `has_sharded_checkpoints` and
    `reads_sharded_checkpoints`.

    Args:
        *args: of the strategy.
        factor_bucket_mb: see `lightning_thor.ThorDDPStrategy`.
        split_indices: see there.
        bf16_factors: has no effect any more.
        inverse_workers: see there.
        **kwargs: of the strategy.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, or both ways of making buckets.
    """

    has_sharded_checkpoints = False
    """Whether each rank writes files of its own into a folder."""
    reads_sharded_checkpoints = False
    """Whether such a folder can be loaded."""

    def __init__(
        self,
        *args: Any,
        factor_bucket_mb: float | None = None,
        split_indices: Sequence[int] | None = None,
        bf16_factors: bool = False,
        inverse_workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(inverse_workers, int | None) or isinstance(inverse_workers, bool):
            raise TypeError(f"inverse_workers must be an int, or None for all processes, got {inverse_workers!r}.")
        if inverse_workers is not None and inverse_workers < 1:
            raise ValueError(
                f"inverse_workers must be at least 1, got {inverse_workers}: give a divisor of the number of "
                "processes, or None for all of them."
            )
        self._inverse_workers = inverse_workers
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
                stacklevel=3,
            )
        self._split_indices = split_indices
        self._factor_group: Any = None
        self._worker_grid: WorkerGrid | None = None

    def is_sync_step(self) -> bool:
        """True in the last backward pass before the optimizer's step, in which factors may be sent.

        Where it is always False, factors are sent in the step. The default is for DDP: False in a micro-batch whose
        gradients are only accumulated.
        """
        return bool(getattr(self.model, "require_backward_grad_sync", False))

    def new_worker_grid(self) -> WorkerGrid | None:
        """Decide which ranks store which inverses, by default rows of ``inverse_workers`` ranks; None: each stores all.
        Called once, on every rank."""
        if self._inverse_workers in (None, self.world_size):
            return None
        if self.world_size % self._inverse_workers:
            divisors = [str(n) for n in range(1, self.world_size + 1) if self.world_size % n == 0]
            raise ValueError(
                f"inverse_workers={self._inverse_workers} does not divide the {self.world_size} processes of this run "
                f"into equal groups: give {', '.join(divisors)}, or None to store all inverses on every rank."
            )
        return process_group.new_worker_grid(self._inverse_workers, getattr(self, "_timeout", None))

    def check_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Check that parameters can be trained as they are; all can by default.

        Called when a fit starts or gets a `Thor`, and again with those that begin to train later.

        Args:
            parameters: of a `Thor`, by name; those that are frozen need not be ready.

        Raises:
            ValueError: one cannot, and what to do.
        """

    def connect_curvature(self, curvature: Curvature, parameters: Mapping[str, nn.Parameter]) -> Preconditioner:
        """Connect ``curvature`` with the other ranks; called once for each `Thor`, when a fit starts or gets it.

        Args:
            curvature: of the model; it may include further layers later.
            parameters: all parameters of the optimizer, by name.

        Returns:
            What `Thor` preconditions with.

        Raises:
            ValueError: the options do not go with the model.
        """
        split_indices, bucket_fn = self._split_indices, factor_reducer.by_size(self._bucket_bytes)
        if split_indices is not None:

            def bucket_fn(layers: Sequence[int], n_bytes: Sequence[int]) -> list[list[int]]:
                has_A = [layer.A is not None for layer in curvature.layers.values()]
                return factor_reducer.by_layer(split_indices, has_A)(layers, n_bytes)

            bucket_fn([], [])  # raises at once
        curvature.connect(
            ProcessGroupCommunicator(self._factor_group),
            bucket_fn=bucket_fn,
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
        assert self.lightning_module is not None
        trainer: Any = self.lightning_module.trainer
        others = [callback for callback in trainer.callbacks if not isinstance(callback, JointSignals)]
        trainer.callbacks = [*others, JointSignals(trainer)]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As Lightning's strategy does, but the file or folder is written whole or not at all, and all ranks raise."""
        with whole(self, filepath, by_all=self.has_sharded_checkpoints) as path:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Lightning's strategy does, but a checkpoint that a fit cannot go on from is refused with what to do."""
        path = args[0] if args else kwargs["checkpoint_path"]
        if not self.reads_sharded_checkpoints and is_folder_of_shards(path):
            raise ValueError(folder_advice(path))
        checkpoint: dict[str, Any] = super().load_checkpoint(*args, **kwargs)
        assert self.lightning_module is not None
        # Not by its optimizers, which a folder has in other files than the rest.
        if self.lightning_module.trainer.state.fn == "fit" and "lr_schedulers" not in checkpoint:
            raise ValueError(weights_advice(path))
        return checkpoint

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        process_group.abort_process_groups(exception, self._factor_group)


def check_strategy(strategy: object) -> None:
    """Check that curvature is supported with a strategy of a Trainer, of either package.

    Raises:
        ValueError: it is not; says what to use instead.
    """
    if isinstance(strategy, ThorStrategyMixin):
        return
    for refused, advice in REFUSED.items():
        if is_lightnings(strategy, refused):
            raise ValueError(f"ThorCallback does not support {type(strategy).__name__}: {advice}")
    if not is_lightnings(strategy, "SingleDeviceStrategy", "DDPStrategy"):
        raise ValueError(
            f"ThorCallback does not support {type(strategy).__name__}: it knows where layers and gradients are with "
            '"thor_ddp", "ddp", "thor_fsdp2" and on a single device. Use Trainer(strategy=...) with one of them, or a '
            "strategy of your own that has ThorStrategyMixin among its bases."
        )


def register(strategy: Any, registry: Any) -> None:
    """Register a class of THOR's strategies, and let the registry say which of their names was meant.

    Args:
        strategy: a class that has ``strategy_name`` and ``register_strategies``. Registered once.
        registry: ``StrategyRegistry`` of either of Lightning's packages.
    """
    if strategy.strategy_name not in registry:
        strategy.register_strategies(registry)
    registry.available_strategies = lambda: _StrategyNames(registry)


class _StrategyNames(list[str]):
    """All names in a registry. Lightning's Trainer asks whether they contain the one that it was given."""

    def __contains__(self, name: object) -> bool:
        """Whether this is a name; a ValueError if it is none, but nearly one of THOR's."""
        if super().__contains__(name) or not isinstance(name, str):
            return super().__contains__(name)
        ours = [each for each in self if each.startswith("thor_")]
        close = get_close_matches(name, ours, n=1, cutoff=0.85)
        # Not of "my_thor_ddp": someone may ask before registering it.
        if name.startswith("thor") or (close and not any(each in name for each in ours)):
            meant = f"Did you mean {close[0]!r}? " if close else ""
            forms = [each for each in ours if not each.endswith(("_true", "_false"))]
            raise ValueError(
                f"There is no strategy={name!r}. {meant}The names are {', '.join(map(repr, forms))}; those of DDP "
                "may end in _find_unused_parameters_true or _false, as Lightning's."
            )
        return False
