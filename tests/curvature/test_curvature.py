"""Laws of the curvature: Fisher matrix, averages, batches in parts, failures, state."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, choose_block_size
from lightning_thor.curvature.refresh_schedule import RefreshSchedule
from lightning_thor.factors.layout import SIDES
from lightning_thor.schedules import Exponential
from tests.helpers.boring import assert_bitwise
from tests.helpers.observing import directions_of


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10), nn.LayerNorm(10)
    ).double()


def batch(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def averages(curvature: Curvature) -> dict[int, Tensor]:
    return {size: stack.average.clone() for size, stack in curvature.factors.batches.items()}


def inverses(curvature: Curvature) -> dict[int, Tensor]:
    return {size: stack.inverse.clone() for size, stack in curvature.factors.batches.items()}


def observe(model: nn.Module, x: Tensor) -> None:
    model(x).sin().mean(1).mean().backward()


@pytest.mark.parametrize("precondition_bias", [False, True])
def test_the_kronecker_product_of_a_linear_model_is_its_fisher(precondition_bias: bool) -> None:
    """Squared error with independent residuals: G does not depend on the input, so A ⊗ G is the Fisher matrix exactly.

    Each input is seen with residuals +e_i and -e_i for all outputs i: the mean over the batch is the expectation.
    """
    d_in, d_out, n = 4, 3, 6
    layer = nn.Linear(d_in, d_out, bias=precondition_bias).double()
    x = torch.randn(n, d_in, dtype=torch.float64).repeat_interleave(2 * d_out, 0)
    residuals = torch.cat([torch.eye(d_out), -torch.eye(d_out)]).double().repeat(n, 1) * d_out**0.5
    curvature = Curvature(layer, block_size=None, averaging=0.0, precondition_bias=precondition_bias)
    y = layer(x)
    (0.5 * (y - (y.detach() + residuals)).square().sum(1)).mean().backward()
    curvature.update()
    A, G = (curvature.factors.blocks(0, side, "average")[0, 0] for side in SIDES)
    homogeneous = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1) if precondition_bias else x
    per_sample = torch.einsum("ni,nj->nij", homogeneous, -residuals).flatten(1)
    torch.testing.assert_close(torch.kron(A, G), per_sample.T @ per_sample / len(x))


@pytest.mark.parametrize("precondition_bias", [False, True])
def test_preconditioning_solves_with_the_damped_factors(precondition_bias: bool) -> None:
    model = net()
    options = {"damping_rule": "pi", "damping": 0.3, "block_size": None, "averaging": 0.0}
    curvature = Curvature(model, precondition_bias=precondition_bias, **options)
    observe(model, batch(8))
    curvature.update()
    layer, module = curvature.layers["4"], model[4]
    index = 2 * list(curvature.layers).index("4")
    A, G = (curvature.factors.blocks(index // 2, side, "average")[0, 0] for side in SIDES)
    pi = (A.trace() / len(A) / (G.trace() / len(G))).sqrt()
    A_damped = A + pi * 0.3**0.5 * torch.eye(len(A), dtype=A.dtype)
    G_damped = G + 0.3**0.5 / pi * torch.eye(len(G), dtype=G.dtype)
    grads: dict[nn.Parameter, Tensor] = {p: p.grad for p in model.parameters() if p.grad is not None}
    grad = module.weight.grad
    if precondition_bias:
        grad = torch.cat([grad, module.bias.grad[:, None]], 1)
    expected = torch.linalg.solve(G_damped, torch.linalg.solve(A_damped, grad.T).T)
    directions = curvature.precondition(grads)
    torch.testing.assert_close(directions[module.weight], expected[:, : module.in_features])
    if precondition_bias:
        torch.testing.assert_close(directions[module.bias], expected[:, -1])
    else:
        assert_bitwise(directions[module.bias], module.bias.grad)
        assert directions[module.bias] is not module.bias.grad
    assert layer.with_bias is precondition_bias


def test_the_sqrt_rule_on_a_convolution_is_nn_thors() -> None:
    """Its A and G are means over all P output positions, damped by sqrt(damping / P), and the update carries 1 / P."""
    model, positions = net(), 16
    curvature = Curvature(model, damping_rule="sqrt", damping=0.02, block_size=None, averaging=0.0)
    observe(model, batch(8))
    curvature.update()
    A, G = (curvature.factors.blocks(0, side, "average")[0, 0] for side in SIDES)
    G_mean, damping = G / positions, (0.02 / positions) ** 0.5
    grad = model[0].weight.grad
    expected = torch.linalg.inv(G_mean + damping * torch.eye(6, dtype=G.dtype)) @ grad.view(6, 18)
    expected = expected @ torch.linalg.inv(A + damping * torch.eye(18, dtype=A.dtype)) / positions
    torch.testing.assert_close(curvature.precondition({model[0].weight: grad})[model[0].weight], expected.view_as(grad))


@pytest.mark.parametrize("damping_rule", ["trace", "pi", "sqrt"])
def test_a_norm_divides_by_its_damped_diagonal(damping_rule: Any) -> None:
    """Its one factor carries all of the damping."""
    model = net()
    curvature = Curvature(model, averaging=0.0, damping=0.5, damping_rule=damping_rule)
    observe(model, batch(8))
    curvature.update()
    diagonal = curvature.factors.blocks(list(curvature.layers).index("5"), "G", "average").flatten()
    grads: dict[nn.Parameter, Tensor] = {p: p.grad for p in model.parameters() if p.grad is not None}
    damping = 0.5 * (diagonal.mean() if damping_rule == "trace" else 1.0)
    expected = torch.cat([grads[model[5].weight], grads[model[5].bias]]) / (diagonal + damping)
    directions = curvature.precondition(grads)
    torch.testing.assert_close(torch.cat([directions[model[5].weight], directions[model[5].bias]]), expected)


def test_an_embedding_divides_by_its_damped_token_frequencies() -> None:
    table = nn.Embedding(7, 4).double()
    model = nn.ModuleDict({"table": table})
    curvature = Curvature(model, averaging=0.0, damping=0.5)
    tokens = torch.tensor([[0, 1, 1], [5, 1, 0]]).repeat(10, 1)  # many more than the vocabulary
    table(tokens).sin().mean().backward()
    curvature.update()
    frequency = tokens.flatten().bincount(minlength=7).double() / 60
    G = curvature.factors.blocks(0, "G", "average")[0, 0]
    G_inverse = torch.linalg.inv(G + 0.5 * G.trace() / 4 * torch.eye(4, dtype=G.dtype))
    expected = (table.weight.grad / (frequency + 0.5 / 7)[:, None]) @ G_inverse
    torch.testing.assert_close(curvature.precondition({table.weight: table.weight.grad})[table.weight], expected)


def test_blocks_are_the_whole_factors_masked() -> None:
    whole, partition = (Curvature(net(), block_size=size, averaging=0.0) for size in (None, 16))
    for curvature in (whole, partition):
        observe(curvature.model, batch(8))
        curvature.update()
    A = whole.factors.blocks(2, "A", "average")[0, 0]
    blocks = partition.factors.blocks(2, "A", "average")[0]
    assert blocks.shape == (6, 16, 16)
    for k, block in enumerate(blocks):
        torch.testing.assert_close(block, A[16 * k : 16 * k + 16, 16 * k : 16 * k + 16])


@pytest.mark.parametrize("parts", [[8, 8, 8, 8], [1, 30, 1], [10, 22]])
def test_micro_batches_are_one_batch(parts: list[int]) -> None:
    """Batch norm apart, which really sees other statistics in other batches."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)).double()
    once = Curvature(model)
    observe(model, batch(32))
    once.update()
    once.close()
    parted = Curvature(model, loss_multiplier=lambda: 1.0 / len(parts))
    for x in batch(32).split(parts):
        (model(x).sin().mean(1).mean() / len(parts)).backward()
    parted.update()
    torch.testing.assert_close(averages(parted), averages(once))


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**16])
def test_a_loss_scale_changes_nothing(scale: float) -> None:
    model = net().float()
    runs = []
    for s in (1.0, scale):
        curvature = Curvature(model, loss_multiplier=lambda s=s: torch.tensor(s))
        (s * model(batch(8).float()).sin().mean(1).mean()).backward()
        curvature.update()
        curvature.close()
        runs.append(averages(curvature))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=0)


