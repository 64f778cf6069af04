"""The hardware-driven choice of the block size: what partitioning saves on this device, and loses on this network.

The paper (THOR: Chen et al., AAAI 2021) tries the sizes 1, 16, 32, ... up to the widest layer and draws two curves: the
share of the factors that keep nearly all of their spectral norm when they are partitioned (it rises), and the speed of
inversion, relative to the smallest size (it falls). Where they cross is the size. It reports 106 for ResNet-50 on an
Ascend 910, so 128.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.block_size.spectral_loss import PartitionFn, spectral_losses
from lightning_thor.layers.base import Layer, uses_by_caller
from lightning_thor.layers.discovery import discover_layers, name_some
from lightning_thor.layers.hooks import Hooks
from lightning_thor.layers.registry import STATISTICS, KfacApprox
from lightning_thor.linalg.block_diagonal import BlockPartition, add_covariance_
from lightning_thor.linalg.decompositions import damped_inverses

TOLERABLE_LOSS = 0.01
"""A factor that loses less than this share of its spectral norm counts as kept; the paper's figure."""

WIDEST = 8192
"""Wider factors (the vocabulary of a language model) are not measured: one alone would take over 256 MiB."""

PORTION_NUMEL = 2**28
"""Numbers of whole factors that are held at a time, 1 GiB in float32; a larger network takes several passes."""

TIMED_NUMEL = 2**24
"""Numbers in the blocks that are inverted at a time for timing; the time of more is taken to be proportional."""


@dataclass(frozen=True)
class BlockSplit:
    """The measurement and the choice: plain types, for JSON."""

    block_size: int
    """The choice: the candidate nearest to the crossing, as a ratio."""
    crossing: float
    """Where the two curves cross, interpolated between candidates."""
    candidates: list[int]
    shares: list[float]
    """Share of the factors that lose less than 1 % of their spectral norm at each candidate, 0..1."""
    seconds: list[float]
    """Time to invert the blocks of all these factors once, at each candidate."""
    n_factors: int
    """Number of factors that were measured: A and G of each layer, if they can be partitioned."""
    left_out: dict[str, str]
    """Factors that were not measured, by layer and side, and why."""
    device: str

    @property
    def speeds(self) -> list[float]:
        """Speed of inversion at each candidate, relative to the smallest."""
        return [self.seconds[0] / seconds for seconds in self.seconds]

    def as_dict(self) -> dict[str, Any]:
        """All fields and the speeds, as plain types."""
        return asdict(self) | {"speeds": self.speeds}


def choose_block_size(
    model: nn.Module,
    loss_of_a_batch: Callable[[], Tensor],
    *,
    precondition_bias: bool = False,
    max_rows: int | None = 1024,
    statistics: str | KfacApprox = "expand",
    fused: Mapping[str, int] | None = None,
    skip_layers: Sequence[str] = (),
    parameters: Iterable[nn.Parameter] | None = None,
) -> BlockSplit:
    """Measure on this device and network which ``block_size`` a `Curvature` should have (about a second to a minute).

    Gradients, buffers (running means) and torch's random numbers are restored.

    Args:
        model: on the device that will train it, in training mode.
        loss_of_a_batch: runs the model on one batch of real training data and returns the loss; no backward pass. It is
            called several times if the network's whole factors need more than a GiB.
        precondition_bias: as in `Curvature`.
        max_rows: as in `Curvature`.
        statistics: as in `Curvature`.
        fused: as in `Curvature`.
        skip_layers: as in `Curvature`.
        parameters: as in `Curvature`.

    Raises:
        ValueError: no factor could be measured, with the reasons.

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
        skip_layers=skip_layers,
    )
    sides = [(f"{name}.{side}", whole) for name, at in layers.items() for side, whole in (("A", at.A), ("G", at.G))]
    # No partition changes a diagonal factor or a single number.
    factors = {key: whole for key, whole in sides if whole and whole.n_blocks == 1 and whole.width > 1}
    left_out = {key: f"{at.width} wide, more than {WIDEST}" for key, at in factors.items() if at.width > WIDEST}
    wanted = {key: whole for key, whole in factors.items() if key not in left_out}
    sizes = candidates(max((whole.width for whole in wanted.values()), default=1))
    weights = [layer.parameters[0] for layer in layers.values()]
    device = weights[0].device if weights else torch.device("cpu")
    dtype = torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
    are_kept: list[Tensor] = []
    with _left_as_it_was(model, device):
        for portion in _portions(wanted):
            sums = _observe(layers, portion, loss_of_a_batch, dtype, max_rows)
            for key in portion:
                factor = sums.pop(key, None)
                if factor is None or not bool(torch.isfinite(factor).all()):
                    left_out[key] = "not observed" if factor is None else "not finite"
                    continue
                are_kept.append(spectral_losses(factor[:, 0], sizes, statistics.partition) < TOLERABLE_LOSS)
    if left_out and not are_kept:
        raise ValueError(
            "No factor could be looked at for the choice of block_size: "
            f"{name_some([f'{key} ({why})' for key, why in left_out.items()])}. Give block_size a number."
        )
    shares = torch.stack(are_kept).double().mean(0).tolist() if are_kept else [1.0] * len(sizes)
    measured = [factors[key] for key in wanted if key not in left_out]
    seconds = [_inversion_seconds(measured, size, statistics.partition, device, dtype) for size in sizes]
    crossing, block_size = cross(sizes, shares, [seconds[0] / each for each in seconds])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return BlockSplit(block_size, crossing, sizes, shares, seconds, len(are_kept), left_out, name)


def candidates(widest: int) -> list[int]:
    """Sizes to try: 1, then powers of two from 16, then the widest factor whole.

    >>> candidates(576), candidates(10), candidates(1)
    ([1, 16, 32, 64, 128, 256, 512, 576], [1, 10], [1])
    """
    return sorted({1, *(2**n for n in range(4, 64) if 2**n < widest), widest})


def cross(candidates: Sequence[int], shares: Sequence[float], speeds: Sequence[float]) -> tuple[float, int]:
    """The size where the rising curve first meets the falling one, and the candidate nearest to it.

    Between candidates both curves are straight lines over the logarithm of the size, in which nearness is measured too
    (of two equally near candidates the larger is chosen). If the shares are above the speeds from the start, the result
    is the smallest candidate; if they never are, nothing is gained by partitioning, and it is the largest.

    Args:
        candidates: sizes, rising.
        shares: of the factors that keep their spectral norm, rising, for each candidate.
        speeds: of inversion, falling, for each candidate.

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


