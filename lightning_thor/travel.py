"""How factors travel, as the options of a strategy say it: which of them together, and in which precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_thor import buckets
from lightning_thor.collectives import Ranks
from lightning_thor.curvature import Curvature
from lightning_thor.exchange import Workers


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
        self._bucket_bytes = buckets.bucket_bytes_of(factor_bucket_mb)
        buckets.check_split_indices(split_indices)
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
        cut = buckets.by_size(self._bucket_bytes)
        if self._split_indices is not None:
            has_A = [layer.A is not None for layer in curvature.layers.values()]
            cut = buckets.by_layer(self._split_indices, has_A)
        curvature.connect(Ranks(group, self._bf16), cut=cut, may_start=may_start, workers=workers)
