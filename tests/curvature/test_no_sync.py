"""The law of the step's path: nothing waits for the device, and steps where nothing is due launch nothing for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_thor import Curvature, Thor, configure_thor
from lightning_thor.linalg import memory
from lightning_thor.linalg.memory import HostCopy

# What copies a number to the host, or makes a tensor whose shape depends on data.
# cholesky_inverse looks at LAPACK's info, inside the operator.
WAITING = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "bincount", "cholesky_inverse",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Counts operators, and remembers those that would wait for a device.

    On a CPU there is nothing to wait for, so a step may read its numbers: here it takes the way of other devices. A
    copy that an earlier step sent to the host is there when it is read.
    """

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self.called: Counter[str] = Counter()
        self._lists = _Lists(self.called)

    def __enter__(self) -> Watch:
        self._patch.setattr(memory, "HOST", set())
        self._patch.setattr(HostCopy, "read", _read_of_the_host)
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._lists.__exit__(*exception)
        self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waiting(self) -> set[str]:
        return WAITING & self.called.keys()


class _Lists(TorchFunctionMode):
    """Counts ``tolist``, which on a CPU calls no operator."""

    def __init__(self, called: Counter[str]) -> None:
        super().__init__()
        self._called = called

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy):
            self._called["_local_scalar_dense"] += 1
        return func(*args, **(kwargs or {}))


_read = HostCopy.read


def _read_of_the_host(copy: HostCopy) -> list[Any]:
    with torch._C.DisableTorchFunction():
        return _read(copy)


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


class Plain:
    """No curvature at all."""

    def update(self) -> None:
        pass

    def precondition(self, grads: Any) -> dict[nn.Parameter, Tensor]:
        return {p: grad.clone() for p, grad in grads.items()}


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
    optimizer = Thor(model.parameters(), preconditioner=Plain())
    before = model[1].weight.detach().clone()
    model(torch.ones(6, dtype=torch.int64)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
