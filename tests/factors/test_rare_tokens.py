"""Laws of the damping of tokens: none counts as rarer than one in a batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature

VOCABULARY = 50
RARE = torch.tensor([0, 1, 1, 2, 2, 2, 2, 9])
COMMON = torch.arange(400) % VOCABULARY


def table() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(VOCABULARY, 4).double()


def observed(tokens: Tensor, pieces: int = 1, **options: Any) -> Curvature:
    """After a refresh with ``tokens``, in so many micro-batches."""
    model = table()
    curvature = Curvature(model, loss_multiplier=lambda: 1.0 / pieces, **options)
    for piece in tokens.chunk(pieces):
        (model(piece).sin().mean() / pieces).backward()
    curvature.update()
    return curvature


def inverse(curvature: Curvature) -> Tensor:
    A, _ = curvature.inverses_of("")
    assert A is not None
    return A.flatten()


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("damping", [0.2, 0.01])
@pytest.mark.parametrize("tokens", [RARE, COMMON], ids=["rare", "common"])
def test_damping_is_relative_to_the_mean_of_at_most_a_token_for_five_rows(
    tokens: Tensor, damping: float, pieces: int
) -> None:
    frequencies = torch.bincount(tokens, minlength=VOCABULARY).double() / len(tokens)
    expected = 1 / (frequencies + damping / min(VOCABULARY, len(tokens) / 5))
    torch.testing.assert_close(inverse(observed(tokens, pieces, damping=damping)), expected)


def test_at_the_default_each_token_counts_as_if_it_had_come_once_more() -> None:
    counts = torch.bincount(RARE, minlength=VOCABULARY).double() + 1
    torch.testing.assert_close(inverse(observed(RARE)), len(RARE) / counts)


@pytest.mark.parametrize("rule", ["pi", "sqrt"])
def test_absolute_dampings_are_what_they_say(rule: Any) -> None:
    curvature = observed(RARE, damping_rule=rule, damping=0.04)
    A, G = (curvature.factors.blocks(0, side, "average") for side in ("A", "G"))
    ratio = (A.mean() / G.diagonal(dim1=-2, dim2=-1).mean()).sqrt() if rule == "pi" else 1.0
    torch.testing.assert_close(inverse(curvature), 1 / (A.flatten() + 0.2 * ratio))


def test_a_table_that_is_silent_keeps_what_it_knows_also_in_a_checkpoint() -> None:
    curvature = observed(RARE, update_every_n_steps=1)
    state = copy.deepcopy(curvature.state_dict())
    resumed = Curvature(table(), update_every_n_steps=1)
    resumed.load_state_dict(state)
    for one in (curvature, resumed):
        one.observe("", RARE[:0], torch.zeros(0, 4, dtype=torch.float64))
        one.update()
    assert torch.equal(inverse(resumed), inverse(curvature))
    torch.testing.assert_close(inverse(resumed), inverse(observed(RARE)))


def test_a_state_of_before_goes_on_without_until_its_next_window() -> None:
    state = copy.deepcopy(observed(RARE, update_every_n_steps=1).state_dict())
    del state["layers"][""]["rarest"]
    model = table()
    resumed = Curvature(model, update_every_n_steps=1, averaging=0.0)
    resumed.load_state_dict(state)
    assert resumed.factors.rarest.item() == 0.0
    model(RARE).sin().mean().backward()
    resumed.update()
    torch.testing.assert_close(inverse(resumed), inverse(observed(RARE)))