def test_averaging_is_an_exponential_average_without_bias() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    curvature = Curvature(model, averaging=0.8, update_every_n_steps=1)
    seen = []
    for seed in range(4):
        x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        seen.append(x.T @ x / 5)
        model(x).sin().mean().backward()
        curvature.update()
    weights = torch.tensor([0.8**3, 0.8**2, 0.8, 1.0], dtype=torch.float64)
    expected = sum(w * A for w, A in zip(weights / weights.sum(), seen, strict=True))
    torch.testing.assert_close(curvature.factors.blocks(0, "A", "average")[0, 0], expected)


@pytest.mark.parametrize("averaging", [0.99999, 1 - 1e-9])
def test_averaging_of_nearly_one_takes_all_batches_alike(averaging: float) -> None:
    """In float32 too, in which such a number may be 1."""
    model, seen = nn.Linear(4, 3), []
    curvature = Curvature(model, averaging=averaging, update_every_n_steps=1)
    for _ in range(4):
        x = torch.randn(16, 4)
        seen.append(x.T @ x / len(x))
        model(x).square().mean().backward()
        curvature.update()
    found = curvature.factors.blocks(0, "A", "average")[0, 0]
    torch.testing.assert_close(found, torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)


def test_without_averaging_only_the_last_batch_counts() -> None:
    model = net()
    curvature, fresh = Curvature(model, averaging=0.0, update_every_n_steps=1), Curvature(model, averaging=0.0)
    observe(model, batch(8, seed=1))
    fresh.discard()
    curvature.update()
    observe(model, batch(8, seed=2))
    curvature.update()
    fresh.update()
    assert_bitwise(averages(curvature), averages(fresh))


