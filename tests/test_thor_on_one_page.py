"""The algorithm on one page, and the package held to it: the same weights after every step, to rounding."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import thor_on_one_page
from examples.thor_on_one_page import ThorOnOnePage
from lightning_thor import Curvature, Thor

PAGE = Path(thor_on_one_page.__file__).read_text(encoding="utf-8")

# No value is a default. Steps of the first two weights are limited, that of the third is not.
# Blocks of at most 4 cut 13 into 4, 4, 4, 1; 12 into 4, 4, 4; 6 into 3, 3; and 5 into 3, 2.
OF_THOR: dict[str, Any] = {
    "lr": 0.02,
    "momentum": 0.8,
    "match_rms": 0.3,
    "max_relative_step": 0.03,
    "rms_averaging": 0.6,
}
OF_CURVATURE: dict[str, Any] = {"damping": 0.1, "averaging": 0.7, "block_size": 4, "update_every_n_steps": 3}
OPTIONS = OF_THOR | OF_CURVATURE

# Twelve steps, four of them with a refresh. Sizes differ, since G is an average over refreshes: with one size, weights
# would not tell whether g is multiplied by it. The fifth batch counts for much more than others.
BATCH_SIZES = [16, 7, 12, 9, 20, 5, 11, 8, 14, 23, 6, 10]
LARGE = 20

Weights = list[list[Tensor]]
"""After each step, of each parameter."""


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(13, 12), nn.Tanh(), nn.Linear(12, 6, bias=False), nn.ReLU(), nn.Linear(6, 5))
    return nn.Sequential(*layers).double()


def weights_after_each_step(model: nn.Module, optimizer: Thor | ThorOnOnePage) -> Weights:
    torch.manual_seed(1)
    weights = []
    for batch_size in BATCH_SIZES:
        x, y = torch.randn(batch_size, 13, dtype=torch.float64), torch.randint(5, (batch_size,))
        model.zero_grad()
        (F.cross_entropy(model(x), y) * (100 if batch_size == LARGE else 1)).backward()
        optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    return weights


def trained_by_the_page(**changed: Any) -> tuple[Weights, ThorOnOnePage]:
    model = network()
    optimizer = ThorOnOnePage(model, **(OPTIONS | changed))
    return weights_after_each_step(model, optimizer), optimizer


def trained_by_the_package() -> tuple[Weights, Curvature]:
    model = network()
    curvature = Curvature(model, max_rows=None, **OF_CURVATURE)
    return weights_after_each_step(model, Thor(model.parameters(), preconditioner=curvature, **OF_THOR)), curvature


def test_the_package_takes_the_steps_of_the_page() -> None:
    package, _ = trained_by_the_package()
    page, _ = trained_by_the_page()
    torch.testing.assert_close(package, page, rtol=1e-11, atol=1e-13)


def test_natural_gradients_have_the_scale_of_the_page_too() -> None:
    """Weights do not tell the scale of A and G: damping is relative to it, and directions are scaled afterwards."""
    _, curvature = trained_by_the_package()
    _, page = trained_by_the_page()
    weights = [layer.weight for layer in curvature.model.modules() if isinstance(layer, nn.Linear)]
    grads = {weight: torch.randn_like(weight) for weight in weights}
    expected = [
        page.inverse[layer, "G"] @ grad @ page.inverse[layer, "A"]
        for layer, grad in zip(page.layers, grads.values(), strict=True)
    ]
    torch.testing.assert_close(list(curvature.precondition(grads).values()), expected, rtol=1e-11, atol=1e-13)


CHANGES = {name: value + 1 if isinstance(value, int) else 1.01 * value for name, value in OPTIONS.items()}


@pytest.mark.parametrize("option", CHANGES)
def test_one_percent_more_of_any_option_or_one_more_is_seen(option: str) -> None:
    package, _ = trained_by_the_package()
    changed, _ = trained_by_the_page(**{option: CHANGES[option]})
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(package, changed, rtol=1e-5, atol=1e-5)


def test_the_page_is_shorter_than_100_lines_and_of_plain_torch() -> None:
    assert len(PAGE.splitlines()) < 100
    imported = set()
    for node in ast.walk(ast.parse(PAGE)):
        if isinstance(node, ast.Import):
            imported.update(name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").split(".")[0])
    assert imported == {"dataclasses", "math", "torch", "sklearn"}


def trained_on_digits(
    monkeypatch: pytest.MonkeyPatch, optimizer_of: Callable[[nn.Module], Any], **arguments: int
) -> tuple[float, list[Tensor]]:
    """Run the page's ``main`` with an optimizer: held-out accuracy, and the weights at the end."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    models = []

    def remembered(model: nn.Module) -> Any:
        models.append(model)
        return optimizer_of(model)

    monkeypatch.setattr(thor_on_one_page, "ThorOnOnePage", remembered)
    accuracy = thor_on_one_page.main(**arguments)
    (model,) = models
    return accuracy, [p.detach() for p in model.parameters()]


def test_the_page_learns_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy, _ = trained_on_digits(monkeypatch, ThorOnOnePage, n_steps=100)
    assert accuracy > 0.95


def test_the_package_with_its_defaults_learns_the_digits_as_the_page_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their defaults are the same, then, and what the page leaves out does nothing there."""

    def package(model: nn.Module) -> Thor:
        return Thor(model.parameters(), preconditioner=Curvature(model))

    page = trained_on_digits(monkeypatch, ThorOnOnePage)
    torch.testing.assert_close(trained_on_digits(monkeypatch, package), page, rtol=1e-9, atol=1e-9)
