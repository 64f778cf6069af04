"""The hardware-driven choice of the block size: what cutting saves on this device, and what it loses on this network.

The paper (THOR: Chen et al., AAAI 2021) tries the sizes 1, 16, 32, ... up to the widest layer and draws two curves: the
share of the factors that keep nearly all of their spectral norm when they are cut (it rises), and the speed of
inversion, relative to the smallest size (it falls). Where they cross is the size. It reports 106 for ResNet-50 on an
Ascend 910, so 128.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.block_size.spectral_loss import PartitionFn, spectral_losses
from lightning_thor.layers.base import Layer, ModuleUse, attention_uses
from lightning_thor.layers.custom import registered_uses
from lightning_thor.layers.discovery import discover_layers
from lightning_thor.layers.hooks import Hooks
from lightning_thor.layers.pair_checks import are_rows_of
from lightning_thor.layers.registry import LINEAR, LINEAR_TRANSPOSED, STATISTICS, KfacApprox
from lightning_thor.linalg.block_diagonal import BlockPartition, add_covariance_
from lightning_thor.linalg.decompositions import damped_inverses

TOLERABLE_LOSS = 0.01
"""A factor that loses less than this of its spectral norm counts as kept; the paper's figure."""


WIDEST = 8192
"""Wider factors (the vocabulary of a language model) are not looked at: one alone would take over 256 MiB."""


PASS_ELEMENTS = 2**28
"""Whole factors that are held at a time, 1 GiB in float32; a larger network takes several passes."""


TIMED_ELEMENTS = 2**24
"""Blocks that are inverted at a time when they are timed; the time of more is taken to be proportional."""


@dataclass(frozen=True)
class BlockSplit:
    """What was measured, and what was chosen: plain types, for JSON."""

    block_size: int
    """The choice: the candidate nearest to the crossing, as a ratio."""
    crossing: float
    """Where the two curves cross, interpolated between candidates."""
    candidates: list[int]
    shares: list[float]
    """Of the factors, how many lose less than 1 % of their spectral norm at each candidate, 0..1."""
    seconds: list[float]
    """For inverting the blocks of all these factors once, at each candidate."""
    n_factors: int
    """How many factors were looked at: A and G of each layer that can be cut."""
    left_out: dict[str, str]
    """Factors that were not, by layer and side, and why."""
    device: str

    @property
    def speeds(self) -> list[float]:
        """Speed of inversion at each candidate, relative to that at the smallest."""
        return [self.seconds[0] / seconds for seconds in self.seconds]

    def as_dict(self) -> dict[str, Any]:
        """All of it, with the speeds, as plain types."""
        return asdict(self) | {"speeds": self.speeds}


