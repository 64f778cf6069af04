"""Laws of `nn.SyncBatchNorm`, which Lightning's ``sync_batchnorm=True`` makes of every batch norm: it is one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, configure_thor
from tests.helpers.boring import assert_bitwise, without_words

NETS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "1d": ([nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)], (8, 5)),
    "1d, sequences": ([nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)], (8, 2, 6)),
    "2d": ([nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)], (8, 2, 4, 4)),
    "3d": ([nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(32, 3)], (8, 2, 4, 4, 4)),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, the same one with a norm over all processes, and a batch."""
    layers, shape = NETS[name]
    torch.manual_seed(2)
    plain = nn.Sequential(*copy.deepcopy(layers)).double()
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(synchronized[1], nn.SyncBatchNorm)
    return plain, synchronized, torch.randn(shape, dtype=torch.float64)


def train(model: nn.Module, optimizer: Thor, x: Tensor, n_steps: int = 3) -> None:
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(x).sin().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"statistics": "reduce"}, {"max_rows": 3}, {"loss_reduction": "sum"}])
@pytest.mark.parametrize("name", NETS)
def test_a_norm_over_all_processes_has_the_curvature_of_one_on_one_device(name: str, options: dict[str, Any]) -> None:
    """In one process. Names, factors, inverses, and the weights after some steps."""
    plain, synchronized, x = pair(name)
    curvatures = []
    for model in (plain, synchronized):
        curvatures.append(Curvature(model, update_every_n_steps=2, **options))
        train(model, configure_thor(model, preconditioner=curvatures[-1]), x)
    assert list(curvatures[1].layers) == list(curvatures[0].layers)
    assert "1" in curvatures[1].layers
    first, second = (without_words(curvature.state_dict()) for curvature in curvatures)
    assert_bitwise(second, first)
    assert_bitwise(synchronized.state_dict(), plain.state_dict())


@pytest.mark.parametrize("back", [False, True])
def test_a_checkpoint_of_one_goes_on_in_the_other(back: bool) -> None:
    saved, resumed, x = pair("2d")
    if back:
        saved, resumed = resumed, saved
    optimizer = configure_thor(saved, preconditioner=Curvature(saved, update_every_n_steps=2))
    train(saved, optimizer, x)
    other = configure_thor(resumed, preconditioner=Curvature(resumed, update_every_n_steps=2))
    resumed.load_state_dict(saved.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.preconditioner.load_state_dict(copy.deepcopy(optimizer.preconditioner.state_dict()))
    for model, one in ((saved, optimizer), (resumed, other)):
        train(model, one, x)
    assert_bitwise(resumed.state_dict(), saved.state_dict())
