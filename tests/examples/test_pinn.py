"""The physics-informed example: its equations on their known solutions, what THOR observes of it, and the command."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples.pinn import EQUATIONS, OPTIMIZERS, PINN
from lightning_thor import Curvature, Thor
from lightning_thor.layers.hooks import Hooks
from tests.helpers.commands import python_module

LINEAR = [f"network.{n}" for n in (0, 2, 4, 6, 8)]


def points_in(name: str) -> Tensor:
    """Points inside of an equation's rectangle, off its borders."""
    low = torch.tensor(EQUATIONS[name].low, dtype=torch.float64)
    shares = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (low + (1 - low) * (0.02 + 0.96 * shares)).requires_grad_()


def untrained(name: str, optimizer: str = "thor") -> PINN:
    torch.manual_seed(0)
    return PINN(EQUATIONS[name], optimizer, seconds=1e9, steps=100)


# ── the equations ──


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_known_solution_leaves_nothing_of_its_equation(name: str) -> None:
    equation, x = EQUATIONS[name], points_in(name)
    residual = equation.residual(x, equation.exact(x))
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", EQUATIONS)
def test_another_function_leaves_something(name: str) -> None:
    equation, x = EQUATIONS[name], points_in(name)
    other = equation.exact(x) + 0.1 * (x[:, 0] ** 2 + x[:, 1])
    assert float(equation.residual(x, other).abs().mean().detach()) > 1e-3


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_known_solution_has_the_borders_values(name: str) -> None:
    """It vanishes on the sides of space; those of time begin with a sine of x."""
    equation = EQUATIONS[name]
    along = torch.linspace(0, 1, 50, dtype=torch.float64)
    for axis, value in equation.sides:
        x = torch.empty(50, 2, dtype=torch.float64)
        x[:, axis] = value
        x[:, 1 - axis] = equation.low[1 - axis] + (1 - equation.low[1 - axis]) * along
        expected = torch.zeros(50, dtype=torch.float64)
        if name == "heat" and axis == 1:
            expected = (2 * torch.pi * x[:, 0]).sin()
        if name == "burgers" and axis == 1:
            expected = -(torch.pi * x[:, 0]).sin()
        torch.testing.assert_close(equation.exact(x), expected, rtol=0, atol=1e-12)


# ── what THOR observes ──


@pytest.mark.parametrize("name", EQUATIONS)
def test_each_layer_hands_over_one_pair_a_step_and_none_is_left_out(name: str) -> None:
    module = untrained(name)
    curvature = Curvature(module, update_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            module.zero_grad()
            module.training_step(0, 0).backward()
            curvature.update()
    assert curvature.left_out == {}
    assert curvature.factors.updates.tolist() == [3] * 5


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_pair_is_the_whole_losss_gradient_and_less_than_the_weights(name: str) -> None:
    module = untrained(name)
    layers: dict[str, nn.Module] = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    assert list(layers) == LINEAR
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in layers}
    hooks = Hooks(layers, lambda n: True, lambda n, a, g: pairs[n].append((a.detach(), g)))
    outputs: dict[str, Tensor] = {}
    for n, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, output, n=n: outputs.__setitem__(n, output))
    loss = module.training_step(0, 0)
    expected = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
    loss.backward()
    hooks.remove()
    for n, g in zip(LINEAR, expected, strict=True):
        ((a, seen),) = pairs[n]
        assert a.shape[0] == 640
        torch.testing.assert_close(seen, g)
        weight = layers[n].weight.grad
        assert isinstance(weight, Tensor)
        assert float((weight - seen.mT @ a).norm() / weight.norm()) > 1e-4
    if name != "burgers":  # which holds u itself
        assert not pairs[LINEAR[-1]][0][1][:512].any()


# ── the command ──


@pytest.mark.slow
def test_the_command_solves_poissons_equation_and_draws(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    printed = python_module(
        "examples.pinn", "--equation=poisson", "--optimizers", "thor", "adamw", "--steps=150", "--seconds=600",
        f"--out={out}",
    )  # fmt: skip
    errors = {name: float(error) for name, error in re.findall(r"(\w+): relative error (\S+) after", printed)}
    assert list(errors) == ["thor", "adamw"]
    # A network that was not trained has an error of about 1.
    assert errors["thor"] < 0.3
    assert (out / "pinn.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_changes_every_parameter(optimizer: str) -> None:
    if optimizer == "soap":
        pytest.importorskip("pytorch_optimizer", reason="pip install '.[benchmarks]'")
    module = untrained("poisson", optimizer)
    before = [p.detach().clone() for p in module.parameters()]
    made = OPTIMIZERS[optimizer](module)
    if isinstance(made, Thor):
        made.preconditioner = Curvature(module)
    for _ in range(2):  # SOAP's first step only looks
        made.zero_grad()
        module.training_step(0, 0).backward()
        made.step()
    assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
