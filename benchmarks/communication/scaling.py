"""A cost model of a refresh on many ranks: exact bytes and work, times from assumed rates; see docs/scaling.md.

python -m benchmarks.communication.scaling                          # its tables
python -m benchmarks.communication.scaling --bandwidth 50 --latency 5
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from benchmarks.common.environment import RESULTS
from benchmarks.common.tables import markdown_table
from benchmarks.communication.messages import WAYS, block_counts, count_messages, curvature_of
from benchmarks.communication.rank_times import LARGE_NUMEL, SMALL_NUMEL
from benchmarks.communication.workloads import WORKLOADS
from examples.char_gpt import CharGPT
from examples.resnet import ResNet50
from lightning_thor import Curvature
from lightning_thor.distributed.assignment import assign_greedily
from lightning_thor.layers.base import Layer

RANKS = (8, 64, 256, 1024)
INTERVAL = 10
# Measured on a CPU: an eigendecomposition takes 7 to 11 Cholesky factorisations of the same block.
EIGEN = 9.0
WIDEST = 8192
"""The widest layer that kfac-pytorch preconditions here."""
PUBLISHED_BLOCK_SIZE = 128
"""nn.thor's, and the paper's on Ascend 910."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": ResNet50,
    "GPT-2 small": lambda: CharGPT(vocab_size=50257, context=1024, width=768, layers=12, heads=12),
}
HEADS = ("model", "way", *(f"{n} ranks, ms" for n in RANKS), f"MB sent at {RANKS[1]}", f"work at {RANKS[1]}, %")
CHECK_HEADS = (
    "model", "ranks", "latency, µs", "GB/s", "10⁹ multiplications/s", "sums, ms: model / measured", "gathering, ms",
    "inverting, ms",
)  # fmt: skip


class Rates(NamedTuple):
    """Assumed rates of a machine."""

    latency: float
    """Microseconds before a message moves."""
    bandwidth: float
    """Gigabytes (10⁹) that a rank sends in a second."""
    inversion: float
    """10⁹ multiplications a second, at size³ for each inverse."""

    def all_reduce(self, n_bytes: float, n_ranks: int) -> float:
        """Milliseconds of recursive halving and doubling (Thakur et al. 2005), of ``n_bytes`` on each rank."""
        return self._message(2 * math.log2(n_ranks), 2 * (1 - 1 / n_ranks) * n_bytes)

    def all_gather(self, n_bytes: float, n_ranks: int) -> float:
        """Milliseconds of recursive doubling, of ``n_bytes`` from each rank."""
        return self._message(math.log2(n_ranks), (n_ranks - 1) * n_bytes)

    def all_to_all(self, n_bytes: float, n_ranks: int) -> float:
        """Milliseconds of pairwise exchange, of ``n_bytes`` in all from each rank."""
        return self._message(n_ranks - 1, (1 - 1 / n_ranks) * n_bytes)

    def broadcast(self, n_bytes: float, n_ranks: int) -> float:
        """Milliseconds of a scatter and an all-gather, of ``n_bytes``: those of an all-reduce."""
        return self.all_reduce(n_bytes, n_ranks)

    def inverting(self, multiplications: float) -> float:
        """Milliseconds of inversions one after the other."""
        return multiplications / self.inversion / 1e6

    def _message(self, n_messages: float, n_bytes: float) -> float:
        return 1e-3 * n_messages * self.latency + n_bytes / self.bandwidth / 1e6


ASSUMED = Rates(latency=10.0, bandwidth=12.5, inversion=500.0)
# Milliseconds at no latency and 10⁻⁶ gigabytes a second are bytes.
BYTES = Rates(latency=0.0, bandwidth=1e-6, inversion=1.0)


class Cost(NamedTuple):
    """Cost of one refresh and of the ``INTERVAL`` steps that use it."""

    ms: float
    n_bytes: float
    """Bytes that each rank sends."""
    work: float
    """Multiplications of the inversions of the busiest rank."""


