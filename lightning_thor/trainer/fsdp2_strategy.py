"""``thor_fsdp2``: THOR for models that ``fully_shard`` (FSDP2) shards; ranks share the directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.distributed import dtensor, process_group
from lightning_thor.distributed.communicator import WorkerGrid
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.fsdp.sharded_curvature import ShardedCurvature
from lightning_thor.layers.discovery import name_some, trained
from lightning_thor.optim.thor import STATE_OPTIONS, Preconditioner, Thor
from lightning_thor.trainer.strategies import ThorStrategyMixin, register
from lightning_thor.trainer.thors import clips_norm, parameters_of
from lightning_thor.trainer.unfreezing import restore_groups


class ThorModelParallelStrategy(ThorStrategyMixin, ModelParallelStrategy):
    """Fully sharded data parallel (FSDP2), alone, in replicas (HSDP) or with tensor parallelism, as ``"thor_fsdp2"``.

    As with `lightning.pytorch.strategies.ModelParallelStrategy` the module shards itself, in ``configure_model``, by
    ``fully_shard(..., mesh=self.device_mesh["data_parallel"])``, after ``parallelize_module`` with
    ``self.device_mesh["tensor_parallel"]`` if there is any; with replicas the mesh of ``fully_shard`` is
    ``self.device_mesh["replicate", "shard"]``. Weights, gradients and momentum are sharded; all trained parameters must
    be, over all ranks that have data of their own, along their first or second dimension, also those that are unfrozen
    in mid-run. Factors and inverses are whole on each rank (inverses unless ``inverse_workers`` shares them out); each
    direction is computed once in a replica, see `ShardedCurvature`. The factors of a refresh are sent as with
    ``"thor_ddp"``: in buckets, in a process group of their own, from backward on, but never in a micro-batch that only
    accumulates (in which FSDP2 sums gradients all the same, as Lightning has it). The results are those of
    ``"thor_ddp"``.

    Args:
        data_parallel_size: number of ranks that share the batch; ``"auto"`` is all of them over
            ``tensor_parallel_size`` (of Lightning's strategy, the number of nodes).
        tensor_parallel_size: number of ranks that share the products of a layer, with the same data; ``"auto"`` is 1.
        replicas: copies of the weights, a divisor of ``data_parallel_size``: each is sharded over so many ranks less,
            for a cluster whose nodes are connected more slowly than the devices inside.
        factor_bucket_mb: megabytes (2²⁰ bytes) at which a bucket of factors is closed, see
            `lightning_thor.ThorDDPStrategy`.
        split_indices: instead, the last layer of each bucket, see there.
        bf16_factors: has no effect any more.
        inverse_workers: number of ranks that store each layer's inverses (in adam mode eigenvectors): a divisor of the
            number of ranks, and a multiple of ``replicas`` times ``tensor_parallel_size``, since each replica needs
            all, and ranks of tensor parallelism store the same; None for all ranks. They alone compute the layer's
            direction, each for its neighbours, which send it their parts of the gradient and get their parts of the
            direction: two messages a step (in adam mode four), each of about a rank's share of the weights, and memory
            for them at that moment. A rank then stores ``inverse_workers`` over the ranks of all inverses; windows and
            averages stay whole. The number of ranks over the devices of a node is a good choice; 1 may take more memory
            in the exchange than it saves (docs/scaling.md). Checkpoints hold all inverses.
        **kwargs: as of Lightning's strategy, such as ``save_distributed_checkpoint``.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, or both ways of making buckets; when a fit starts, ``replicas`` or
            ``inverse_workers`` that do not go with the number of ranks.
    """

    strategy_name = "thor_fsdp2"
    reads_sharded_checkpoints = True

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        *,
        replicas: int = 1,
        factor_bucket_mb: float | None = None,
        split_indices: Sequence[int] | None = None,
        bf16_factors: bool = False,
        inverse_workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._width: int = 1 if tensor_parallel_size == "auto" else tensor_parallel_size
        self._accumulates, self._replicas = False, replicas
        self._loads_from: Path | None = None
        """The folder that the checkpoint was loaded from; None for a file."""
        for name, size in (("tensor_parallel_size", self._width), ("replicas", replicas)):
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}.")
        super().__init__(
            data_parallel_size,
            self._width,
            factor_bucket_mb=factor_bucket_mb,
            split_indices=split_indices,
            bf16_factors=bf16_factors,
            inverse_workers=inverse_workers,
            **kwargs,
        )

    @property
    def has_sharded_checkpoints(self) -> bool:  # type: ignore[override]
        return bool(self._save_distributed_checkpoint)

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            self._data_parallel_size = max(1, self.num_nodes * self.num_processes // self._width)
        n_data = int(self._data_parallel_size)
        if n_data % self._replicas:
            raise ValueError(
                f"replicas={self._replicas} must divide the {n_data} data-parallel ranks: give another number of "
                "replicas or devices."
            )
        super().setup_environment()
        if self._replicas > 1 and "replicate" not in (self.device_mesh.mesh_dim_names or ()):
            shape, names = (self._replicas, n_data // self._replicas, self._width), ("replicate", "shard")
            self._device_mesh = dtensor.new_mesh(self.root_device.type, shape, (*names, "tensor_parallel"))
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = self._device_mesh

    def new_worker_grid(self) -> WorkerGrid | None:
        """As `ThorStrategyMixin.new_worker_grid`: each replica has as many ranks of every row, and a group of tensor
        parallelism is in one row."""
        n, unit = self.world_size, self._replicas * self._width
        if self._inverse_workers in (None, n):
            return None
        if n % self._inverse_workers or self._inverse_workers % unit:
            numbers = [str(some) for some in range(unit, n + 1, unit) if n % some == 0]
            raise ValueError(
                f"inverse_workers={self._inverse_workers} must divide the {n} processes of this run, and be a multiple "
                f"of replicas={self._replicas} times tensor_parallel_size={self._width}, each of which needs a layer's "
                f"inverses: give {', '.join(numbers)}, or None to store all inverses on every rank."
            )
        timeout = getattr(self, "_timeout", None)
        return process_group.new_worker_grid(self._inverse_workers, timeout, tensor_parallel_size=self._width)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self._data_parallel_size, "rank": self.global_rank // self._width}

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        # Otherwise torch's distributed checkpoints would make the state by a step with gradients of zero.
        for optimizer in self.optimizers:
            if isinstance(optimizer, Thor):
                _check_clipping(trainer, optimizer)
                optimizer.make_state()

    def is_sync_step(self) -> bool:
        """As `ThorStrategyMixin.is_sync_step`: False in a micro-batch that only accumulates."""
        return not self._accumulates

    def check_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """As `ThorStrategyMixin.check_parameters`: all that train must be sharded over all data."""
        ranks = range(self.global_rank % self._width, dtensor.world_size(), self._width)
        reasons = {name: dtensor.reason_not_sharded(p, ranks) for name, p in parameters.items() if p.requires_grad}
        wrong = [name for name, reason in reasons.items() if reason is not None]
        if wrong:
            mesh = '"replicate", "shard"' if self._replicas > 1 else '"data_parallel"'
            raise ValueError(
                f"ThorModelParallelStrategy: {wrong[0]!r} {reasons[wrong[0]]} (all such: {name_some(wrong)}). Shard "
                "all trained parameters over the data-parallel ranks, in configure_model: "
                f"fully_shard(self.net, mesh=self.device_mesh[{mesh}]), for modules inside first if you like."
            )

    def connect_curvature(self, curvature: Curvature, parameters: Mapping[str, nn.Parameter]) -> Preconditioner:
        """As `ThorStrategyMixin.connect_curvature`; returns a `ShardedCurvature`.

        Raises:
            ValueError: a trained parameter is not sharded, or the options do not go with the model.
        """
        self.check_parameters(parameters)
        super().connect_curvature(curvature, parameters)
        return ShardedCurvature(curvature, ProcessGroupCommunicator(self._factor_group))

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """As of Lightning's strategies: a context for a micro-batch whose gradients are only accumulated."""
        before, self._accumulates = self._accumulates, True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._accumulates = before

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As of Lightning's strategy; the parameters of a group are in its order, by which other strategies load them,
        not in the model's."""
        thor = getattr(optimizer, "_optimizer", optimizer)
        if isinstance(thor, Thor):
            thor.make_state()  # of groups that were added since the last step, which `_load_optimizers` asks for
        state: dict[str, Any] = super().optimizer_state(optimizer)
        if self._save_distributed_checkpoint or not state or not isinstance(thor, Thor) or thor.numbered is None:
            return state
        numbers = {p: number for number, p in enumerate(thor.numbered)}
        orders = [[numbers[p] for p in group["params"]] for group in thor.param_groups]
        groups = [{**group, "params": order} for group, order in zip(state["param_groups"], orders, strict=True)]
        return {**state, "param_groups": groups}

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: `load_optimizer_state_dict` is called."""
        return True

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Lightning's strategy does, which fails where a validation left the weights whole; but the states of
        optimizers wait for `load_optimizer_state_dict`, as with DDP."""
        assert self.model is not None
        dtensor.reshard(self.model)
        path = Path(self.broadcast(args[0] if args else kwargs["checkpoint_path"]))
        optimizers, self._optimizers = self._optimizers, []
        try:
            checkpoint = super().load_checkpoint(*args, **kwargs)
        finally:
            self._optimizers = optimizers
        self._loads_from = None if path.is_file() else path
        # Without this key Lightning takes the checkpoint for one of weights alone.
        return checkpoint if path.is_file() else {**checkpoint, "optimizer_states": []}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of optimizers from what `load_checkpoint` returned; called when callbacks were restored, and
        with them what they unfroze.

        Those in one file, as a single device or DDP writes it, are matched to parameters by position in their groups,
        as torch does it. (Lightning matches them by the parameters' numbers in the model, which differ where there are
        several groups, or frozen parameters.)
        """
        assert self.lightning_module is not None
        restore_groups(self.lightning_module.trainer)
        if self._loads_from is not None:
            self._load_optimizers(self._loads_from)
            return
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            shards = {
                number: {key: dtensor.shard_like(value, p) for key, value in saved["state"][number].items()}
                # load_state_dict below refuses other lengths.
                for number, p in zip(numbers, parameters_of(optimizer), strict=False)
                if number in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": shards})
            if isinstance(optimizer, Thor):
                optimizer.make_state()

    def _load_optimizers(self, folder: Path) -> None:
        assert self.model is not None
        for number, optimizer in enumerate(self.optimizers):
            if isinstance(optimizer, Thor):
                # Those of the folder say which state is in it.
                dtensor.load_options(folder, f"optimizer_{number}", optimizer, STATE_OPTIONS)
                optimizer.make_state()
            # Those that are frozen now may be unfrozen again when training starts.
            with trained(parameters_of(optimizer)):
                dtensor.load_optimizer(folder, f"optimizer_{number}", self.model, optimizer)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register ``"thor_fsdp2"``."""
        strategy_registry.register(
            cls.strategy_name, cls, description="FSDP2 with THOR's shared inversions and directions"
        )


def _check_clipping(trainer: pl.Trainer, optimizer: Thor) -> None:
    """Check that torch can clip the gradients: norms of one mesh, or values of all sharded or all whole tensors."""
    meshes = {getattr(p, "device_mesh", None) for p in parameters_of(optimizer) if p.requires_grad}
    is_lightnings = not is_overridden("configure_gradient_clipping", trainer.lightning_module)
    if trainer.gradient_clip_val and is_lightnings and len(meshes) > 1 and (clips_norm(trainer) or None in meshes):
        raise ValueError(
            f"gradient_clip_val={trainer.gradient_clip_val} cannot clip gradients of which tensor parallelism shares "
            "out some: torch takes those of one mesh alone, with any optimizer. Give Thor or configure_thor "
            "clip_norm=... instead."
        )


register(ThorModelParallelStrategy, StrategyRegistry)
