"""The law of the step's path: nothing waits for the device, and steps where nothing is due launch nothing for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from lightning_thor import Curvature, Thor, configure_thor
from tests.helpers.preconditioners import Identity
from tests.helpers.watch import Watch


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(9, 8, padding_idx=0),
        nn.Linear(8, 12),
        nn.LayerNorm(12),
        nn.Unflatten(1, (3, 2, 2)),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"match_rms": None, "kl_clip": 1e-3},
        {"nesterov": True, "weight_decay": 0.1},
        {"match_rms": None, "clip_norm": 1.0},
        {"mode": "polar", "nesterov": True},
        {"mode": "adam", "weight_decay": 0.1},  # on a GPU its eigenvectors wait, at a refresh
    ],
)
@pytest.mark.parametrize("damping_rule", ["trace", "pi", "sqrt"])
@pytest.mark.parametrize("max_rows", [1024, 2])  # all rows of these batches, or some
def test_no_step_waits_for_the_device(options: dict[str, Any], damping_rule: Any, max_rows: int, dtype: Any) -> None:
    model = net().to(dtype)
    curvature = Curvature(
        model,
        mode=options.get("mode", "natural"),
        update_every_n_steps=2,
        damping_rule=damping_rule,
        max_rows=max_rows,
        loss_multiplier=lambda: torch.tensor(2.0),
    )
    optimizer = configure_thor(model, preconditioner=curvature, **options)
    tokens = torch.randint(9, (6,))
    for step in range(4):
        with Watch() as watch:
            model(tokens).square().mean().backward()
            optimizer.step()
        assert not watch.waiting, f"step {step} waits by {watch.waiting}"
        optimizer.zero_grad()


def test_a_check_that_would_wait_is_seen() -> None:
    for wait in (lambda: torch.ones(()).item(), lambda: torch.ones(2).tolist(), lambda: float(torch.ones(1))):
        with Watch() as watch:
            wait()
        assert watch.waiting == {"_local_scalar_dense"}


def test_forward_and_backward_of_a_step_that_is_not_due_are_those_without_hooks() -> None:
    def passes(model: nn.Module) -> Counter[str]:
        model.zero_grad()
        with Watch() as watch:
            model(torch.zeros(6, dtype=torch.int64)).square().mean().backward()
        return watch.called

    model = net()
    plain = passes(model)
    curvature = Curvature(model, update_every_n_steps=10)
    due = passes(model)
    curvature.update()
    assert passes(model) == plain
    assert due != plain


@pytest.mark.parametrize("layers", [1, 8])
def test_a_refresh_takes_as_many_inversions_as_there_are_block_sizes(layers: int) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))
    curvature = Curvature(model, block_size=32)
    model(torch.randn(3, 64)).sum().backward()
    with Watch() as watch:
        curvature.update()
    assert watch.called["linalg_cholesky_ex"] == 1
    assert watch.called["linalg_solve_triangular"] == 1


def test_thor_needs_no_curvature_of_ours() -> None:
    model = net()
    optimizer = Thor(model.parameters(), preconditioner=Identity())
    before = model[1].weight.detach().clone()
    model(torch.ones(6, dtype=torch.int64)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
