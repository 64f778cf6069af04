"""A cost model of a refresh on many ranks: exact bytes and work, times by assumed rates (words: docs/scaling.md).

python -m benchmarks.communication.scaling                          # the tables of docs/scaling.md
python -m benchmarks.communication.scaling --bandwidth 50 --latency 5
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.common.environment import RESULTS
from benchmarks.communication.messages import WAYS, counts
from benchmarks.communication.rank_times import LARGE, SMALL, WORKLOADS
from benchmarks.readme import markdown_table
from examples.char_gpt import CharGPT
from examples.resnet import ResNet50
from lightning_thor import Curvature
from lightning_thor.distributed.assignment import assign_greedily
from lightning_thor.layers.base import Layer
from lightning_thor.layers.embedding import EMBEDDING

RANKS = (8, 64, 256, 1024)
INTERVAL = 10
# Measured on a CPU: an eigendecomposition takes 7 to 11 Cholesky factorisations of the same block.
EIGEN = 9.0
WIDEST = 8192
PUBLISHED_BLOCK_SIZE = 128
"""nn.thor's, and the paper's on Ascend 910."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": ResNet50,
    "GPT-2 small": lambda: CharGPT(vocab_size=50257, context=1024, width=768, layers=12, heads=12),
}
HEADS = ("model", "way", *(f"{n} ranks, ms" for n in RANKS), f"MB sent at {RANKS[1]}", f"work at {RANKS[1]}, %")
CHECK_HEADS = (
    "model",
    "ranks",
    "latency, µs",
    "GB/s",
    "10⁹ multiplications/s",
    "sums, ms: model / measured",
    "gathering, ms",
    "inverting, ms",
)
MESSAGES = {"small": SMALL, "large": LARGE}


class Rates(NamedTuple):
    """What is assumed of a machine."""

    latency: float
    """Microseconds before a message moves."""
    bandwidth: float
    """Gigabytes (10⁹) that a rank sends in a second."""
    inversion: float
    """10⁹ multiplications a second, at size³ for each inverse."""

    def all_reduce(self, n_bytes: float, n_ranks: int) -> float:
        """Milliseconds of recursive halving and doubling (Thakur et al. 2005)."""
        return self._message(2 * math.log2(n_ranks), 2 * (1 - 1 / n_ranks) * n_bytes)

    def all_gather(self, n_bytes: float, n_ranks: int) -> float:
        """Milliseconds of recursive doubling, each rank giving ``n_bytes``."""
        return self._message(math.log2(n_ranks), (n_ranks - 1) * n_bytes)

    def all_to_all(self, n_bytes: float, n_ranks: int) -> float:
        """Milliseconds of pairwise exchange, each rank giving ``n_bytes`` in all."""
        return self._message(n_ranks - 1, (1 - 1 / n_ranks) * n_bytes)

    def broadcast(self, n_bytes: float, n_ranks: int) -> float:
        """Milliseconds of a scatter and an all-gather."""
        return self._message(2 * math.log2(n_ranks), 2 * (1 - 1 / n_ranks) * n_bytes)

    def inverting(self, multiplications: float) -> float:
        """Milliseconds of inversions one after the other."""
        return multiplications / self.inversion / 1e6

    def _message(self, n_messages: float, n_bytes: float) -> float:
        return 1e-3 * n_messages * self.latency + n_bytes / self.bandwidth / 1e6


ASSUMED = Rates(latency=10.0, bandwidth=12.5, inversion=500.0)


class Cost(NamedTuple):
    """Of one refresh and the ``INTERVAL`` steps that use it."""

    ms: float
    n_bytes: float
    """That each rank sends."""
    work: float
    """Multiplications of the inversions of the rank that has most."""


