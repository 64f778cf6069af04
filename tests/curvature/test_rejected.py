"""Laws of layers whose first statistics are not finite: they are observed again at once, not an interval later."""

from __future__ import annotations

import copy
import math
from collections.abc import Container
from typing import Any

import pytest
import torch
from torch import nn

from lightning_thor import Curvature, Thor
from tests.helpers.boring import assert_bitwise, without_words

Parts = tuple[nn.Sequential, Thor, Curvature]


def parts(**options: Any) -> Parts:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    curvature = Curvature(model, **{"update_every_n_steps": 20, "block_size": 3, **options})
    return model, Thor(model.parameters(), lr=0.01, mode=curvature.mode, preconditioner=curvature), curvature


def train(some: Parts, steps: range, rejected: Container[int], layers: tuple[int, ...] = (0,)) -> list[list[str]]:
    """Train; statistics of ``layers`` are not finite in the steps ``rejected``. Returns the due layers at each step."""
    model, optimizer, curvature = some
    seen = []
    for step in steps:
        seen.append([name for number, name in enumerate(curvature.layers) if curvature._schedule.is_due(number)])
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        for layer in layers if step in rejected else ():
            for sums in curvature.factors.sums[layer].values():
                sums.fill_(math.inf)
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("options", [{}, {"trace_rule": (0.01, 0.0)}, {"mode": "polar"}, {"mode": "adam"}])
def test_a_layer_is_observed_again_until_it_has_a_window(options: dict[str, Any]) -> None:
    some = parts(**options)
    seen = train(some, range(9), {0, 2})
    everything = ["0", "1", "2"]
    assert seen == [everything, [], ["0"], [], ["0"], [], [], [], []]
    factors = some[2].factors
    assert (factors.updates.tolist(), int(factors.rejected_windows)) == ([1, 1, 1], 2)
    assert all(bool(factors.inverted(number, "G").all()) for number in range(3))


def test_a_layer_that_has_a_window_waits_for_its_turn() -> None:
    seen = train(parts(update_every_n_steps=4), range(10), {4})
    assert [step for step, due in enumerate(seen) if due] == [0, 4, 8]


def test_a_layer_that_is_not_used_is_not_asked_for_at_every_step() -> None:
    model, optimizer, curvature = parts()
    both = nn.ModuleList([model, nn.Linear(2, 2)])
    curvature = Curvature(both, update_every_n_steps=20)
    optimizer = Thor(both.parameters(), preconditioner=curvature)
    with pytest.warns(UserWarning, match="'1'|1: "):
        seen = train((model, optimizer, curvature), range(5), ())
    assert [len(due) for due in seen] == [4, 0, 0, 0, 0]


def test_where_every_step_refreshes_nothing_changes() -> None:
    seen = train(parts(update_every_n_steps=1), range(4), {0})
    assert seen == [["0", "1", "2"]] * 4


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"trace_rule": (0.01, 0.0)}])
@pytest.mark.parametrize("saved_after", range(1, 7))
def test_a_resumed_training_is_bitwise_the_unbroken_one(options: dict[str, Any], saved_after: int) -> None:
    def states(some: Parts) -> Any:
        return copy.deepcopy([some[0].state_dict(), without_words(some[2].state_dict())])

    unbroken, broken = parts(**options), parts(**options)
    train(unbroken, range(saved_after), {0, 2}, (0, 2))
    train(broken, range(saved_after), {0, 2}, (0, 2))
    resumed = parts(**options)
    for new, old in zip(resumed, broken, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    steps = range(saved_after, 9)
    assert train(resumed, steps, {0, 2}, (0, 2)) == train(unbroken, steps, {0, 2}, (0, 2))
    assert_bitwise(states(resumed), states(unbroken))
