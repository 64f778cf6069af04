"""``thor_fsdp2``: THOR for models that ``fully_shard`` (FSDP2) shards; ranks share the directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.distributed import dtensor
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.fsdp.sharded_curvature import ShardedCurvature
from lightning_thor.layers.discovery import name_some
from lightning_thor.optim.thor import Preconditioner, Thor
from lightning_thor.trainer.strategies import ThorStrategyMixin


class ThorModelParallelStrategy(ThorStrategyMixin, ModelParallelStrategy):
    """Fully sharded data parallel (FSDP2), registered as ``"thor_fsdp2"``: weights, gradients, momentum are sharded.

    As with `lightning.pytorch.strategies.ModelParallelStrategy` the module shards itself, in ``configure_model``, by
    ``fully_shard(..., mesh=self.device_mesh["data_parallel"])``; all trained parameters must be sharded, along their
    first dimension. Factors and inverses are whole on each rank; each direction is computed once, see
    `ShardedCurvature`. The factors of a refresh are sent as with ``"thor_ddp"``: in buckets, in a process group of
    their own, from backward on, but never in a micro-batch that only accumulates (in which FSDP2 sums gradients all the
    same, as Lightning has it). The results are those of ``"thor_ddp"``.

    Args:
        data_parallel_size: number of ranks that share the weights and the batch; ``"auto"`` is all of them (of
            Lightning's strategy, the number of nodes).
        tensor_parallel_size: 1 or ``"auto"``, which is 1 too.
        factor_bucket_mb: megabytes (2²⁰ bytes) at which a bucket of factors is closed, see
            `lightning_thor.ThorDDPStrategy`.
        split_indices: instead, the last layer of each bucket, see there.
        bf16_factors: has no effect any more.
        **kwargs: as of Lightning's strategy, such as ``save_distributed_checkpoint``.

    Raises:
        TypeError: an argument of another type.
        ValueError: another ``tensor_parallel_size``, an argument out of its range, or both ways of making buckets.
    """

    strategy_name = "thor_fsdp2"

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        *,
        factor_bucket_mb: float | None = None,
        split_indices: Sequence[int] | None = None,
        bf16_factors: bool = False,
        **kwargs: Any,
    ) -> None:
        if tensor_parallel_size not in ("auto", 1):
            raise ValueError(
                f"ThorModelParallelStrategy got tensor_parallel_size={tensor_parallel_size!r}, but it needs each "
                "layer's inputs whole: shard over data_parallel alone (tensor_parallel_size=1)."
            )
        super().__init__(
            data_parallel_size,
            1,
            factor_bucket_mb=factor_bucket_mb,
            split_indices=split_indices,
            bf16_factors=bf16_factors,
            **kwargs,
        )
        self._accumulates = False

    @property
    def has_sharded_checkpoints(self) -> bool:  # type: ignore[override]
        return bool(self._save_distributed_checkpoint)

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        # Otherwise torch's distributed checkpoints would make the state by a step with gradients of zero.
        for optimizer in self.optimizers:
            if isinstance(optimizer, Thor):
                optimizer.make_state()

    def is_sync_step(self) -> bool:
        """As `ThorStrategyMixin.is_sync_step`: False in a micro-batch that only accumulates."""
        return not self._accumulates

    def connect_curvature(self, curvature: Curvature, parameters: Mapping[str, nn.Parameter]) -> Preconditioner:
        """As `ThorStrategyMixin.connect_curvature`; returns a `ShardedCurvature`.

        Raises:
            ValueError: a parameter is not sharded by rows, or the options do not go with the model.
        """
        communicator = ProcessGroupCommunicator(self._factor_group)
        world_size = communicator.world_size
        reasons = {name: dtensor.reason_not_sharded_by_rows(p, world_size) for name, p in parameters.items()}
        wrong = [name for name, reason in reasons.items() if reason is not None]
        if wrong:
            raise ValueError(
                f"ThorModelParallelStrategy: {wrong[0]!r} {reasons[wrong[0]]} (all such: {name_some(wrong)}). Shard "
                "all trained parameters over the data-parallel ranks, along its first dimension, in configure_model: "
                'fully_shard(self.net, mesh=self.device_mesh["data_parallel"]), for modules inside first if you like.'
            )
        super().connect_curvature(curvature, parameters)
        return ShardedCurvature(curvature, communicator)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """As of Lightning's strategies: a context for a micro-batch whose gradients are only accumulated."""
        before, self._accumulates = self._accumulates, True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._accumulates = before

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Lightning's strategy does, which fails where a validation left the weights whole.

        Optimizer states in one file, as a single device or DDP writes it, are matched to parameters by position in
        their groups, as torch does it. (Lightning matches them by the parameters' numbers in the model, which differ
        where there are several groups, or frozen parameters.)
        """
        assert self.model is not None
        dtensor.reshard(self.model)
        path = Path(self.broadcast(args[0] if args else kwargs["checkpoint_path"]))
        if not path.is_file() or not self.optimizers:
            return super().load_checkpoint(*args, **kwargs)
        optimizers, self._optimizers = self._optimizers, []
        try:
            checkpoint = super().load_checkpoint(*args, **kwargs)
        finally:
            self._optimizers = optimizers
        for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            shards = {
                number: {key: dtensor.shard_like(value, p) for key, value in saved["state"][number].items()}
                # load_state_dict below refuses other lengths.
                for number, p in zip(numbers, params, strict=False)
                if number in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": shards})
            if isinstance(optimizer, Thor):
                optimizer.make_state()
        return checkpoint

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register ``"thor_fsdp2"``."""
        strategy_registry.register(
            cls.strategy_name, cls, description="FSDP2 with THOR's shared inversions and directions"
        )


if ThorModelParallelStrategy.strategy_name not in StrategyRegistry:
    ThorModelParallelStrategy.register_strategies(StrategyRegistry)