def ours(curvature: Curvature, n_ranks: int, rates: Rates, way: str = "buckets") -> Cost:
    """This package: triangles of blocks reduced, inversions shared block by block, triangles of inverses gathered."""
    counted = counts(curvature.model, WAYS[way], n_ranks)
    messages = counted["factors"] + counted["inverses"]
    stacks = curvature.factors.batches.items()
    work = most([float(size**3) for size, stack in stacks if size > 1 for _ in range(len(stack.sums))], n_ranks)
    ms = sum(getattr(rates, kind)(n_bytes, n_ranks) for kind, n_bytes in messages) + rates.inverting(work)
    return Cost(ms, sum(getattr(BYTES, kind)(n_bytes, n_ranks) for kind, n_bytes in messages), work)


def nn_thor(curvature: Curvature, n_ranks: int, rates: Rates) -> Cost:
    """MindSpore's: every rank inverts all blocks of its own batch's factors; the inverses are averaged, as squares."""
    stacks = curvature.factors.batches
    n_bytes = 4 * sum(stack.sums.numel() for stack in stacks.values())
    work = float(sum(len(stack.sums) * size**3 for size, stack in stacks.items() if size > 1))
    ms = rates.all_reduce(n_bytes, n_ranks) + rates.inverting(work)
    return Cost(ms, BYTES.all_reduce(n_bytes, n_ranks), work)


