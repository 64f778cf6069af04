"""Laws of inputs and gradients that are on another device than the weights, as with FSDP2's ``CPUOffloadPolicy``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature
from lightning_thor.curvature import accumulator
from tests.helpers.elsewhere import AnotherDevice, Elsewhere

MODEL = nn.Sequential(
    nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Unflatten(1, (6, 1)),
    nn.Conv1d(6, 6, 3, padding=1, groups=2), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(6, 3),
)  # fmt: skip


def pairs() -> list[tuple[str, Tensor, Tensor]]:
    """Input and output gradient of each layer, in the order of a backward pass; the first gradient is tiny."""
    torch.manual_seed(0)
    inputs, found = torch.randint(11, (20,)), []
    x: Tensor = inputs
    for name, module in MODEL.named_children():
        a, x = x.detach(), module(x)
        if any(True for _ in module.parameters()):
            x.retain_grad()
            found.append((name, a, x))
    (1e-8 * x.square()).mean().backward()
    return [(name, a, output.grad) for name, a, output in reversed(found) if output.grad is not None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_rows": 7},
        {"statistics": "masked"},
        {"statistics": "reduce"},
        {"loss_multiplier": lambda: Elsewhere(torch.tensor(4.0))},
        {"mode": "adam", "stagger": True},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_factors_of_weights_that_are_kept_on_the_host_are_those_of_weights_on_the_gpu(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home = {**options, "loss_multiplier": lambda: torch.tensor(4.0)} if "loss_multiplier" in options else options
    given = pairs()
    expected = Curvature(MODEL, block_size=4, **at_home)
    monkeypatch.setattr(accumulator, "is_sharded", lambda x: isinstance(x, nn.Parameter))
    found = Curvature(MODEL, block_size=4, **options)
    for name, a, g in given:
        expected.observe(name, a, g)
        with AnotherDevice():
            found.observe(name, Elsewhere(a), Elsewhere(g))
    for curvature in (found, expected):
        curvature.update()
        curvature.close()
    assert expected.gradient_unit != 1.0
    assert found.gradient_unit == expected.gradient_unit
    for one, other in zip(found.factors.batches.values(), expected.factors.batches.values(), strict=True):
        assert type(one.average) is Tensor
        largest = float(other.average.abs().max())
        assert largest > 0
        torch.testing.assert_close(one.average, other.average, rtol=1e-6, atol=1e-6 * largest)


def test_a_model_that_was_moved_after_curvature_was_built_is_refused() -> None:
    curvature = Curvature(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match=r"used on meta, but Curvature found its weight on cpu. Build it when"):
        curvature.observe("", Elsewhere(torch.randn(4, 3)), Elsewhere(torch.randn(4, 2)))
