"""Laws of language models on several ranks: tied tables, attention, transformers' T5; two ranks are one rank."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.boring import assert_bitwise
from tests.helpers.distributed_workers import ROWS, state, two_ranks
from tests.helpers.text_trainings import T5, Text, train, with_gradients_times

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (the dev extra has it)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "net", "summed"),
    [
        ("text", Text, False),
        ("unequal_text", Text, True),
        pytest.param("unequal_t5", T5, True, marks=needs_transformers),
    ],
)
def test_two_ranks_of_a_language_model_are_one(
    training: str, net: type[nn.Module], summed: bool, tmp_path: Path
) -> None:
    """Equal weights, momentum, factors and inverses; also where one rank has 10 texts and the other one 22."""
    alone = train(tmp_path, net(), (ROWS,), summed=summed)
    first, second = two_ranks(training)
    assert_bitwise(state(first), state(second))
    found = with_gradients_times(state(first), 2 if summed else 1)
    torch.testing.assert_close(found, state(alone), rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_a_table_and_the_output_layer_that_is_the_same_start_in_backward() -> None:
    for result in two_ranks("text"):
        first = result["counts"][0]
        started = [call["in_backward"] for call in result["all_reduces"]]
        assert 1 < first < len(started)
        assert started == [False] * first + [True] * (len(started) - first)
