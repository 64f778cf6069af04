"""Sharded tensors (DTensor): this rank's shard, and reductions over shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # torch 2.5
        from torch.distributed._composable.fsdp import FSDPModule  # type: ignore[attr-defined]
    _SHARDED: tuple[type, ...] = (DTensor,)
else:
    _SHARDED = ()


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, as ``fully_shard`` (FSDP2) makes of parameters; on a single rank too."""
    return isinstance(tensor, _SHARDED)


def is_split(tensor: Tensor) -> bool:
    """True for a DTensor over several ranks."""
    return isinstance(tensor, _SHARDED) and tensor.device_mesh.size() > 1  # type: ignore[attr-defined]


def local_parts(tensors: Iterable[Any]) -> list[Tensor]:
    """Returns this rank's part of each tensor, the tensor itself where it is not sharded; no copies, without autograd.

    Args:
        tensors: sharded (DTensor) or not.
    """
    return [x.to_local() if isinstance(x, _SHARDED) else x for x in tensors]  # type: ignore[attr-defined]


def shard_like(value: Any, like: Tensor) -> Any:
    """Shard the first rank's ``value`` as ``like`` is sharded; return it as it is, if it is no tensor of the shape of
    ``like`` or ``like`` is not sharded. Every rank must call it, at the same place.
    """
    if not isinstance(value, Tensor) or value.shape != like.shape or not is_sharded(like):
        return value
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, placements)


def reshard(module: nn.Module) -> None:
    """Free the whole weights of a ``fully_shard``-ed model, which its root holds after a pass without gradients."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def sum_over_shards(partial: Tensor, of: Sequence[Tensor]) -> Tensor:
    """Sum over each whole tensor ``[n]``, by one small all-reduce.

    Args:
        partial: sum over this rank's shard of each tensor, ``[n]``; may be changed.
        of: the ``n`` tensors; all of them sharded over the same ranks, or none.
    """
    return _over_shards(partial, of, "SUM")


def max_over_shards(partial: Tensor, of: Sequence[Tensor]) -> Tensor:
    """As `sum_over_shards`, from the maximum ``partial`` over this rank's shards ``of`` the tensors."""
    return _over_shards(partial, of, "MAX")


def _over_shards(partial: Tensor, of: Sequence[Tensor], operation: str) -> Tensor:
    if is_split(of[0]):
        group = of[0].device_mesh.get_group()  # type: ignore[attr-defined]
        dist.all_reduce(partial, op=getattr(dist.ReduceOp, operation), group=group)
    return partial


def reason_not_sharded_by_rows(tensor: Tensor, world_size: int) -> str | None:
    """Why ``tensor`` is not sharded along its first dimension over all ``world_size`` ranks, as the rest of a sentence
    about it; None if it is, or if there is one rank."""
    if world_size == 1:
        return None
    if not is_sharded(tensor):
        return "is not sharded"
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1:
        return f"is sharded over a mesh of {mesh.ndim} dimensions"
    if mesh.size() != world_size:
        return f"is sharded over {mesh.size()} of {world_size} processes"
    if type(placements[0]) is not Shard or placements[0].dim != 0:
        return f"is placed as {placements[0]}, not as Shard(dim=0)"
    return None
