"""The Laplace example: what is drawn has the posterior's covariance, and predictions become better and humbler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples import laplace
from tests.helpers.boring import assert_bitwise


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def test_what_is_drawn_has_the_covariance_of_the_posterior() -> None:
    """(n G ⊗ A + τ I)⁻¹, by the images of all unit vectors."""
    model = network()
    (factors,) = laplace.factors_of(model, [(torch.randn(20, 5, dtype=torch.float64),)], last=1).values()
    units = torch.eye(15, dtype=torch.float64).reshape(15, 3, 5)
    root = laplace.draw(factors, n=20, tau=0.3, noise=units).reshape(15, 15)
    precision = 20 * torch.kron(factors["G"][0, 0], factors["A"][0, 0]) + 0.3 * torch.eye(15, dtype=torch.float64)
    torch.testing.assert_close(root.T @ root, precision.inverse())


def test_without_doubt_the_prediction_is_the_networks_and_its_weights_stay() -> None:
    model, x = network(), torch.randn(6, 5, dtype=torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    factors = laplace.factors_of(model, [(x,)])
    assert list(factors) == ["0", "2"]
    torch.testing.assert_close(laplace.predict(model, factors, x, n=6, tau=1e20), model(x).softmax(1).detach())
    assert not torch.allclose(laplace.predict(model, factors, x, n=6, tau=1.0), model(x).softmax(1).detach())
    assert_bitwise(list(model.parameters()), before)


@pytest.mark.slow
def test_the_example_lowers_the_loss_on_held_out_images_and_the_confidence_in_noise() -> None:
    figures = laplace.main(["--epochs=20"])
    assert figures["laplace loss"] < figures["point loss"]
    assert figures["laplace confidence in noise"] < figures["point confidence in noise"]
    assert figures["laplace accuracy"] > 0.93
