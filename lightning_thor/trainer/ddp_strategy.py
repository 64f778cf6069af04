"""``thor_ddp``: distributed data parallel that hides the all-reduce of factors behind backward."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_thor.trainer.strategies import ThorStrategyMixin, register


class ThorDDPMixin(ThorStrategyMixin):
    """What `ThorDDPStrategy` adds to Lightning's ``DDPStrategy``, of either package."""

    strategy_name = "thor_ddp"

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register ``"thor_ddp"`` in every form in which Lightning registers ``"ddp"``."""
        for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            name = cls.strategy_name + suffix
            description = f"DDP with THOR's factors in buckets and shared inversions, started by {start_method}"
            strategy_registry.register(name, cls, description=description, start_method=start_method)
            for unused in (False, True):
                strategy_registry.register(
                    f"{name}_find_unused_parameters_{str(unused).lower()}",
                    cls,
                    description=f"{description}, find_unused_parameters={unused}",
                    find_unused_parameters=unused,
                    start_method=start_method,
                )


class ThorDDPStrategy(ThorDDPMixin, DDPStrategy):
    """Distributed data parallel, registered as ``"thor_ddp"``, that hides the all-reduce of factors behind backward.

    At a refresh the factors are sent in buckets, one triangle of each block, in a process group of their own. A
    bucket's all-reduce starts in backward, when its layers have their gradients, and the optimizer's step waits for it.
    (With plain ``"ddp"`` the step sends all factors at once.) Then, with both, each rank inverts its part of the
    blocks, and one collective gathers the inverses. The results are those of ``"ddp"``.

    Args:
        *args: as of `lightning.pytorch.strategies.DDPStrategy`.
        factor_bucket_mb: megabytes (2²⁰ bytes) at which a bucket is closed; 4 if neither this nor ``split_indices`` is
            given.
        split_indices: instead, the last layer of each bucket, as ``nn.thor`` counts, the layers that have A and G:
            [26, 53] makes the buckets 0 to 26 and 27 to 53.
        bf16_factors: has no effect any more (a DeprecationWarning says why).
        inverse_workers: number of ranks that store each layer's inverses, a divisor of the number of ranks; None for
            all. These ranks alone compute the layer's direction, at every step, and send it to the others: less memory,
            and each rank does part of a step's products, for one more message a step, of the size of the weights. That
            saves time in polar mode, whose Newton-Schulz products are most of an optimizer step (distributed Muon
            shares them in the same way; docs/scaling.md has the times); in natural mode it only saves memory. 1 takes
            least memory, the number of ranks is None. This is KAISA's option (Pauloski et al. 2021, arXiv:2107.01739).
            Checkpoints then lack the inverses that rank 0 does not store; they are computed again on load, see
            `Curvature.load_state_dict`. Not for ``mode="adam"``.
        **kwargs: as of `lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, or both ways of making buckets; when a fit starts,
            ``inverse_workers`` that do not divide the number of ranks, or with ``mode="adam"``.
    """


register(ThorDDPStrategy, StrategyRegistry)
