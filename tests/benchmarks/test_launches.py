"""How many operations a step sends to a GPU: the counts, and how they are counted."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import history, launches
from benchmarks.common.models import ViT
from benchmarks.common.workloads import Workload, images
from lightning_thor.linalg import memory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "vit", pytest.param("resnet50", marks=pytest.mark.long)])
def test_no_step_launches_more_than_is_recorded(name: str) -> None:
    recorded = json.loads(launches.RESULT.read_text(encoding="utf-8"))[name]
    modes = launches.MODES if name == "gpt" else ["natural"]
    counts = launches.count(launches.WORKLOADS[name], modes, staggered=False)
    for kind, found in counts.items():
        limits = launches.Counts(*recorded[kind])
        assert found.passes <= limits.passes, kind
        assert 0 < found.step <= limits.step, kind
    newest = json.loads(history.RESULT.read_text(encoding="utf-8"))[-1]
    if name == "gpt" and newest["torch"] == history.counted_on()["torch"]:
        found_now = {kind: [counts[kind].passes, counts[kind].step] for kind in newest["launches"]}
        assert found_now == newest["launches"], "run: python -m benchmarks.history --append"


def vit(layers: int) -> Workload:
    return Workload(lambda: ViT(layers, 16, 2), images(2), "a small ViT")


def test_what_a_deeper_network_adds() -> None:
    """To a plain step one rescaling of each norm's parameters at most, nothing for linear layers. To a refresh four
    operations at most for each layer that is observed."""
    few, many = (launches.count(vit(layers), ["natural"], staggered=False) for layers in (4, 6))
    observed = 6  # of each block: four linear layers, two norms
    assert many["natural, plain"].step == few["natural, plain"].step
    assert many["natural, plain"].passes == few["natural, plain"].passes == 0
    assert many["natural, refresh"].passes - few["natural, refresh"].passes <= 2 * observed * 4


def test_a_foreach_operation_that_torch_takes_apart_counts_once_for_each_pair() -> None:
    two, other = [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(1)]
    double = [x.double() for x in two]
    assert launches.launches_of(lambda: torch._foreach_mul_(two, two)) == 1
    assert launches.launches_of(lambda: torch._foreach_mul_(two, [2.0, 3.0])) == 1
    assert launches.launches_of(lambda: torch._foreach_mul_(two, other)) == 2
    assert launches.launches_of(lambda: torch._foreach_mul_(two, double)) == 2


def test_views_and_allocations_are_no_launches_and_copies_are() -> None:
    x = torch.ones(4, 6)
    free = lambda: (x.view(24), x.mT, x[1:], x.split(2), x.detach(), torch.empty(3), torch.empty_like(x))  # noqa: E731
    assert launches.launches_of(free) == 0
    for launch in (lambda: x.clone(), lambda: x.mT.reshape(24), lambda: x.add_(1.0), lambda: torch.zeros(3)):
        assert launches.launches_of(launch) == 1


def test_a_count_leaves_the_devices_as_they_are() -> None:
    launches.count(vit(1), [])
    assert {"cpu"} == memory.HOST