def test_the_damping_schedule_is_read_at_each_refresh() -> None:
    model = net()
    seen: list[int] = []

    def damping(step: int) -> float:
        seen.append(step)
        return Exponential(1.0, 0.5, 10)(step)

    curvature = Curvature(model, damping=damping, update_every_n_steps=lambda step: 2 if step < 4 else 5)
    for _ in range(12):
        observe(model, batch(4))
        curvature.update()
    assert seen == [0, 2, 4, 9]


def test_a_batch_that_is_not_finite_is_left_out_and_counted() -> None:
    model = net()
    curvature = Curvature(model, update_every_n_steps=1)
    observe(model, batch(8))
    curvature.update()
    before = averages(curvature), inverses(curvature)
    x = batch(8)
    x[0, 0, 0, 0] = float("inf")
    observe(model, x)
    curvature.update()
    assert_bitwise((averages(curvature), inverses(curvature)), before)
    assert curvature.factors.rejected_windows == 4
    observe(model, batch(8, seed=1))
    curvature.update()
    assert all(torch.isfinite(average).all() for average in averages(curvature).values())


def test_one_bad_layer_does_not_keep_the_others() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    curvature = Curvature(model, averaging=0.0)
    for name, rows in (("0", torch.full((4, 3), float("nan"))), ("1", torch.randn(4, 3))):
        curvature.observe(name, rows, torch.randn(4, 3))
    curvature.update()
    assert curvature.factors.updates.tolist() == [0, 1]
    assert curvature.factors.rejected_windows == 1
    torch.testing.assert_close(curvature.factors.blocks(0, "A", "inverse")[0, 0], torch.eye(3))


def test_a_failed_inversion_keeps_the_last_good_inverse_and_is_counted() -> None:
    model = net()
    curvature = Curvature(model, update_every_n_steps=1, averaging=0.5)
    observe(model, batch(8))
    curvature.update()
    good = inverses(curvature)
    curvature.factors.blocks(0, "A", "average")[0, 0, 0, 0] = -1e6  # no covariance could become indefinite by itself
    curvature.factors.invert(curvature.factors.layout.index(tuple(range(4))), "sqrt", 1e-3, curvature.solve)
    assert curvature.factors.failed_inversions == 1
    assert_bitwise(curvature.factors.blocks(0, "A", "inverse"), good[18][:1][None])


