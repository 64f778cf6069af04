"""A mode that the package does not have, added from outside: what a user's own direction takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor
from lightning_thor.linalg.decompositions import INVERSE
from lightning_thor.preconditioning.directions import complete_groups, copies_of_others
from lightning_thor.preconditioning.grouping import Directions, GroupedLayers, SingleLayer, Tensors
from lightning_thor.preconditioning.modes import MODES, Mode, common_mode, register_mode


def input_directions(stored: GroupedLayers, tensors: Tensors) -> Iterator[Directions]:
    """``grad A⁻¹``: the inputs alone are whitened (as FOOF does)."""
    groups = complete_groups(stored.groups, tensors)
    directions = copies_of_others(groups, tensors)
    for group in groups:
        for layer, (A, G) in zip(group.layers, group.pairs, strict=True):
            alone = SingleLayer([layer], [(A, torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G))])
            alone.put(directions, alone.product(alone.to_matrices(tensors)), tensors)
    yield directions


@pytest.fixture(autouse=True)
def _input_mode() -> Iterator[None]:
    register_mode(Mode("input", INVERSE, input_directions))
    yield
    del MODES["input"]


def make() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)).double(), torch.randn(20, 6).double()


def test_its_first_step_is_along_the_closed_form() -> None:
    model, x = make()
    before = model[0].weight.detach().clone()
    curvature = Curvature(model, mode="input", damping=0.3, max_rows=None)
    thor = Thor(model.parameters(), mode="input", lr=0.5, match_rms=None, momentum=0.0, preconditioner=curvature)
    model(x).square().mean().backward()
    thor.step()
    A = x.T @ x / len(x)
    damped = A + 0.3 * A.trace() / 6 * torch.eye(6).double()
    expected = before - 0.5 * model[0].weight.grad @ torch.linalg.inv(damped)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_it_trains_and_its_checkpoint_goes_on() -> None:
    model, x = make()
    curvature = Curvature(model, mode="input", update_every_n_steps=3)
    thor = Thor(model.parameters(), mode="input", lr=0.02, preconditioner=curvature)
    losses = []
    for _ in range(40):
        thor.zero_grad()
        losses.append((model(x) - x[:, :3]).square().mean())
        losses[-1].backward()
        thor.step()
    assert losses[-1] < 0.5 * losses[0]
    resumed = Curvature(model, mode="input")
    resumed.load_state_dict(curvature.state_dict())
    grads = {p: p.grad for p in model.parameters()}
    torch.testing.assert_close(resumed.precondition(grads, "input"), curvature.precondition(grads, "input"))


def test_it_shares_a_curvature_with_no_other_mode() -> None:
    model, _ = make()
    assert common_mode(["input", "input"]).name == "input"
    with pytest.raises(ValueError, match="modes input, natural cannot share a curvature"):
        Thor([{"params": model[0].parameters(), "mode": "input"}, {"params": model[2].parameters()}])
    with pytest.raises(RuntimeError, match=r'got a curvature of mode="natural".*mode="input"'):
        Curvature(model).precondition({}, "input")


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (Mode("polar", INVERSE, input_directions), "'polar' is registered already"),
        (Mode("other", INVERSE), "must have either directions or change_basis"),
    ],
)
def test_modes_that_cannot_be_are_refused(mode: Mode, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_mode(mode)
