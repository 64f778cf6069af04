"""``thor_ddp``: distributed data parallel that hides the all-reduce of factors behind backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_thor.distributed import process_group
from lightning_thor.distributed.communicator import WorkerGrid
from lightning_thor.trainer.strategies import ThorStrategyMixin


class ThorDDPStrategy(ThorStrategyMixin, DDPStrategy):
    """Distributed data parallel, registered as ``"thor_ddp"``, that hides the all-reduce of factors behind backward.

    The factors of a refresh are sent in buckets, a triangle of each block, in a process group of their own; a bucket's
    all-reduce starts in backward, when its layers have their gradients, and is waited for in the optimizer's step.
    (With plain ``"ddp"`` all factors are sent at once, in the step.) Then, with both, each rank inverts its share of
    the blocks, and one collective brings the inverses to all. The results are those of ``"ddp"``.

    Args:
        *args, **kwargs: as of `lightning.pytorch.strategies.DDPStrategy`.
        factor_bucket_mb: megabytes (2²⁰ bytes) after which a bucket is closed; 4 if neither this nor
            ``split_indices`` is given.
        split_indices: instead, the last layer of each bucket, as ``nn.thor`` counts: of the layers that have A and G,
            [26, 53] makes the buckets 0 to 26 and 27 to 53.
        bf16_factors: has no effect any more (a DeprecationWarning says why).
        inverse_workers: on how many ranks each layer's inverses are stored, a divisor of the number of ranks; None: on
            all. Those ranks alone compute the layer's direction, at every step, and send it to the others: less memory,
            and the products of a step are shared out, for one more message a step, of the size of the weights. That
            pays in polar mode, whose Newton-Schulz products are most of a step's work (distributed Muon shares them
            out in the same way), and where the inverses do not fit. 1 takes least memory, the number of ranks is None.
            The dial of KAISA (Pauloski et al. 2021, arXiv:2107.01739). Checkpoints then lack the inverses of layers
            that rank 0 does not store; they are computed again on load, see `Curvature.load_state_dict`. Not for a
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
        super().__init__(
            *args,
            factor_bucket_mb=factor_bucket_mb,
            split_indices=split_indices,
            bf16_factors=bf16_factors,
            **kwargs,
        )
        _check_inverse_workers(inverse_workers)
        self._inverse_workers = inverse_workers

    def is_sync_step(self) -> bool:
        """False in a micro-batch whose gradients DDP only accumulates."""
        return bool(getattr(self.model, "require_backward_grad_sync", False))

    def new_worker_grid(self) -> WorkerGrid | None:
        """Rows of ``inverse_workers`` ranks each."""
        if self._inverse_workers in (None, self.world_size):
            return None
        if self.world_size % self._inverse_workers:
            divisors = [str(n) for n in range(1, self.world_size + 1) if self.world_size % n == 0]
            raise ValueError(
                f"inverse_workers={self._inverse_workers} does not divide the {self.world_size} processes of this run "
                f"into equal groups: give {', '.join(divisors)}, or None to keep all inverses everywhere."
            )
        return process_group.new_worker_grid(self._inverse_workers, self._timeout)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register every form that Lightning registers for ``"ddp"``, as ``"thor_ddp"``."""
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
