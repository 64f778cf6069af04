"""The stacks for some layers, and where in them the factors of each layer lie."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_thor.factors.state import FactorState
from lightning_thor.layers.base import Layer
from lightning_thor.linalg.decompositions import Decomposition

Factors = Mapping[str, Mapping[str, int]]
"""By name of a layer, in the order of the stacks: which factor is its ``"A"``, if it has one, and which its ``"G"``."""


def stacks_of(layers: Mapping[str, Layer], decomposition: Decomposition) -> FactorState:
    """Stacks for all factors of ``layers``, on their device; in float64 if any of them is, else in float32.

    Args:
        layers: by name.
        keeping: what is kept of each block.

    Raises:
        ValueError: the layers lie on several devices.
    """
    weights = [layer.parameters[0] for layer in layers.values()]
    devices = {weight.device for weight in weights}
    if len(devices) > 1:
        raise ValueError(
            f"The layers of one model lie on several devices ({', '.join(sorted(map(str, devices)))}); Curvature "
            "needs them on one. Build it after the model was moved, or give `parameters` of one device."
        )
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    device = devices.pop() if devices else torch.device("cpu")
    cuts = [(layer.A, layer.G) for layer in layers.values()]
    index = {name: index for index, name in enumerate(layers)}
    tied = [(index[name], index[layer.tied_to]) for name, layer in layers.items() if layer.tied_to]
    return FactorState(cuts, dtype, device, tied, decomposition=decomposition)


def factors_of(layers: Mapping[str, Layer]) -> Factors:
    """Where the factors of ``layers`` lie in `stacks_of` them.

    >>> from torch import nn
    >>> from lightning_thor.layers.discovery import discover_layers
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    >>> factors_of(discover_layers(model, block_size=None, precondition_bias=False)[0])
    {'0': {'A': 0, 'G': 1}, '1': {'G': 3}}
    """
    return {
        name: {"G": 2 * index + 1} if layer.A is None else {"A": 2 * index, "G": 2 * index + 1}
        for index, (name, layer) in enumerate(layers.items())
    }