def kfac(curvature: Curvature, n_ranks: int, rates: Rates, gradient_workers: float) -> Cost:
    """kfac-pytorch (KAISA: Pauloski et al. 2021, arXiv:2107.01739): whole factors, a layer's eigenvectors by one rank.

    ``gradient_workers`` is the share of the ranks that get a layer's eigenvectors: 1 is its COMM-OPT, 1 / ranks its
    MEM-OPT, between them HYBRID. The others get the preconditioned gradient at every step. Linear layers and
    convolutions only, without those wider than ``WIDEST`` (a language model's head); factors travel as triangles.
    """
    with_A = [layer for layer in curvature.layers.values() if layer.A is not None and layer.kind is not EMBEDDING]
    layers = [layer for layer in with_A if max(widths(layer)) <= WIDEST]
    sizes = [widths(layer) for layer in layers]
    costs = [EIGEN * float(sum(width**3 for width in both)) for both in sizes]
    work = most(costs, n_ranks)
    workers = max(round(gradient_workers * n_ranks), 1)
    factors = 4.0 * sum(width * (width + 1) // 2 for both in sizes for width in both)
    ms, n_bytes = rates.all_reduce(factors, n_ranks) + rates.inverting(work), BYTES.all_reduce(factors, n_ranks)
    for layer, both in zip(layers, sizes, strict=True):
        eigenvectors = 4.0 * sum(width * width + width for width in both)
        gradient = 4.0 * sum(p.numel() for p in layer.parameters)
        others = n_ranks // workers
        for clock, out in ((rates, "ms"), (BYTES, "bytes")):
            cost = clock.broadcast(eigenvectors, workers) if workers > 1 else 0.0
            cost += INTERVAL * clock.broadcast(gradient, others) if others > 1 else 0.0
            ms, n_bytes = (ms + cost, n_bytes) if out == "ms" else (ms, n_bytes + cost)
    return Cost(ms, n_bytes, work)


def most(costs: list[float], n_ranks: int) -> float:
    """What the busiest rank has when costs are shared out, the largest first.

    >>> most([3.0, 2.0, 2.0], 2)
    4.0
    """
    loads = [0.0] * n_ranks
    for cost, owner in zip(costs, assign_greedily(costs, n_ranks), strict=True):
        loads[owner] += cost
    return max(loads)


def widths(layer: Layer) -> tuple[int, int]:
    """Of the whole factors A and G."""
    assert layer.A is not None
    return layer.A.width, layer.G.width


# Milliseconds at no latency and 10⁻⁶ gigabytes a second are bytes.
BYTES = Rates(latency=0.0, bandwidth=1e-6, inversion=1.0)

COMPARED: dict[str, Callable[[Curvature, int, Rates], Cost]] = {
    "thor_ddp": ours,
    "nn.thor's": nn_thor,
    "kfac-pytorch, COMM-OPT": partial(kfac, gradient_workers=1.0),
    "kfac-pytorch, HYBRID ½": partial(kfac, gradient_workers=0.5),
    "kfac-pytorch, MEM-OPT": partial(kfac, gradient_workers=0.0),
}


def markdown(rates: Rates = ASSUMED) -> str:
    """The table of docs/scaling.md."""
    rows = []
    for name, model in MODELS.items():
        with torch.device("meta"):  # shapes alone
            curvature, published = Curvature(model()), Curvature(model(), block_size=PUBLISHED_BLOCK_SIZE)
        whole = nn_thor(published, RANKS[0], rates).work
        for way, cost_of in COMPARED.items():
            costs = {n: cost_of(published if cost_of is nn_thor else curvature, n, rates) for n in RANKS}
            one = costs[RANKS[1]]
            times = (f"{costs[n].ms:.1f}" for n in RANKS)
            rows.append((name, way, *times, f"{one.n_bytes / 1e6:.0f}", f"{100 * one.work / whole:.1f}"))
    return markdown_table(HEADS, rows, words=2)


def measured() -> dict[str, Any]:
    """What ``python -m benchmarks.communication --measure`` wrote."""
    results: dict[str, Any] = json.loads((RESULTS / "communication.json").read_text(encoding="utf-8"))
    return results


def rates_of(one: dict[str, Any], n_ranks: int) -> Rates:
    """The rates of the machine of a measurement, from two messages and some inversions on so many of its processes."""
    small, large = ({"bytes": 4.0 * length, "ms": one["message_ms"][what]} for what, length in MESSAGES.items())
    shape = 2 * (1 - 1 / n_ranks)
    bandwidth = shape * (large["bytes"] - small["bytes"]) / (large["ms"] - small["ms"]) / 1e6
    latency = 1e3 * (small["ms"] - shape * small["bytes"] / bandwidth / 1e6) / (2 * math.log2(n_ranks))
    return Rates(latency, bandwidth, one["inversion"])


def check(results: dict[str, Any]) -> str:
    """What the model says of the measured refreshes, at rates measured beside them, and what they took."""
    rows = []
    apart = [1.0, 1.0, 1.0]
    for name, result in results.items():
        curvature = Curvature(WORKLOADS[name].model())
        for n_ranks, one in result.get("times", {}).items():
            n = int(n_ranks)
            rates = rates_of(one, n) if n > 1 else Rates(0.0, 1.0, one["inversion"])
            counted = counts(curvature.model, WAYS["at once"], n)
            predicted = [
                sum(getattr(rates, kind)(n_bytes, n) for kind, n_bytes in counted[what]) if n > 1 else 0.0
                for what in ("factors", "inverses")
            ]
            alone = rates._replace(inversion=result["times"].get("1", one)["inversion"])
            predicted.append(alone.inverting(ours(curvature, n, alone).work))
            took = one["ways"]["at once"]
            measured = (took["wait"], took["gather"], max(took["inverting"]))
            both = list(zip(predicted, measured, strict=True))
            pairs = (f"{a:.1f} / {b:.1f}" for a, b in both)
            apart = [max(far, a / b, b / a) if a and b else far for far, (a, b) in zip(apart, both, strict=True)]
            rows.append(
                (name, n_ranks, f"{rates.latency:.0f}", f"{rates.bandwidth:.2f}", f"{alone.inversion:.1f}", *pairs)
            )
    sums, gathering, inverting = apart
    return (
        f"{markdown_table(CHECK_HEADS, rows)}\n\nThe farthest that model and measurement lie apart: sums a factor of "
        f"{sums:.1f}, gathering {gathering:.1f}, inverting {inverting:.1f}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, at the rates that are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=ASSUMED.latency, help="microseconds of a message")
    parser.add_argument("--bandwidth", type=float, default=ASSUMED.bandwidth, help="GB/s that a rank sends")
    parser.add_argument("--inversion", type=float, default=ASSUMED.inversion, help="10⁹ multiplications a second")
    options = parser.parse_args(arguments)
    print(markdown(Rates(options.latency, options.bandwidth, options.inversion)))
    print(f"\n{check(measured())}")


if __name__ == "__main__":
    main()
