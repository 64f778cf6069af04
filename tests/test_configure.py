"""configure_thor: groups, and errors."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_thor import configure_thor


def test_biases_and_norms_do_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Embedding(3, 2), nn.Linear(2, 2))
    decayed, plain = configure_thor(model, lr=0.02, weight_decay=0.1, momentum=0.8).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[i].weight) for i in (0, 2, 3)}
    assert len(plain["params"]) == 4
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {decayed["lr"], plain["lr"]} == {0.02}
    assert {decayed["momentum"], plain["momentum"]} == {0.8}


def test_a_norm_over_two_dimensions_does_not_decay_either() -> None:
    model = nn.Sequential(nn.LayerNorm((4, 4)), nn.Linear(4, 4, bias=False))
    decayed, plain = configure_thor(model, weight_decay=0.1).param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 4)]
    assert decayed["params"][0] is model[1].weight
    assert len(plain["params"]) == 2


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[0].requires_grad_(False)
    (group,) = configure_thor(model).param_groups
    assert group["params"] == [model[1].weight]


def test_nothing_to_train_is_told() -> None:
    with pytest.raises(ValueError, match="Linear has no parameter with requires_grad=True"):
        configure_thor(nn.Linear(2, 2).requires_grad_(False))


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="damping"):
        configure_thor(nn.Linear(2, 2), damping=0.1)
    with pytest.raises(ValueError, match="lr must be 0 or greater, got -1"):
        configure_thor(nn.Linear(2, 2), lr=-1)
