"""How far a step moves the weights, from a sample of their entries; nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_thor.distributed.dtensor import local_parts
from lightning_thor.optim.thor import Thor

N_SAMPLED = 4096
"""About so many entries of each tensor are looked at."""

Sample = dict[nn.Parameter, Tensor]


def sample_weights(optimizer: Thor) -> Sample:
    """Copy evenly spread entries of each parameter of ``optimizer``, of sharded ones of this rank's shard.

    Args:
        optimizer: whose parameters are looked at.

    Returns:
        By parameter ``[n]``, in float32, of those of which there are entries here.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if not is_lazy(p)]
    params = [p for p in params if p.requires_grad and p.is_floating_point()]
    local = local_parts([p.detach() for p in params])
    return {p: _some(own) for p, own in zip(params, local, strict=True) if own.numel()}


def update_ratio(before: Sample) -> Tensor:
    """Norm of what changed since ``before`` over the norm of the weights, of all parameters together, 0-dimensional.

    Args:
        before: of at least one parameter, see `sample_weights`.
    """
    params = list(before)
    local = local_parts([p.detach() for p in params])
    # An entry of the sample stands for so many.
    roots = [(p.numel() / before[own].numel()) ** 0.5 for own, p in zip(params, local, strict=True)]
    pairs = [(_some(now), before[own]) for own, now in zip(params, local, strict=True)]
    moved: Tensor = torch.stack(
        [(now - was).norm() * root for (now, was), root in zip(pairs, roots, strict=True)]
    ).norm()
    norm: Tensor = torch.stack([was.norm() * root for (_, was), root in zip(pairs, roots, strict=True)]).norm()
    return moved / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _some(p: Tensor) -> Tensor:
    return p.flatten()[:: max(p.numel() // N_SAMPLED, 1)].to(torch.float32, copy=True)
