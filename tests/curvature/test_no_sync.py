"""The law of the step's path: nothing waits for the device, and steps where nothing is due launch nothing for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, configure_thor
from lightning_thor.distributed.communicator import WorkerGrid
from lightning_thor.distributed.factor_reducer import by_size
from lightning_thor.mindspore.optimizer import thor
from tests.helpers.fakes import FakeCommunicator
from tests.helpers.models import Words
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


OPTIONS: dict[str, dict[str, Any]] = {
    "natural": {},
    "kl_clip": {"match_rms": None, "kl_clip": 1e-3},
    "weight decay": {"nesterov": True, "weight_decay": 0.1},
    "clip_norm": {"match_rms": None, "clip_norm": 1.0},
    "polar": {"mode": "polar", "nesterov": True},
    "adam": {"mode": "adam", "weight_decay": 0.1},  # on a GPU its eigenvectors wait, at a refresh
}
Step = Callable[[], None]


def stepping(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def alone(options: str, damping_rule: Any, max_rows: int, dtype: torch.dtype) -> Step:
    model, own = net().to(dtype), OPTIONS[options]
    curvature = Curvature(
        model,
        mode=own.get("mode", "natural"),
        update_every_n_steps=2,
        damping_rule=damping_rule,
        max_rows=max_rows,
        loss_multiplier=lambda: torch.tensor(2.0),
    )
    return stepping(model, torch.randint(9, (6,)), configure_thor(model, preconditioner=curvature, **own))


def with_others(mode: Any, n_gradient_workers: int) -> Step:
    """Sums that start in backward; each process stores all inverses, or some."""
    model = Words()
    curvature = Curvature(model, mode=mode, update_every_n_steps=2, block_size=3)
    grid = WorkerGrid(FakeCommunicator(2), FakeCommunicator(n_gradient_workers))
    curvature.connect(FakeCommunicator(), bucket_fn=by_size(1), is_sync_step=lambda: True, worker_grid=grid)
    return stepping(model, torch.arange(6), configure_thor(model, mode=mode, preconditioner=curvature))


def tied() -> Step:
    model = Words()
    curvature = Curvature(model, update_every_n_steps=1)
    return stepping(model, torch.arange(6), configure_thor(model, preconditioner=curvature))


def of_nn_thor(variant: str) -> Step:
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.LayerNorm(8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 1), nn.Flatten()
    )
    model.append(nn.Linear(16, 2))
    own, schedule = list(model.parameters()), torch.full((4,), 0.1)
    groups = [{"params": own[:3]}, {"params": own[3:5], "grad_centralization": True}, {"params": own[5:], "lr": 0.2}]
    optimizer = thor(model, schedule, schedule, 0.9, enable_clip_grad=True, frequency=2, variant=variant, params=groups)
    return stepping(model, torch.randint(9, (6,)), optimizer)


@pytest.mark.parametrize(
    "make",
    [
        *(
            partial(alone, *case)
            # All rows of these batches, or some.
            for case in product(OPTIONS, ("trace", "pi", "sqrt"), (1024, 2), (torch.float32, torch.float64))
        ),
        *(partial(with_others, *case) for case in (("natural", 1), ("natural", 2), ("polar", 2))),
        tied,
        *(partial(of_nn_thor, variant) for variant in ("gpu", "ascend")),
    ],
    ids=lambda make: " ".join(map(str, (make.func.__name__, *make.args))) if isinstance(make, partial) else None,
)
def test_no_step_waits_for_the_device(make: Callable[[], Step]) -> None:
    step = make()
    for number in range(4):
        with Watch() as watch:
            step()
        assert not watch.waiting, f"step {number} waits by {watch.waiting}"


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