def _observe(
    layers: dict[str, Layer], wanted: Mapping[str, BlockPartition], loss_of_a_batch: Callable[[], Tensor],
    dtype: torch.dtype, max_rows: int | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The wanted factors of a batch, by key, if they were observed: sums of a aᵀ or g gᵀ, ``[groups, 1, d, d]``."""
    sums: dict[str, Tensor] = {}
    names = {key.rpartition(".")[0] for key in wanted}
    uses = {use.name: (layers[name], use) for name in names for use in layers[name].uses}

    def observe(use_name: str, a: Tensor, g: Tensor) -> None:
        layer, use = uses[use_name]
        # Tensor parallelism makes DTensors; this floor does not know torch.distributed.
        a, g = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (a, g))
        if not layer.kind.fits(use.module, a, g):
            return
        seen = layer.observe(a, g, dtype, max_rows, use.module)
        # The scale of a factor does not matter here.
        for side, rows in (("A", seen.a), ("G", seen.g)):
            key = f"{layer.name}.{side}"
            if rows is not None and key in wanted:
                into = sums.setdefault(key, rows.new_zeros(wanted[key].shape))
                add_covariance_(into.view(wanted[key].sums_shape), rows, wanted[key])

    hooks = Hooks(
        {name: use.module for name, (_, use) in uses.items() if use.caller is None},
        lambda name: True,
        observe,
        uses_by_caller(use for _, use in uses.values()),
        weight_of=lambda name: uses[name][1].weight,
        needs_returned=lambda name: uses[name][0].needs_returned(uses[name][1]),
    )
    try:
        with torch.enable_grad():
            loss_of_a_batch().backward()
    finally:
        hooks.remove()
    return sums


def _portions(wanted: Mapping[str, BlockPartition]) -> list[dict[str, BlockPartition]]:
    """The factors in portions of at most `PORTION_NUMEL` numbers, each for a pass of its own, or of one factor."""
    portions: list[dict[str, BlockPartition]] = []
    room = 0
    for key, whole in wanted.items():
        numel = math.prod(whole.shape)
        if not portions or numel > room:
            portions.append({})
            room = PORTION_NUMEL
        portions[-1][key] = whole
        room -= numel
    return portions


def _inversion_seconds(
    factors: Sequence[BlockPartition], block_size: int, partition: PartitionFn, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds to invert all blocks of these factors once, as a refresh does: blocks of one size together.

    A block of size 1 is timed as one of size 2: inverting a diagonal is a division, and beside that every real
    inversion would seem slow, on every device, and the curves would always cross before 16.
    """
    n_blocks: Counter[int] = Counter()
    for whole in factors:
        blocks = partition(whole.width, block_size, whole.groups)
        n_blocks[max(blocks.size, 2)] += blocks.groups * blocks.n_blocks
    total = 0.0
    for size, n in n_blocks.items():
        timed = min(n, max(1, TIMED_NUMEL // size**2))
        total += _seconds_of_inverting(timed, size, device, dtype) * n / timed
    return max(total, 1e-9)


def _seconds_of_inverting(n: int, size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Time to invert ``n`` blocks of ``size``: the best of a few runs, since other work on the machine only adds."""
    blocks = torch.eye(size, dtype=dtype, device=device).repeat(n, 1, 1)
    damping = torch.ones(n, dtype=dtype, device=device)
    times: list[float] = []
    while len(times) < 2 or (len(times) < 7 and sum(times) < 0.2):
        started = time.perf_counter()
        _, succeeded = damped_inverses(blocks, damping)
        bool(succeeded.all())  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times)


@contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A context that restores gradients, buffers and the state of torch's random numbers."""
    grads = {p: p.grad for p in model.parameters()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        for p in grads:
            p.grad = None  # or the trial's gradients would be added
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for p, grad in grads.items():
            p.grad = grad
