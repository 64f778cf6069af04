"""Sharded tensors (DTensor): this rank's shard, reductions over shards, and loading them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_thor.linalg.memory import constants

if dist.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # torch 2.5
        from torch.distributed._composable.fsdp import FSDPModule  # type: ignore[attr-defined]
    _SHARDED: tuple[type, ...] = (DTensor,)
    _FSDP: tuple[type, ...] = (FSDPModule,)
else:
    _SHARDED = _FSDP = ()


def new_mesh(device_type: str, shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    """Make a mesh of all ranks, of this ``shape`` and with these ``names`` of its dimensions, on devices such as
    ``"cuda"``; every rank must call it, at the same place."""
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


def world_size() -> int:
    """Number of all ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, as ``fully_shard`` (FSDP2) makes of parameters; on a single rank too."""
    return isinstance(tensor, _SHARDED)


def are_whole(tensors: Iterable[Any]) -> bool:
    """True if none of them is a DTensor over several ranks."""
    for x in tensors:  # noqa: SIM110  # a generator would be a call for each
        if isinstance(x, _SHARDED) and x.device_mesh.size() > 1:  # type: ignore[attr-defined]
            return False
    return True


def local_parts(tensors: Iterable[Any]) -> list[Tensor]:
    """Returns this rank's part of each tensor, the tensor itself where it is not sharded; no copies, without
    autograd."""
    return [x.to_local() if isinstance(x, _SHARDED) else x for x in tensors]  # type: ignore[attr-defined]


def local_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each parameter's gradient; of one that tensor parallelism left as a partial sum on each rank,
    of the sum."""
    grads = []
    for p in params:
        grad: Any = p.grad
        if isinstance(grad, _SHARDED):
            same = grad.placements == p.placements  # type: ignore[attr-defined]
            grad = (grad if same else grad.redistribute(placements=p.placements)).to_local()  # type: ignore[attr-defined,union-attr]
        grads.append(grad)
    return grads


def shard_like(value: Any, like: Tensor) -> Any:
    """Take this rank's shard of ``value``, which is the same on all ranks, as ``like`` is sharded; return it as it is,
    if it is no tensor of the shape of ``like`` or ``like`` is not sharded."""
    if not isinstance(value, Tensor) or value.shape != like.shape or not is_sharded(like):
        return value
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    own = boxes_of(like)[dist.get_rank()].of(value).to(like.device, copy=True).contiguous()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def reshard(module: nn.Module) -> None:
    """Free the whole weights of a ``fully_shard``-ed model, which its root holds after a pass without gradients, in the
    place of the parameters that train."""
    for part in module.modules():
        if isinstance(part, _FSDP):
            part.reshard()  # type: ignore[operator]


