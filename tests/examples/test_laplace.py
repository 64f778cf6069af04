"""The Laplace example: what is drawn has the posterior's covariance, and predictions become better and humbler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import laplace
from lightning_thor import exact_factors
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


def covariances(factors: dict[str, Any], n: int, tau: float) -> dict[str, Tensor]:
    """Of each layer's posterior, weight then bias, by the images of all unit vectors."""
    found = {}
    for name, layer in factors.items():
        out, wide = layer["G"].shape[-1], layer["A"].shape[-1]
        units = torch.eye(out * wide, dtype=torch.float64).reshape(out * wide, out, wide)
        drawn = laplace.draw(layer, n, tau, units)
        root = torch.cat([drawn[..., :-1].flatten(1), drawn[..., -1]], dim=1)
        found[name] = root.T @ root
    return found


def covariances_by_curvlinops(
    model: nn.Module, x: Tensor, y: Tensor, fisher_type: str, tau: float
) -> dict[str, Tensor]:
    """(N K + τ I)⁻¹ with its K-FAC matrix K of each layer, weight and bias together."""
    curvlinops = pytest.importorskip(
        "curvlinops", reason="the reference K-FAC is not installed (make test installs it)"
    )
    found = {}
    for name, layer in model.named_children():
        if parameters := list(layer.parameters()):
            operator = curvlinops.KFACLinearOperator(
                model, nn.CrossEntropyLoss(), parameters, [(x, y)], fisher_type=fisher_type,
                check_deterministic=False, separate_weight_and_bias=False,
            )  # fmt: skip
            units = torch.eye(operator.shape[1], dtype=torch.float64)
            found[name] = (len(x) * (operator @ units) + tau * units).inverse()
    return found


def test_the_posterior_is_that_of_an_independent_k_fac() -> None:
    """With the data's targets to rounding, with drawn ones to the error of 6,400 of them."""
    model, x, y = network(), torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    given = exact_factors(
        model, [(x, y)], lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), precondition_bias=True
    )
    expected = covariances_by_curvlinops(model, x, y, "empirical", tau=0.3)
    torch.testing.assert_close(covariances(given, n=16, tau=0.3), expected, rtol=1e-8, atol=1e-12)
    drawn = covariances(laplace.factors_of(model, [(x, y)] * 400), n=16, tau=0.3)
    expected = covariances_by_curvlinops(model, x, y, "type-2", tau=0.3)
    assert list(drawn) == list(expected) == ["0", "2"]
    for name, theirs in expected.items():
        assert (drawn[name] - theirs).norm() < 0.05 * theirs.norm()


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