def test_a_block_that_never_had_an_inverse_falls_back_to_its_mean_eigenvalue() -> None:
    model = nn.Linear(3, 2, bias=False)
    curvature = Curvature(model)
    model(torch.randn(8, 3)).sum().backward()
    whole = curvature.factors.layout.index((0,))
    curvature.factors.update_ema(whole, 0.0)
    A = curvature.factors.blocks(0, "A", "average")[0, 0]
    A[0, 0] -= 100.0
    A[1, 1] += 200.0
    curvature.factors.invert(whole, "trace", 0.2, curvature.solve)
    mean = A.trace() / 3
    torch.testing.assert_close(curvature.factors.blocks(0, "A", "inverse")[0, 0], torch.eye(3) / (1.2 * mean))


def test_a_dead_layer_gets_no_inverse_until_it_lives() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[0].bias, -100.0)
    for damping_rule in ("trace", "pi", "sqrt"):
        curvature = Curvature(model, damping_rule=damping_rule)
        model(torch.randn(5, 3)).sum().backward()
        curvature.update()
        grads = {p: torch.randn_like(p) for p in model.parameters()}
        assert all(torch.isfinite(d).all() for d in curvature.precondition(grads).values())


def test_a_layer_that_is_silent_in_a_window_keeps_its_curvature() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    curvature = Curvature(model, update_every_n_steps=1, averaging=0.0)
    model[1](model[0](torch.randn(4, 3))).sin().mean().backward()
    curvature.update()
    before = curvature.factors.blocks(1, "A", "inverse").clone()
    model[0](torch.randn(4, 3)).sin().mean().backward()
    curvature.update()
    assert_bitwise(curvature.factors.blocks(1, "A", "inverse"), before)
    assert curvature.factors.updates.tolist() == [2, 1]