def load_options(path: Path, key: str, optimizer: Optimizer, names: Collection[str]) -> None:
    """Load options of an optimizer's groups from a folder of shards, as far as it has them, before `load_optimizer`:
    which state the optimizer has may depend on them; all ranks must call it."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    places = [
        (group, name, f"{key}.param_groups.{number}.{name}")
        for number, group in enumerate(optimizer.param_groups)
        for name in names
    ]
    options = {place: group[name] for group, name, place in places if place in saved}
    load(options, checkpoint_id=path)
    for group, name, place in places:
        group[name] = options.get(place, group[name])


def load_optimizer(path: Path, key: str, module: nn.Module, optimizer: Optimizer) -> None:
    """Load the state of an optimizer of a sharded module, which has state of that kind already, from a folder of shards
    that torch.distributed.checkpoint wrote; all ranks must call it. Torch loads no state of parameters that are
    frozen. Options of a group and numbers of a parameter that the folder lacks are not asked for, as
    `torch.optim.Optimizer.load_state_dict` does not: those of a schedule that was added since, or of a later version.
    """
    # They take a second to import.
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {key: states.get_optimizer_state_dict(module, optimizer)}
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    groups: Any = state[key]["param_groups"]
    of_parameters: Any = state[key]["state"]
    asked = {f"param_groups.{number}": group for number, group in enumerate(groups)}
    asked |= {f"state.{name}": own for name, own in of_parameters.items()}
    for place, own in asked.items():
        for name in own.keys() - {"params"}:
            if f"{key}.{place}.{name}" not in saved and not isinstance(own[name], Tensor):
                del own[name]
    load(state, checkpoint_id=path)
    options = states.StateDictOptions(cpu_offload=True)
    states.set_optimizer_state_dict(module, optimizer, state[key], options=options)


def reduce_over_shards(partial: Tensor, of: Sequence[Tensor], operation: Literal["SUM", "MAX"]) -> Tensor:
    """Sum or maximum over each whole tensor ``[n]``, by one small all-reduce.

    Args:
        partial: that over this rank's shard of each tensor, ``[n]``; may be changed.
        of: the ``n`` tensors; all of them sharded over the same ranks, or none.
        operation: which.
    """
    if are_whole(of):
        return partial
    layouts = [_layout(x.device_mesh, x.placements) if isinstance(x, _SHARDED) else (1, None) for x in of]  # type: ignore[attr-defined]
    # One for all of a mesh: parameters are many.
    meshes = {(id(x.device_mesh), dim): x for x, (_, dim) in zip(of, layouts, strict=True) if dim is not None}  # type: ignore[attr-defined]
    groups = {x.device_mesh.get_group(dim) for (_, dim), x in meshes.items()}  # type: ignore[attr-defined]
    group = groups.pop() if len(groups) == 1 and all(dim is not None for _, dim in layouts) else None
    if group is None and operation == "SUM":
        shares = tuple(n_shards / world_size() for n_shards, _ in layouts)
        partial *= constants(shares, partial)
    dist.all_reduce(partial, op=getattr(dist.ReduceOp, operation), group=group)
    return partial


@lru_cache(maxsize=64)
def _layout(mesh: Any, placements: tuple[Any, ...]) -> tuple[int, int | None]:
    """The number of different shards; and the dimension of the mesh along which they all are, if one has them all, and
    there are no replicas, which would drift apart if each summed norms for itself, in an order of its own."""
    dims = [dim for dim, one in enumerate(placements) if not isinstance(one, Replicate) and mesh.size(dim) > 1]
    n_shards = math.prod(mesh.size(dim) for dim in dims)
    return n_shards, dims[0] if len(dims) == 1 and n_shards == mesh.size() else None


class Box(NamedTuple):
    """A part of a parameter: slices of its first two dimensions. One of a single dimension has one column, a scalar one
    row and one column."""

    rows: slice
    columns: slice

    @property
    def area(self) -> int:
        """Numbers in it, if the parameter has two dimensions."""
        n: int = (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)
        return n

    def of(self, tensor: Tensor) -> Tensor:
        """View of this part of a tensor."""
        # Of no dimension, one or more.
        return tensor[(self.rows, self.columns)[: tensor.dim()]]

    def overlap(self, other: Box) -> Box | None:
        """What both have in common; None if that is nothing."""
        common = [
            slice(max(one.start, two.start), min(one.stop, two.stop)) for one, two in zip(self, other, strict=True)
        ]
        return None if any(one.start >= one.stop for one in common) else Box(*common)

    def counted_from(self, other: Box) -> Box:
        """This part, counted from the first row and column of another one."""
        return Box(*(slice(one.start - two.start, one.stop - two.start) for one, two in zip(self, other, strict=True)))


Boxes = Mapping[int, Box]
"""The boxes that ranks have of a parameter, by their numbers in the group of all ranks. They are all of it, once: where
it is replicated, each rank counts itself and the shards of the replica that it is part of."""


def whole_box(tensor: Tensor) -> Box:
    """All of a tensor."""
    n_rows, n_columns = [*tensor.shape[:2], 1, 1][:2]
    return Box(slice(0, n_rows), slice(0, n_columns))


def boxes_of(tensor: Tensor) -> Boxes:
    """The boxes of a tensor, sharded or not, in the order of ranks."""
    if not isinstance(tensor, _SHARDED):
        return {dist.get_rank() if world_size() > 1 else 0: whole_box(tensor)}
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    own = mesh.get_coordinate()
    places = [
        [own[dim]] if isinstance(placement, Replicate) else range(mesh.size(dim))
        for dim, placement in enumerate(placements)
    ]
    found = {int(mesh.mesh[place]): _box(tensor, mesh.shape, place) for place in itertools.product(*places)}
    return dict(sorted(found.items()))


def _box(tensor: Any, mesh_shape: Sequence[int], place: Sequence[int]) -> Box:
    """The box of the rank at a place in the mesh."""
    ranges = {dim: (side.start, side.stop) for dim, side in enumerate(whole_box(tensor))}
    sharded = [dim for dim, one in enumerate(tensor.placements) if not isinstance(one, Replicate)]
    # A strided shard is one of a shard of the dimensions after it: FSDP2 shards what tensor parallelism has sharded.
    strided = [dim for dim in sharded if hasattr(tensor.placements[dim], "split_factor")]
    for mesh_dim in [dim for dim in sharded if dim not in strided] + strided[::-1]:
        dim = tensor.placements[mesh_dim].dim
        start, stop = ranges[dim]
        held = -(-(stop - start) // mesh_shape[mesh_dim])  # as `torch.chunk`
        ranges[dim] = min(start + place[mesh_dim] * held, stop), min(start + (place[mesh_dim] + 1) * held, stop)
    return Box(slice(*ranges[0]), slice(*ranges[1]))


def reason_not_sharded(tensor: Tensor, ranks: Collection[int]) -> str | None:
    """Why a trained ``tensor`` cannot be where it is, as the rest of a sentence about it; None if it can.

    Args:
        tensor: a parameter.
        ranks: those that compute gradients of different data.
    """
    if not is_sharded(tensor):
        return None if len(ranks) == 1 else "is not sharded"
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    n_missing = len(set(ranks) - set(mesh.mesh.flatten().tolist()))
    if n_missing:
        return f"is sharded over {len(ranks) - n_missing} of {len(ranks)} processes with data of their own"
    if all(isinstance(one, Replicate) for one in placements) and len(ranks) > 1:
        return f"is placed as {', '.join(map(str, placements))}, whose gradients nothing sums"
    wrong = [one for one in placements if not isinstance(one, Replicate) and getattr(one, "dim", 2) > 1]
    if wrong:
        return f"is placed as {wrong[0]}: only its first two dimensions may be sharded"
    own = boxes_of(tensor)[dist.get_rank()]
    if own.area * tensor.shape[2:].numel() != tensor.to_local().numel():  # type: ignore[attr-defined]
        return f"has a shard {list(tensor.to_local().shape)} that {', '.join(map(str, placements))} does not explain"  # type: ignore[attr-defined]
    return None