def choose_block_size(
    model: nn.Module,
    loss_of_a_batch: Callable[[], Tensor],
    *,
    precondition_bias: bool = False,
    max_rows: int | None = 1024,
    statistics: str | KfacApprox = "expand",
    fused: Mapping[str, int] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> BlockSplit:
    """Measure on this device and network which ``block_size`` a `Curvature` should have (about a second to a minute).

    Gradients, buffers (running means) and torch's random numbers are afterwards what they were before.

    Args:
        model: on the device that will train it, in training mode.
        loss_of_a_batch: runs the model on one batch of real training data and gives the loss; no backward pass. A
            network whose whole factors need more than a GiB has it called several times.
        precondition_bias, max_rows, statistics, fused, parameters: as in `Curvature`.

    Raises:
        ValueError: no factor could be looked at, with the reasons.

    >>> model = nn.Sequential(nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 1))
    >>> x, y = torch.randn(64, 40), torch.randn(64, 1)
    >>> split = choose_block_size(model, lambda: nn.functional.mse_loss(model(x), y))
    >>> split.candidates, split.shares[-1], split.block_size in split.candidates
    ([1, 16, 32, 40], 1.0, True)
    """
    statistics = statistics if isinstance(statistics, KfacApprox) else STATISTICS[statistics]
    layers, _ = discover_layers(
        model,
        block_size=None,
        precondition_bias=precondition_bias,
        only=None if parameters is None else set(parameters),
        statistics=statistics,
        fused=fused,
    )
    factors = {f"{name}.{side}": whole for name, layer in layers.items() for side, whole in _cuttable(layer).items()}
    left_out = {
        key: f"{whole.width} wide, more than {WIDEST}" for key, whole in factors.items() if whole.width > WIDEST
    }
    wanted = {key: whole for key, whole in factors.items() if key not in left_out}
    sizes = candidates(max((whole.width for whole in wanted.values()), default=1))
    weights = [layer.parameters[0] for layer in layers.values()]
    device = weights[0].device if weights else torch.device("cpu")
    dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
    kept: list[Tensor] = []
    with _left_as_it_was(model, device):
        for key, factor in _observed(layers, wanted, loss_of_a_batch, dtype, max_rows):
            if factor is None or not bool(torch.isfinite(factor).all()):
                left_out[key] = "not observed" if factor is None else "not finite"
                continue
            kept.append(spectral_losses(factor, sizes, statistics.partition) < TOLERABLE_LOSS)
    if left_out and not kept:
        raise ValueError(
            f"No factor could be looked at for the choice of block_size: {_some(left_out)}. Give block_size a number."
        )
    shares = torch.stack(kept).double().mean(0).tolist() if kept else [1.0] * len(sizes)
    cuts = [factors[key] for key in wanted if key not in left_out]
    seconds = [_inversion_seconds(cuts, size, statistics.partition, device, dtype) for size in sizes]
    crossing, block_size = cross(sizes, shares, [seconds[0] / each for each in seconds])
    return BlockSplit(block_size, crossing, sizes, shares, seconds, len(kept), left_out, _name(device))


def candidates(widest: int) -> list[int]:
    """The sizes to try: 1, then powers of two from 16, then the widest factor whole.

    >>> candidates(576), candidates(10), candidates(1)
    ([1, 16, 32, 64, 128, 256, 512, 576], [1, 10], [1])
    """
    powers = [2**n for n in range(4, 64) if 2**n < widest]
    return sorted({1, *powers, widest})


def cross(candidates: Sequence[int], shares: Sequence[float], speeds: Sequence[float]) -> tuple[float, int]:
    """Where the rising curve first meets the falling one, and the candidate nearest to that.

    Between candidates both curves are straight lines over the logarithm of the size; nearest is meant there too (the
    larger one if two are). If shares are above from the start, that is the smallest candidate; if they never get there,
    nothing is gained by cutting, and it is the largest.

    >>> cross([1, 16, 64, 128, 256], [0.0, 0.3, 0.5, 0.7, 1.0], [1.0, 0.9, 0.75, 0.55, 0.2])
    (98.7, 128)
    """
    above = [share - speed for share, speed in zip(shares, speeds, strict=True)]
    first = next((index for index, difference in enumerate(above) if difference >= 0), len(above) - 1)
    if first == 0 or above[first] < 0:
        return float(candidates[first]), candidates[first]
    low, high = math.log2(candidates[first - 1]), math.log2(candidates[first])
    place = low + (high - low) * above[first - 1] / (above[first - 1] - above[first])
    return 2.0**place, candidates[first if place >= (low + high) / 2 else first - 1]


def _cuttable(layer: Layer) -> dict[str, BlockPartition]:
    """The whole factors of a layer that could be cut: not those that are diagonal anyway, nor single numbers."""
    sides = {"A": layer.A, "G": layer.G}
    return {side: whole for side, whole in sides.items() if whole and whole.n_blocks == 1 and whole.width > 1}


def _observed(
    layers: dict[str, Layer],
    wanted: dict[str, BlockPartition],
    loss_of_a_batch: Callable[[], Tensor],
    dtype: torch.dtype,
    max_rows: int | None,
) -> Iterator[tuple[str, Tensor | None]]:
    """The sums of a aᵀ and g gᵀ over a batch, ``[groups, d, d]`` each, None if nothing came; few are held at a time."""
    for keys in _passes(wanted):
        sums: dict[str, Tensor] = {}

        names = {key.rpartition(".")[0] for key in keys}
        uses = {use.name: (name, use) for name in names for use in layers[name].uses}

        def observe(
            use_name: str, a: Tensor, g: Tensor, keys: set[str] = keys, sums: dict[str, Tensor] = sums,
            uses: Mapping[str, tuple[str, ModuleUse]] = uses,
        ) -> None:  # fmt: skip
            name, use = uses[use_name]
            if layers[name].kind in (LINEAR, LINEAR_TRANSPOSED) and not are_rows_of(layers[name], use.module, a, g):
                return
            seen = layers[name].observe(a, g, dtype, max_rows, use.module)
            # The scale of a factor does not matter here.
            for side, rows in (("A", seen.a), ("G", seen.g)):
                key = f"{name}.{side}"
                if rows is not None and key in keys:
                    into = sums.setdefault(key, rows.new_zeros(wanted[key].shape))
                    add_covariance_(into.view(wanted[key].sums_shape), rows, wanted[key])

        called = {name: use.module for name, (_, use) in uses.items() if use.attention is None}
        hooks = Hooks(
            called,
            lambda name: True,
            observe,
            attention_uses(use for _, use in uses.values()),
            weight_of=lambda use_name, uses=uses: uses[use_name][1].weight,  # type: ignore[misc]
            needs_returned=registered_uses(layers[name] for name in names).__contains__,
        )
        try:
            with torch.enable_grad():
                loss_of_a_batch().backward()
        finally:
            hooks.remove()
        for key in [key for key in wanted if key in keys]:
            factor = sums.pop(key, None)
            yield key, None if factor is None else factor[:, 0]


def _passes(wanted: dict[str, BlockPartition]) -> list[set[str]]:
    """The factors in portions of at most `PASS_ELEMENTS`."""
    passes: list[set[str]] = []
    room = 0
    for key, whole in wanted.items():
        elements = math.prod(whole.shape)
        if not passes or elements > room:
            passes.append(set())
            room = PASS_ELEMENTS
        passes[-1].add(key)
        room -= elements
    return passes


def _inversion_seconds(
    factors: Sequence[BlockPartition], block_size: int, partition: PartitionFn, device: torch.device, dtype: torch.dtype
) -> float:
    """Time of inverting all blocks of these factors once, as a refresh does: those of one size together.

    A block of size 1 is timed as one of size 2: inverting a diagonal is a division, and beside that every real
    inversion would seem slow, on every device, and the curves would always cross before 16.
    """
    numbers: dict[int, int] = {}
    for whole in factors:
        blocks = partition(whole.width, block_size, whole.groups)
        size = max(blocks.size, 2)
        numbers[size] = numbers.get(size, 0) + blocks.groups * blocks.n_blocks
    total = 0.0
    for size, n in numbers.items():
        timed = min(n, max(1, TIMED_ELEMENTS // size**2))
        total += _seconds_of_inverting(timed, size, device, dtype) * n / timed
    return max(total, 1e-9)


def _seconds_of_inverting(n: int, size: int, device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few runs, since other work on the machine only adds."""
    blocks = torch.eye(size, dtype=dtype, device=device).repeat(n, 1, 1)
    damping = torch.ones(n, dtype=dtype, device=device)
    best, runs, began = math.inf, 0, time.perf_counter()
    while runs < 2 or (runs < 7 and time.perf_counter() - began < 0.2):
        started = time.perf_counter()
        _, succeeded = damped_inverses(blocks, damping)
        bool(succeeded.all())  # waits for the device
        best, runs = min(best, time.perf_counter() - started), runs + 1
    return best


@contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts gradients, buffers and the state of torch's random numbers back."""
    grads = {p: p.grad for p in model.parameters()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        for p in grads:
            p.grad = None  # not to add to what is there
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for p, grad in grads.items():
            p.grad = grad


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _some(reasons: dict[str, str], n: int = 5) -> str:
    more = f" and {len(reasons) - n} more" if len(reasons) > n else ""
    return ", ".join(f"{key} ({why})" for key, why in list(reasons.items())[:n]) + more