def ours(curvature: Curvature, n_ranks: int, rates: Rates, way: str = "buckets") -> Cost:
    """This package: triangles of blocks reduced, inversions shared block by block, triangles of inverses gathered."""
    counted = count_messages(curvature, WAYS[way], n_ranks)
    messages = counted["factors"] + counted["inverses"]
    costs = [float(size**3) for size, n in block_counts(curvature).items() if size > 1 for _ in range(n)]
    work = busiest(costs, n_ranks)
    ms, n_bytes = (sum(getattr(clock, kind)(n, n_ranks) for kind, n in messages) for clock in (rates, BYTES))
    return Cost(ms + rates.inverting(work), n_bytes, work)


def nn_thor(curvature: Curvature, n_ranks: int, rates: Rates) -> Cost:
    """MindSpore's: every rank inverts all blocks of its own batch's factors; the inverses are averaged, as squares."""
    blocks = block_counts(curvature)
    n_bytes = 4 * sum(n * size**2 for size, n in blocks.items())
    work = float(sum(n * size**3 for size, n in blocks.items() if size > 1))
    ms = rates.all_reduce(n_bytes, n_ranks) + rates.inverting(work)
    return Cost(ms, BYTES.all_reduce(n_bytes, n_ranks), work)


def kfac(curvature: Curvature, n_ranks: int, rates: Rates, gradient_workers: float) -> Cost:
    """kfac-pytorch (KAISA: Pauloski et al. 2021, arXiv:2107.01739): whole factors, a layer's eigenvectors by one rank.

    ``gradient_workers`` is the share of the ranks that receive a layer's eigenvectors: 1 is its COMM-OPT, 1 / ranks its
    MEM-OPT, between them HYBRID. The others receive the preconditioned gradient at every step. Linear layers and
    convolutions only, without those wider than ``WIDEST`` (a language model's head); factors are sent as triangles.
    """
    with_A = [layer for layer in curvature.layers.values() if layer.A and not isinstance(layer.module, nn.Embedding)]
    layers = [layer for layer in with_A if max(widths(layer)) <= WIDEST]
    sizes = [widths(layer) for layer in layers]
    work = busiest([EIGEN * float(sum(width**3 for width in both)) for both in sizes], n_ranks)
    workers = max(round(gradient_workers * n_ranks), 1)
    others = n_ranks // workers
    factors = 4.0 * sum(width * (width + 1) // 2 for both in sizes for width in both)
    ms, n_bytes = rates.all_reduce(factors, n_ranks) + rates.inverting(work), BYTES.all_reduce(factors, n_ranks)
    for layer, both in zip(layers, sizes, strict=True):
        eigenvectors = 4.0 * sum(width * width + width for width in both)
        gradient = 4.0 * sum(p.numel() for p in layer.parameters)
        of_ms, of_bytes = (
            (clock.broadcast(eigenvectors, workers) if workers > 1 else 0.0)
            + (INTERVAL * clock.broadcast(gradient, others) if others > 1 else 0.0)
            for clock in (rates, BYTES)
        )
        ms, n_bytes = ms + of_ms, n_bytes + of_bytes
    return Cost(ms, n_bytes, work)


def busiest(costs: list[float], n_ranks: int) -> float:
    """The load of the busiest rank when costs are assigned greedily, the largest first.

    >>> busiest([3.0, 2.0, 2.0], 2)
    4.0
    """
    loads = [0.0] * n_ranks
    for cost, owner in zip(costs, assign_greedily(costs, n_ranks), strict=True):
        loads[owner] += cost
    return max(loads)


def widths(layer: Layer) -> tuple[int, int]:
    """Widths of the whole factors A and G."""
    assert layer.A is not None
    return layer.A.width, layer.G.width


COMPARED: dict[str, Callable[[Curvature, int, Rates], Cost]] = {
    "thor_ddp": ours,
    "nn.thor's": nn_thor,
    "kfac-pytorch, COMM-OPT": partial(kfac, gradient_workers=1.0),
    "kfac-pytorch, HYBRID ½": partial(kfac, gradient_workers=0.5),
    "kfac-pytorch, MEM-OPT": partial(kfac, gradient_workers=0.0),
}


def markdown(rates: Rates = ASSUMED) -> str:
    """The table of docs/scaling.md, at these rates."""
    rows = []
    for name, model in MODELS.items():
        curvature, published = curvature_of(model), curvature_of(model, block_size=PUBLISHED_BLOCK_SIZE)
        whole = nn_thor(published, RANKS[0], rates).work
        for way, cost_of in COMPARED.items():
            costs = {n: cost_of(published if cost_of is nn_thor else curvature, n, rates) for n in RANKS}
            one = costs[RANKS[1]]
            times = (f"{costs[n].ms:.1f}" for n in RANKS)
            rows.append((name, way, *times, f"{one.n_bytes / 1e6:.0f}", f"{100 * one.work / whole:.1f}"))
    return markdown_table(HEADS, rows, words=2)


def measured() -> dict[str, Any]:
    """The results of ``python -m benchmarks.communication --measure``."""
    results: dict[str, Any] = json.loads((RESULTS / "communication.json").read_text(encoding="utf-8"))
    return results


def rates_of(one: dict[str, Any], n_ranks: int) -> Rates:
    """The machine's rates, from messages and inversions that `rank_times.measure` timed on ``n_ranks`` processes."""
    small_ms, large_ms = one["message_ms"]["small"], one["message_ms"]["large"]
    bytes_sent = 2 * (1 - 1 / n_ranks)
    bandwidth = bytes_sent * 4.0 * (LARGE_NUMEL - SMALL_NUMEL) / (large_ms - small_ms) / 1e6
    latency = 1e3 * (small_ms - bytes_sent * 4.0 * SMALL_NUMEL / bandwidth / 1e6) / (2 * math.log2(n_ranks))
    return Rates(latency, bandwidth, one["inversion"])


def check(results: dict[str, Any]) -> str:
    """Compare the refreshes of `measured` with the model at rates measured beside them: a table and a sentence."""
    rows = []
    apart = [1.0, 1.0, 1.0]
    for name, result in results.items():
        curvature = curvature_of(WORKLOADS[name].model)
        for n_ranks, one in result.get("times", {}).items():
            n = int(n_ranks)
            rates = rates_of(one, n) if n > 1 else Rates(0.0, 1.0, one["inversion"])
            counted = count_messages(curvature, WAYS["at once"], n)
            predicted = [
                sum(getattr(rates, kind)(n_bytes, n) for kind, n_bytes in counted[part]) if n > 1 else 0.0
                for part in ("factors", "inverses")
            ]
            alone = rates._replace(inversion=result["times"].get("1", one)["inversion"])
            predicted.append(alone.inverting(ours(curvature, n, alone).work))
            times = one["ways"]["at once"]
            both = list(zip(predicted, (times["wait"], times["gather"], max(times["inverting"])), strict=True))
            pairs = (f"{a:.1f} / {b:.1f}" for a, b in both)
            apart = [max(far, a / b, b / a) if a and b else far for far, (a, b) in zip(apart, both, strict=True)]
            rows.append(
                (name, n_ranks, f"{rates.latency:.0f}", f"{rates.bandwidth:.2f}", f"{alone.inversion:.1f}", *pairs)
            )
    sums, gathering, inverting = apart
    return (
        f"{markdown_table(CHECK_HEADS, rows)}\n\nLargest factor between model and measurement: sums {sums:.1f}, "
        f"gathering {gathering:.1f}, inverting {inverting:.1f}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables, the first at the given rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=ASSUMED.latency, help="microseconds of a message")
    parser.add_argument("--bandwidth", type=float, default=ASSUMED.bandwidth, help="GB/s that a rank sends")
    parser.add_argument("--inversion", type=float, default=ASSUMED.inversion, help="10⁹ multiplications a second")
    args = parser.parse_args(arguments)
    print(markdown(Rates(args.latency, args.bandwidth, args.inversion)))
    print(f"\n{check(measured())}")


if __name__ == "__main__":
    main()
