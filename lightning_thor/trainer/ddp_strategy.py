"""Lightning strategies that carry the curvature's factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.distributed import process_group
from lightning_thor.distributed.communicator import Workers
from lightning_thor.trainer.checkpoints import whole
from lightning_thor.trainer.strategies import Travel


class ThorDDPStrategy(DDPStrategy):
    """Distributed data parallel, registered as ``"thor_ddp"``, that hides the sums of a refresh behind backward.

    The factors of a refresh travel in buckets, a triangle of each block, in a process group of their own; a bucket's
    all-reduce starts in backward, when its layers have their gradients, and is waited for in the optimizer's step.
    (With plain ``"ddp"`` they travel all at once, in the step.) Then, with both, each rank inverts its share of the
    blocks, and one collective brings the inverses to all. The results are those of ``"ddp"``.

    Args:
        *args, **kwargs: as of `lightning.pytorch.strategies.DDPStrategy`.
        factor_bucket_mb: megabytes (2²⁰ bytes) after which a bucket is closed; 4 if neither this nor
            ``split_indices`` is given.
        split_indices: instead, the last layer of each bucket, as ``nn.thor`` counts: of the layers that have A and G,
            [26, 53] makes the buckets 0 to 26 and 27 to 53.
        bf16_factors: send factors in bfloat16; sums are taken in float32 and rounded once more on their way back.
            It pays on few ranks or a slow network: each rank sends a message to every other one (docs/scaling.md).
        inverse_workers: on how many ranks each layer's inverses are kept, a divisor of the number of ranks; None: on
            all. Those ranks alone make the layer's direction, at every step, and send it to the others: less memory,
            and the products of a step are shared out, for one more message a step, of the size of the weights. That
            pays in polar mode, whose Newton-Schulz products are most of a step's work (distributed Muon shares them
            out in the same way), and where the inverses do not fit. 1 takes least memory, the number of ranks is None.
            The dial of KAISA (Pauloski et al. 2021, arXiv:2107.01739). Checkpoints then lack the inverses of layers
            that rank 0 does not keep; they are computed again on load, see `Curvature.load_state_dict`. Not for a
            `Thor` that has ``mode="adam"``.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, or both ways of making buckets; when a fit starts,
            ``inverse_workers`` that do not divide the number of ranks, or with ``mode="adam"``.
    """

    strategy_name = "thor_ddp"

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
        self._travel = Travel(factor_bucket_mb, split_indices, bf16_factors)
        _check_inverse_workers(inverse_workers)
        self._factor_group: Any = None
        self._inverse_workers = inverse_workers
        self._workers: Workers | None = None

    def setup_environment(self) -> None:
        super().setup_environment()
        # Once, though fit, validate and test of one Trainer all come here.
        if self._factor_group is None:
            self._factor_group = process_group.new_factor_group(self._timeout)
            self._workers = self._new_workers()

    def connect_curvature(self, curvature: Curvature) -> None:
        """Let ``curvature`` reach the other ranks through this strategy.

        Raises:
            ValueError: ``split_indices`` names a layer that the model does not have.
        """
        self._travel.connect(curvature, self._factor_group, may_start=self._is_last_backward, workers=self._workers)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As of Lightning's strategy, but the file is there as a whole or not at all, and all ranks raise."""
        with whole(self, filepath) as path:
            super().save_checkpoint(checkpoint, path, storage_options)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        process_group.leave_without_others(exception, self._factor_group)

    def _new_workers(self) -> Workers | None:
        if self._inverse_workers in (None, self.world_size):
            return None
        if self.world_size % self._inverse_workers:
            divisors = [str(n) for n in range(1, self.world_size + 1) if self.world_size % n == 0]
            raise ValueError(
                f"inverse_workers={self._inverse_workers} does not divide the {self.world_size} processes of this run "
                f"into equal groups: give {', '.join(divisors)}, or None to keep all inverses everywhere."
            )
        return process_group.new_workers(self._inverse_workers, self._timeout)

    def _is_last_backward(self) -> bool:
        """False in a micro-batch whose gradients DDP only accumulates."""
        return bool(getattr(self.model, "require_backward_grad_sync", False))

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Every form that Lightning registers for ``"ddp"``, under ``"thor_ddp"``."""
        for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            name = cls.strategy_name + suffix
            description = f"DDP with THOR's factors in buckets and inversions shared out, started by {start_method}"
            strategy_registry.register(name, cls, description=description, start_method=start_method)
            for unused in (False, True):
                strategy_registry.register(
                    f"{name}_find_unused_parameters_{str(unused).lower()}",
                    cls,
                    description=f"{description}, find_unused_parameters={unused}",
                    find_unused_parameters=unused,
                    start_method=start_method,
                )


def _check_inverse_workers(inverse_workers: Any) -> None:
    if inverse_workers is None:
        return
    if isinstance(inverse_workers, bool) or not isinstance(inverse_workers, int):
        raise TypeError(f"inverse_workers must be an int, or None for all processes, got {inverse_workers!r}.")
    if inverse_workers < 1:
        raise ValueError(
            f"inverse_workers must be at least 1, got {inverse_workers}: give a divisor of the number of processes, or "
            "None for all of them."
        )


if ThorDDPStrategy.strategy_name not in StrategyRegistry:
    ThorDDPStrategy.register_strategies(StrategyRegistry)
