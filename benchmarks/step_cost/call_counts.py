"""Package code that a pair (a, g), a plain step and a refresh run through, as counted by Python's profiler.

    python -m benchmarks.step_cost.call_counts

For what counts as a call see `benchmarks.step_cost.profiler.PackageProfile`.
"""

from collections.abc import Iterator, Mapping

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from benchmarks.common.tables import rich_table
from benchmarks.step_cost.profiler import PackageProfile
from lightning_thor import Curvature, Thor

LIMITS = {
    "files of a pair": 12,
    "functions of a plain step": 60,
    "calls of a plain step": 100,
    "functions of a first refresh": 220,
    "calls of a first refresh": 513,
}
"""Upper limits, held by a test."""
HEADS = ("of a two-layer net, natural mode", "count", "limit")


def profile_pair() -> PackageProfile:
    """Profile forward and backward of one linear layer whose refresh is due: from the hook to the sums of A and G."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    curvature = Curvature(layer)
    with PackageProfile() as profile:
        layer(torch.randn(16, 8)).square().sum().backward()
    curvature.close()
    return profile


def profile_steps() -> tuple[PackageProfile, PackageProfile]:
    """Profile forward, backward and ``optimizer.step()`` of the first step, which refreshes, and of a later plain step;
    returns both profiles in this order."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    curvature = Curvature(net, update_every_n_steps=10)
    optimizer = Thor(net.parameters(), preconditioner=curvature)
    inputs, targets = torch.randn(16, 8), torch.randint(4, (16,))
    profiles = []
    for _ in range(3):
        with PackageProfile() as profile:
            F.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
        optimizer.zero_grad()
        profiles.append(profile)
    curvature.close()
    return profiles[0], profiles[-1]


def count() -> dict[str, int]:
    """Count what ``LIMITS`` limits, where a process has once taken such steps before."""
    profile_steps()
    refresh, plain = profile_steps()
    return {
        "files of a pair": len(profile_pair().files),
        "functions of a plain step": plain.n_functions,
        "calls of a plain step": plain.n_calls,
        "functions of a first refresh": refresh.n_functions,
        "calls of a first refresh": refresh.n_calls,
    }


def cells(counts: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """One row under ``HEADS`` for each count."""
    for name, number in counts.items():
        yield name, str(number), str(LIMITS[name])


def main() -> None:
    """Print the counts, and the files of a pair."""
    console = Console()
    console.print(rich_table("Python calls inside lightning_thor", HEADS, cells(count())))
    console.print(f"Files of a pair: {', '.join(profile_pair().files)}")


if __name__ == "__main__":
    main()