@pytest.mark.parametrize("part", [(0, 1), (0, 2), (1,)], ids=str)
def test_a_refresh_of_some_layers_is_that_of_all_and_leaves_the_others(part: tuple[int, ...]) -> None:
    """Wherever their blocks lie in the stack: in one piece or not."""

    def refreshed(layers: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        curvature = Curvature(model, averaging=0.5)
        for chosen in ((0, 1, 2), *([layers] if layers else [])):
            model(torch.randn(6, 4)).sin().mean().backward()
            selection = curvature.factors.layout.index(chosen)
            curvature.factors.update_ema(selection, 0.5)
            curvature.factors.invert(selection, "trace", 0.2, curvature.solve)
        stacks = curvature.factors
        of_layers = [(2 * layer, 2 * layer + 1) for layer in range(3)]
        return [
            (
                torch.cat([stacks.blocks(i // 2, SIDES[i % 2], "average") for i in own]),
                torch.cat([stacks.blocks(i // 2, SIDES[i % 2], "inverse") for i in own]),
            )
            for own in of_layers
        ]

    found, all_of_them, none = refreshed(part), refreshed((0, 1, 2)), refreshed(())
    for layer in range(3):
        expected = all_of_them[layer] if layer in part else none[layer]
        torch.testing.assert_close(found[layer], expected)
        assert not torch.equal(all_of_them[layer][1], none[layer][1])


def test_a_discarded_window_leaves_no_trace() -> None:
    model = net()
    curvature, other = Curvature(model), Curvature(model)
    observe(model, batch(8, seed=1))
    curvature.discard()
    other.discard()
    observe(model, batch(8, seed=2))
    other.update()
    curvature.update()
    assert_bitwise(averages(curvature), averages(other))


def test_a_paused_curvature_does_not_listen() -> None:
    model = net()
    curvature, other = Curvature(model), Curvature(model)
    with curvature.paused(), other.paused():
        observe(model, batch(8, seed=1))
    observe(model, batch(8, seed=2))
    with curvature.paused():
        observe(model, batch(8, seed=3))
    other.discard()
    with curvature.paused():
        observe(model, batch(8, seed=2))
    curvature.update()
    other.update()
    assert_bitwise(averages(curvature), averages(other))


def test_what_a_pass_within_paused_adds_to_a_gradient_is_no_statistic_and_no_misfit() -> None:
    found = []
    for has_penalty in (False, True):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        model.load_state_dict({name: torch.ones_like(p) for name, p in model.state_dict().items()})
        curvature = Curvature(model)
        x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        loss = model(x).sin().sum(1).mean()
        with curvature.paused():
            loss = loss + has_penalty * model(x.flip(0) + 1.0).square().mean()
        loss.backward()
        curvature.update()
        assert curvature.left_out == {}
        found.append(averages(curvature))
    assert_bitwise(found[1], found[0])


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("unseen", ["paused", "in eval mode", "frozen"])
def test_a_pass_that_is_not_observed_does_not_tell_the_terms_of_the_loss(unseen: str, stagger: bool) -> None:
    """Such as one for an attack, a validation with gradients or another optimizer's loss, of more samples."""
    found = []
    for has_other in (False, True):
        model = net()
        curvature = Curvature(model, stagger=stagger, update_every_n_steps=3)
        for step in range(6):
            if has_other and unseen == "paused":
                with curvature.paused():
                    observe(model, batch(20, seed=9))
            elif has_other:
                model.train(unseen != "in eval mode").requires_grad_(unseen != "frozen")
                observe(model, batch(20, seed=9).requires_grad_())
                model.train().requires_grad_()
            model.zero_grad()
            observe(model, batch(8, seed=step))
            curvature.update()
        found.append(averages(curvature))
    assert_bitwise(found[1], found[0])


def test_layers_that_are_not_optimized_are_left_out() -> None:
    model = net()
    curvature = Curvature(model, parameters=model[4].parameters())
    assert list(curvature.layers) == ["4"]
    assert curvature.left_out["0"] == "not in the optimizer"


def test_a_weight_is_preconditioned_though_its_bias_is_not_optimized() -> None:
    """Its gradient would never come, and without it none of the layer is preconditioned."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    weights = [p for p in model.parameters() if p.dim() > 1]
    curvature = Curvature(model, precondition_bias=True, parameters=[*weights, model[1].weight, model[2].bias])
    assert {name: layer.with_bias for name, layer in curvature.layers.items()} == {"0": False, "2": True}
    assert curvature.left_out == {"1": "not in the optimizer in part"}
    model(torch.randn(8, 4)).square().mean().backward()
    curvature.update()
    found = curvature.precondition({p: p.grad for p in weights[:1] if p.grad is not None})
    assert not torch.equal(found[weights[0]], weights[0].grad)


def refreshed_in(curvature: Curvature, steps: int, x: Tensor) -> list[set[str]]:
    """The layers that each of the next steps refreshes, by what changes."""
    found = []
    for _ in range(steps):
        before = curvature.factors.updates.clone()
        observe(curvature.model, x)
        curvature.update()
        changed = (curvature.factors.updates > before).tolist()
        found.append({name for name, is_changed in zip(curvature.layers, changed, strict=True) if is_changed})
    return found


def test_staggered_each_layer_is_refreshed_once_in_each_interval() -> None:
    curvature = Curvature(net(), update_every_n_steps=3, stagger=True)
    first, *rest = refreshed_in(curvature, 7, batch(8))
    assert first == set(curvature.layers)
    for window in (rest[:3], rest[3:]):
        assert sorted(name for step in window for name in step) == sorted(curvature.layers)
        assert all(window)  # four layers on three steps: none is empty
    assert rest[:3] == rest[3:]


def test_staggered_layers_go_apart_as_the_interval_grows() -> None:
    """By default all layers are refreshed together in each of the first steps."""
    curvature = Curvature(net(), stagger=True, averaging=0.0)
    found = refreshed_in(curvature, 130, batch(8))
    assert all(step == set(curvature.layers) for step in found[:21])
    for window in (found[110:120], found[120:]):
        assert sorted(map(len, window)) == [0] * 6 + [1] * 4
        assert set().union(*window) == set(curvature.layers)


def test_staggered_an_interval_may_be_as_long_as_none_is() -> None:
    """It costs no more than a short one: no list of its steps is made."""
    schedule = RefreshSchedule(10**15, n_layers=3, stagger=True)
    schedule.advance()
    assert schedule.next_steps == [1, 2, 3]
    schedule.advance()
    assert schedule.next_steps == [10**15 + 1, 2, 3]


def test_by_default_a_training_refreshes_ever_more_rarely() -> None:
    """Each step to step 20; from step 1000 on, the interval is a hundredth of the steps so far."""
    model = nn.Linear(2, 2)
    curvature = Curvature(model)
    optimizer = Thor(model.parameters(), preconditioner=curvature)
    due = []
    for step in range(2100):
        if curvature.is_due():
            due.append(step)
        model(torch.ones(2, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    intervals = {step: later - step for step, later in pairwise(due)}
    assert due[:22] == [*range(21), 22]
    assert {interval for step, interval in intervals.items() if 100 <= step < 1000} == {10}
    assert all(interval == step // 100 for step, interval in intervals.items() if step >= 1000)
    assert intervals[due[-2]] == 20


def test_staggered_the_costliest_layer_has_a_step_for_itself() -> None:
    curvature = Curvature(net(), update_every_n_steps=2, stagger=True)
    _, *rest = refreshed_in(curvature, 3, batch(8))
    assert {"4"} in rest  # Linear(96, 10) is more than the others together


def test_staggered_norms_are_shared_out_by_what_they_read() -> None:
    """Their factors cost nothing, so all would fall into the emptiest step; the passes over large images do not."""
    model = nn.Sequential(*(nn.BatchNorm2d(1) for _ in range(4)), nn.Flatten(), nn.Linear(400, 20))
    curvature = Curvature(model, update_every_n_steps=2, stagger=True)
    _, *rest = refreshed_in(curvature, 3, torch.randn(30, 1, 20, 20))
    # 4 x 30 x 24,000 for the norms, 400 x 100² and 3 x 4 x 100³ or so for the linear layer: the latter stands alone.
    assert sorted(map(len, rest)) == [1, 4]
    model = nn.Sequential(*(nn.BatchNorm2d(1) for _ in range(4)), nn.Flatten(), nn.Linear(400, 2))
    curvature = Curvature(model, update_every_n_steps=2, stagger=True, block_size=10)
    _, *rest = refreshed_in(curvature, 3, torch.randn(30, 1, 20, 20))
    assert sorted(map(len, rest)) == [2, 3]


@pytest.mark.parametrize("stagger", [False, True])
def test_staggered_statistics_are_the_same_where_nothing_moves(stagger: bool) -> None:
    """With the same batch and weights at every step, when a layer is refreshed makes no difference."""
    once = Curvature(net(), averaging=0.5)
    often = Curvature(net(), averaging=0.5, update_every_n_steps=3, stagger=stagger)
    refreshed_in(once, 1, batch(8))
    refreshed_in(often, 7, batch(8))
    torch.testing.assert_close(averages(often), averages(once))
    torch.testing.assert_close(inverses(often), inverses(once))


def test_staggered_a_resumed_run_does_not_miss_layers_that_are_not_due() -> None:
    """Its first refresh is of some layers only; the others were not to be observed."""
    saved = Curvature(net(), update_every_n_steps=3, stagger=True)
    refreshed_in(saved, 1, batch(8))
    resumed = Curvature(net(), update_every_n_steps=3, stagger=True)
    resumed.load_state_dict(saved.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refreshed_in(resumed, 1, batch(8))


def test_staggered_a_layer_that_is_not_due_is_not_observed() -> None:
    curvature = Curvature(net(), update_every_n_steps=2, stagger=True)
    refreshed_in(curvature, 1, batch(8))
    observe(curvature.model, batch(8))
    seen = curvature.factors.counts[:, 0] > 0
    assert 0 < int(seen.sum()) < len(seen)


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3)), {}, "Only in the checkpoint: 1"),
        (nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))), {}, "Not in the checkpoint: 2"),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4)), {}, r"1.G: \(1, 1, 3, 3\) in the checkpoint, \(1, 1, 4, 4\)"),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"block_size": 2}, "Other shapes: 0.A"),
    ],
)
def test_a_state_of_another_architecture_is_refused(other: nn.Module, options: dict[str, Any], message: str) -> None:
    state = copy.deepcopy(Curvature(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))).state_dict())
    state["step"] = 7
    curvature = Curvature(other, **options)
    with pytest.raises(ValueError, match=message):
        curvature.load_state_dict(state)
    assert curvature.step == 0


def test_a_schedule_that_gives_nonsense_is_told() -> None:
    model = net()
    for options, message in (
        ({"damping": lambda step: 0.0}, "damping schedule gave 0.0 at step 0"),
        ({"damping": lambda step: None}, "damping schedule gave None at step 0"),
        ({"damping": lambda step: torch.tensor([1.0, 2.0])}, r"damping schedule gave tensor.* at step 0"),
        ({"update_every_n_steps": lambda step: 0}, r"update_every_n_steps\(0\) gave 0"),
    ):
        curvature = Curvature(model, **options)
        observe(model, batch(4))
        with pytest.raises(ValueError, match=message):
            curvature.update()
        curvature.close()


@pytest.mark.parametrize("option", ["loss_terms", "loss_multiplier"])
def test_numbers_of_the_loss_may_be_tensors_of_one_number_and_nothing_else(option: str) -> None:
    def update(given: Any) -> Curvature:
        curvature = Curvature(net(), **{option: lambda: given})
        observe(curvature.model, batch(4))
        curvature.update()
        return curvature

    expected = update(8)
    for same in (8.0, torch.tensor(8), torch.tensor([8.0])):
        assert_bitwise(averages(update(same)), averages(expected))
    for given, error in ((None, TypeError), ("8", TypeError), (torch.ones(2), TypeError), (-8, ValueError)):
        with pytest.raises(error, match=f"{option} must return .*, but returned"):
            update(given)
    if option == "loss_multiplier":
        with pytest.raises(ValueError, match="loss_multiplier returned 0"):
            update(0)


@pytest.mark.parametrize("rule", ["trace", "pi", "sqrt"])
@pytest.mark.parametrize("damping", [1e-300, 1e-46, 1e300])
def test_damping_beyond_the_range_of_float32_is_not_taken_for_none(rule: Any, damping: float) -> None:
    model = net().float()
    curvature = Curvature(model, damping=damping, damping_rule=rule)
    observe(model, batch(64).float())
    curvature.update()
    grads = {p: p.grad for p in model.parameters() if p.grad is not None}
    for layer in curvature.layers.values():
        p = layer.parameters[0]
        direction = curvature.precondition(grads)[p]
        assert torch.isfinite(direction).all()
        assert not torch.equal(direction, grads[p])


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
def test_skipped_layers_take_plain_momentum_and_change_nothing_of_the_others(mode: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    skipping, whole = (Curvature(model, mode=mode, skip_layers=skipped) for skipped in (["0", "4*"], []))
    model(torch.randn(9, 4)).square().mean().backward()
    for curvature in (skipping, whole):
        curvature.update()
        curvature.close()
    assert (list(skipping.layers), skipping.left_out["4"]) == (["2"], "in skip_layers")
    grads = {p: p.grad for p in model.parameters() if p.grad is not None}
    found, expected = (directions_of(one, mode, grads) for one in (skipping, whole))
    for p in (model[0].weight, model[4].weight):
        assert_bitwise(found[p], grads[p])
    # The output layer is the model's last one, also where that has no curvature.
    torch.testing.assert_close(found[model[2].weight], expected[model[2].weight])


@pytest.mark.parametrize("skipped", ["table", "head"])
def test_a_weight_that_a_skipped_layer_shares_takes_plain_momentum(skipped: str) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["table"].weight
    curvature = Curvature(model, skip_layers=[skipped])
    other = "head" if skipped == "table" else "table"
    assert (list(curvature.layers), curvature.left_out[skipped]) == (["body"], "in skip_layers")
    assert curvature.left_out[other] == "shares its weight with a layer in skip_layers"
    packed = Curvature(nn.MultiheadAttention(4, 2), skip_layers=["q_proj"])
    assert list(packed.layers) == ["k_proj", "v_proj", "out_proj"]


def test_a_skipped_layer_that_does_not_exist_is_an_error_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"skip_layers: 'haed' is the name of no layer. There are: body, head."):
        Curvature(nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)}), skip_layers=["haed"])


class StackedExperts(nn.Module):
    """All experts in one parameter, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(8, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,ewd->nw", x, self.experts)


def test_a_model_of_which_little_has_curvature_is_told_with_its_share_and_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(6, 6), StackedExperts(), nn.Linear(6, 2))
    expected = r"preconditions 14% of the weights .* those of 1 \(no curvature for StackedExperts.*register_layer"
    with pytest.warns(UserWarning, match=expected):
        Curvature(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Curvature(model, parameters=[*model[0].parameters(), *model[2].parameters()])  # of these, most have it
        Curvature(nn.Sequential(*(nn.Linear(20, 20) for _ in range(5)), StackedExperts()))


def test_a_layer_with_curvature_is_not_named_for_its_bias_among_those_without() -> None:
    with pytest.warns(UserWarning, match=r"preconditions 24% of the weights .* those of 0 \(no curvature for Embed"):
        Curvature(nn.Sequential(nn.EmbeddingBag(9, 5), nn.Linear(5, 3)))


def test_a_curvature_that_nobody_holds_listens_no_more() -> None:
    """As in a notebook's cell that runs again: an old one would observe beside the new one, for ever."""
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 2))
    curvature = Curvature(model)
    model[2](model[0](torch.randn(3, 4))).sum().backward()
    thor, gone = Thor(model.parameters(), preconditioner=curvature), weakref.ref(curvature)
    thor.step()
    del curvature
    gc.collect()
    assert gone() is not None
    del thor
    gc.collect()
    assert gone() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_any_layer_is_told_of() -> None:
    with pytest.warns(UserWarning, match=r"preconditions 0% of the weights .*no curvature for Bilinear"):
        Curvature(nn.Bilinear(4, 5, 6))


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
def test_the_device_on_which_torch_makes_tensors_by_default_does_not_matter(mode: Any) -> None:
    """A program may have called torch.set_default_device; a tensor made on the device "meta" would hold no number."""

    def trained(default: str) -> tuple[dict[str, Any], Any, Any]:
        model = net()
        curvature = Curvature(model, mode=mode, update_every_n_steps=2, stagger=True, trace_rule="THOR_stop")
        optimizer = Thor(model.parameters(), mode=mode, preconditioner=curvature)
        x = batch(8) * 1e9  # far from 1: gradients have a unit of their own
        with torch.device(default):
            for _ in range(6):
                observe(model, x)
                optimizer.step()
                optimizer.zero_grad()
            curvature.load_state_dict(curvature.state_dict())
            curvature.include()
            split = choose_block_size(model, lambda: model(x).square().mean())
            return model.state_dict(), curvature.figures(), split.shares

    weights, *others = trained("meta")
    expected_weights, *expected = trained("cpu")
    assert_bitwise(weights, expected_weights)
    assert others == expected


def test_layers_that_are_skipped_on_purpose_are_no_lack_of_curvature() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(StackedExperts()), nn.Linear(6, 20), StackedExperts())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skipping = Curvature(nn.Sequential(model[0], nn.Linear(6, 20)), skip_layers=["1"])
        # Weights that are layers of their own, of modules that are none.
        Curvature(nn.ModuleList([nn.Linear(6, 20), nn.LSTM(6, 6, bias=False)]), skip_layers=["1.weight_*"])
        Curvature(nn.ModuleList([nn.Linear(6, 12), nn.MultiheadAttention(6, 2)]), skip_layers=["1.[kqv]_proj"])
    assert (skipping.has_low_coverage, round(skipping.coverage, 2)) == (False, 0.2)
    with pytest.warns(UserWarning, match=r"preconditions 6% of the weights .* those of 1\.0, 3 \("):
        assert Curvature(model, skip_layers=["2"]).has_low_coverage
