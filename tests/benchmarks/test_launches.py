"""How many operations a step sends to a GPU: the counts, and how they are counted."""

from __future__ import annotations

import pytest
import torch

from benchmarks import launches
from benchmarks.common.models import ViT
from benchmarks.common.workloads import Workload, images
from lightning_thor.linalg import memory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "vit", pytest.param("resnet50", marks=pytest.mark.long)])
def test_no_step_launches_more_than_its_limit(name: str) -> None:
    limits = launches.LIMITS[name]
    counts = launches.count(launches.WORKLOADS[name], sorted({kind.split(",")[0] for kind in limits}), staggered=False)
    for kind, (of_passes, of_step) in limits.items():
        assert 0 <= counts[kind].passes <= of_passes, kind
        assert 0 < counts[kind].step <= of_step, kind


def vit(layers: int) -> Workload:
    return Workload(lambda: ViT(layers, 16, 2), images(2), "a small ViT")


def test_what_a_deeper_network_adds() -> None:
    """To a plain step one product for each linear layer, the one from the right; nothing for parameters. To a refresh
    four operations at most for each layer that is observed."""
    two, four = (launches.count(vit(layers), ["natural"], staggered=False) for layers in (2, 4))
    linear, observed = 4, 6  # of each block; two norms
    assert four["natural, plain"].step - two["natural, plain"].step == 2 * linear
    assert four["natural, plain"].passes == two["natural, plain"].passes == 0
    assert four["natural, refresh"].passes - two["natural, refresh"].passes <= 2 * observed * 4


def test_views_and_allocations_are_no_launches_and_copies_are() -> None:
    x = torch.ones(4, 6)
    free = lambda: (x.view(24), x.mT, x[1:], x.split(2), x.detach(), torch.empty(3), torch.empty_like(x))  # noqa: E731
    assert launches.launches_of(free) == 0
    for launch in (lambda: x.clone(), lambda: x.mT.reshape(24), lambda: x.add_(1.0), lambda: torch.zeros(3)):
        assert launches.launches_of(launch) == 1


def test_a_count_leaves_the_devices_as_they_are() -> None:
    launches.count(vit(1), [])
    assert {"cpu"} == memory.HOST
