"""Laws of the adam mode: Adam in the eigenbasis of the blocks, and what it is without curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, configure_thor
from lightning_thor.distributed.communicator import SingleProcess, WorkerGrid
from lightning_thor.optim.adam import FIRST, SECOND, adam_directions, carry_to_other_coordinates
from lightning_thor.trainer.start_report import curvature_report
from tests.helpers.boring import assert_bitwise
from tests.helpers.models import every_kind as net
from tests.helpers.models import grads_of, observed
from tests.helpers.preconditioners import Identity


class Plain(Identity):
    """A basis that is everyone's."""

    def due_parameters(self) -> set[nn.Parameter]:
        return set()

    def change_basis(self, tensors: Mapping[nn.Parameter, Tensor], mode: str, back: bool = False) -> Any:
        return {p: tensor.clone() for p, tensor in tensors.items()}


def basis(curvature: Curvature, name: str, side: str) -> Tensor:
    """Eigenvectors of a factor, ``[groups, width, width]``, from its averages alone, each block without its padding."""
    layer = curvature.layers[name]
    blocks = layer.A if side == "A" else layer.G
    average = curvature.factors.blocks(list(curvature.layers).index(name), side, "average")
    widths = [min(blocks.size, blocks.width - start) for start in range(0, blocks.width, blocks.size)]
    return torch.stack(
        [
            torch.block_diag(*(torch.linalg.eigh(block[:n, :n])[1] for block, n in zip(group, widths, strict=True)))
            for group in average
        ]
    )


def test_a_block_that_failed_keeps_its_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    curvature = observed(model, "adam", update_every_n_steps=1)
    before = {
        name: [None if Q is None else Q.clone() for Q in curvature.inverses_of(name)] for name in curvature.layers
    }

    def give_up(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    model(torch.randint(9, (40,))).square().mean().backward()
    curvature.update()
    after = {name: list(curvature.inverses_of(name)) for name in curvature.layers}
    assert_bitwise(after, before)
    assert curvature.factors.failed_inversions > 0


# ── coordinates ──


def test_in_the_new_coordinates_the_factors_are_diagonal_and_the_way_back_leads_back() -> None:
    """For every kind of layer, padded blocks among them; of parameters without curvature they are copies."""
    model = net()
    curvature = observed(model, "adam")
    grads = grads_of(model)
    rotated = curvature.change_basis(grads)
    torch.testing.assert_close(curvature.change_basis(rotated, back=True), grads)
    n_matrices = 0
    for name, layer in curvature.layers.items():
        if layer.kind.is_matrix and name != "8":
            weight = layer.parameters[0]
            matrix = layer.to_matrix([grads[weight]], torch.float64)
            Q_A, Q_G = basis(curvature, name, "A"), basis(curvature, name, "G")
            expected = Q_G.mT @ matrix @ Q_A
            # Of eigenvectors only the signs are free.
            torch.testing.assert_close(layer.to_matrix([rotated[weight]], torch.float64).abs(), expected.abs())
            n_matrices += 1
    assert n_matrices == 4
    assert rotated.keys() == grads.keys()
    assert all(rotated[p] is not grads[p] for p in grads)


def test_of_the_output_layer_the_outputs_stay_as_they_are() -> None:
    curvature = observed(net(), "adam")
    assert curvature.layers["8"].G.size == 1
    assert bool((curvature.inverses_of("8")[1] == 1).all())
    assert not curvature.polar_layers


# ── steps ──


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False)).double()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(9, (40,), generator=generator)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.999)])
def test_without_curvature_it_is_adamw(weight_decay: float, betas: tuple[float, float]) -> None:
    model, other = net(), net()
    beta1, beta2 = betas
    thor = Thor(
        model.parameters(), lr=0.01, mode="adam", momentum=beta1, beta2=beta2, nesterov=False,
        weight_decay=weight_decay, preconditioner=Plain(),
    )  # fmt: skip
    adamw = torch.optim.AdamW(other.parameters(), lr=0.01, betas=betas, weight_decay=weight_decay)
    torch.testing.assert_close(trained(model, thor), trained(other, adamw), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nesterov", [False, True])
def test_its_steps_are_those_of_dense_eigenbases(nesterov: bool) -> None:
    """Moments followed by hand over refreshes: the first is carried to the new basis, the second stays as it is but for
    what the first one needs at least."""
    model = two_layers()
    curvature = Curvature(model, mode="adam", block_size=4, update_every_n_steps=2)
    optimizer = Thor(model.parameters(), lr=0.01, mode="adam", nesterov=nesterov, preconditioner=curvature)
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter)
    m, v, expected = torch.zeros(6, 7).double(), torch.zeros(6, 7).double(), weight.detach().clone()
    for t in range(1, 7):
        optimizer.zero_grad()
        x = torch.randn(16, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        model(x).square().mean().backward()
        grad = weight.grad.clone()
        optimizer.step()
        Q_A, Q_G = basis(curvature, "0", "A")[0], basis(curvature, "0", "G")[0]
        if t > 1:  # where the basis stayed this is so already
            v = torch.maximum(v, (Q_G.T @ m @ Q_A).square() / sum(0.81**k / 0.99**k for k in range(t - 1)))
        m = 0.9 * m + 0.1 * grad
        v = 0.99 * v + 0.01 * (Q_G.T @ grad @ Q_A).square()
        # With Nesterov's the same gradient once more, and so the bias of one step more.
        first = (0.9 * m + 0.1 * grad) / (1 - 0.9 ** (t + 1)) if nesterov else m / (1 - 0.9**t)
        rotated = Q_G.T @ first @ Q_A
        expected = expected - 0.01 * Q_G @ (rotated / ((v / (1 - 0.99**t)).sqrt() + 1e-8)) @ Q_A.T
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-9)


def test_moments_are_carried_to_a_new_basis_where_there_is_one_and_stay_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net()
    curvature = Curvature(model, mode="adam", block_size=4, update_every_n_steps=4, stagger=True)
    optimizer = Thor(model.parameters(), mode="adam", preconditioner=curvature)
    bases = {name: list(curvature.inverses_of(name)) for name in curvature.layers}
    carried: list[set[nn.Parameter]] = []
    change_basis = curvature.change_basis

    def noted(tensors: Mapping[nn.Parameter, Tensor], mode: str, back: bool = False) -> dict[nn.Parameter, Tensor]:
        if back:
            carried.append(set(tensors))
        return change_basis(tensors, mode, back=back)

    monkeypatch.setattr(curvature, "change_basis", noted)
    trained(model, optimizer, steps=5)
    for step in range(5, 9):
        before = {name: [None if Q is None else Q.clone() for Q in both] for name, both in bases.items()}
        carried.clear()
        trained(model, optimizer, steps=1)
        changed = {
            p
            for name, both in bases.items()
            if any(Q is not None and not torch.equal(Q, old) for Q, old in zip(both, before[name], strict=True))
            for p in curvature.layers[name].parameters
        }
        # A norm has no basis but its own, though it takes its turn.
        assert {p for p in carried[0] if p.dim() > 1} == changed, step
        assert set() < carried[0] < carried[1], step


def sparse_inputs(step: int) -> Tensor:
    """Of twelve features one or two are seen in each sample, and some for the first time after many steps."""
    generator = torch.Generator().manual_seed(step)
    seen = torch.randint(4 + step // 3, (4, 2), generator=generator).clamp_max(11)
    return torch.zeros(4, 12, dtype=torch.float64).scatter_(1, seen, 1.0)


def trained_on_sparse_inputs(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Tensor]:
    """The weight before each of many steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False)).double()
    optimizer = optimizer_of(model)
    weights = []
    for step in range(40):
        weights.append(model[0].weight.detach().clone())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(sparse_inputs(step)), torch.arange(4)).backward()
        optimizer.step()
    return weights


@pytest.mark.parametrize("every", [1, 5])
def test_no_change_of_basis_makes_steps_longer_than_adams_can_be(every: int) -> None:
    """A first moment comes to coordinates that had no gradient before, where the second one is zero."""

    def thor_of(model: nn.Module) -> Thor:
        curvature = Curvature(model, mode="adam", update_every_n_steps=every)
        return Thor(model.parameters(), lr=0.01, mode="adam", nesterov=False, preconditioner=curvature)

    steps = torch.stack(trained_on_sparse_inputs(thor_of)).diff(dim=0)
    # By Cauchy and Schwarz, for 0.9 and 0.99; of all entries in the basis, and so of their mean square in any.
    assert steps.square().mean((1, 2)).sqrt().max() < 0.01 * 5.5**0.5


def test_where_no_coordinate_changes_refreshes_change_nothing() -> None:
    """Blocks of one have no basis but their own: AdamW, with second moments that are as small as they can be, too."""

    def thor_of(model: nn.Module) -> Thor:
        curvature = Curvature(model, mode="adam", block_size=1, update_every_n_steps=1)
        return Thor(model.parameters(), lr=0.01, mode="adam", nesterov=False, preconditioner=curvature)

    def adamw_of(model: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)

    torch.testing.assert_close(
        trained_on_sparse_inputs(thor_of), trained_on_sparse_inputs(adamw_of), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.99), (0.0, 0.9), (0.9, 0.5), (0.9, 0.81), (0.9, 0.0)])
def test_a_second_moment_is_raised_to_the_least_that_gradients_can_give(beta1: float, beta2: float) -> None:
    """The gradients for which m² / v is largest, of all with as many steps: those are not raised, smaller ones are."""
    for n_steps in (1, 2, 7):
        grads = torch.tensor([(beta2 / max(beta1, 1e-3)) ** k for k in range(n_steps)], dtype=torch.float64)
        state: dict[str, Any] = {}
        for grad in grads:
            adam_directions([state], [grad.view(1)], beta1, beta2)
        second = state[SECOND].clone()
        first = state[FIRST] * torch.tensor([1.0, 1.1], dtype=torch.float64).view(2, 1)
        for moment, factor in zip(first, (1.0, 1.21), strict=True):
            state[SECOND] = second.clone()
            carry_to_other_coordinates([state], [moment], beta1, beta2)
            # Adam has no such bound where it forgets all squares but the last; nor are there these gradients.
            expected = second * factor if beta1 and beta2 else torch.maximum(second, moment.square() * (1 - beta2))
            torch.testing.assert_close(state[SECOND], second if not beta2 else expected, rtol=1e-9, atol=0)


def test_the_scale_of_the_loss_hardly_matters() -> None:
    results = []
    for scale, multiplier in ((1.0, None), (1e3, lambda: 1e3), (1e-7, None)):
        model = two_layers()
        curvature = Curvature(model, mode="adam", loss_multiplier=multiplier)
        optimizer = configure_thor(model, mode="adam", preconditioner=curvature)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(16, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            (scale * model(x).square().mean()).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


def test_a_state_goes_on_in_another_precision() -> None:
    """As of `torch.optim.AdamW`: with weights of half the digits or of twice as many."""
    states = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = net().to(dtype)
        curvature = Curvature(model, mode="adam")
        optimizer = Thor(model.parameters(), lr=0.01, mode="adam", preconditioner=curvature)
        if states:
            curvature.load_state_dict(states[-1][0])
            optimizer.load_state_dict(states[-1][1])
        assert all(torch.isfinite(p).all() for p in trained(model, optimizer, steps=2))
        wide = torch.promote_types(dtype, torch.float32)
        assert {optimizer.state[p][key].dtype for p in model.parameters() for key in (FIRST, SECOND)} == {wide}
        states.append((curvature.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_model_that_is_cast_in_mid_run_goes_on(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Its moments are cast with it."""
    model = net().to(dtypes[0])
    optimizer = Thor(model.parameters(), lr=0.01, mode="adam", preconditioner=Curvature(model, mode="adam"))
    trained(model, optimizer, steps=2)
    model.to(dtypes[1])
    assert all(torch.isfinite(p).all() for p in trained(model, optimizer, steps=2))
    assert {optimizer.state[p][key].dtype for p in model.parameters() for key in (FIRST, SECOND)} == {dtypes[1]}


def test_complex_numbers_are_pairs_of_real_ones() -> None:
    """Of parameters without curvature, such as the spectral weights of a Fourier layer."""
    weights = [nn.Parameter(torch.arange(6.0).view(2, 3).to(torch.complex64)) for _ in range(2)]
    thor = Thor(weights[:1], lr=0.01, mode="adam", nesterov=False, preconditioner=Plain())
    adam = torch.optim.Adam(weights[1:], lr=0.01, betas=(0.9, 0.99))
    for step in range(3):
        for weight, optimizer in zip(weights, (thor, adam), strict=True):
            weight.grad = torch.tensor([[1 + 2j, -1j, 3.0], [0.1j, 2 - 1j, -1.0]]) * (step + 1j)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])


def test_a_moment_is_carried_to_a_new_basis_in_a_step_in_which_its_parameter_has_no_gradient() -> None:
    """As where a hook takes the gradients of some layers away after backward."""
    model = two_layers()
    curvature = Curvature(model, mode="adam", block_size=None, update_every_n_steps=1)
    optimizer = Thor(model.parameters(), mode="adam", preconditioner=curvature)
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter)
    moments = []
    for step in range(2):
        optimizer.zero_grad()
        x = torch.randn(16, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        if step == 1:
            weight.grad = None
        optimizer.step()
        moments.append(curvature.change_basis({weight: optimizer.state[weight][FIRST]}, back=True)[weight])
    torch.testing.assert_close(moments[0], moments[1])


def test_state_that_is_made_beforehand_is_that_of_all_parameters_and_changes_no_step() -> None:
    """Whole ones too, such as norms beside layers that tensor parallelism shares out."""
    weights = []
    for is_made in (False, True):
        model = two_layers()
        optimizer = Thor(
            model.parameters(), mode="adam", preconditioner=Curvature(model, mode="adam", update_every_n_steps=2)
        )
        if is_made:
            optimizer.make_state()
            assert optimizer.state.keys() == {*model.parameters()}
        for step in range(3):
            x = torch.randn(16, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(list(model.parameters()))
    assert_bitwise(weights[1], weights[0])


# ── what cannot be ──


def test_with_nesterov_a_step_takes_memory_of_two_gradients_beside_its_moments() -> None:
    grads, states = [torch.randn(1000, 100)], [dict[str, Any]()]
    adam_directions(states, grads, 0.9, 0.99, nesterov=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        adam_directions(states, grads, 0.9, 0.99, nesterov=True)
    n_bytes = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert n_bytes < 2.5 * grads[0].nbytes


def test_a_curvature_of_another_mode_is_told() -> None:
    for mode, wanted in (("natural", "adam"), ("polar", "adam"), ("adam", "natural"), ("adam", "polar")):
        model = net()
        curvature = Curvature(model, mode=mode)
        optimizer = Thor(model.parameters(), mode=wanted, preconditioner=curvature)
        with pytest.raises(RuntimeError, match=f'Thor\\(mode="{wanted}"\\) got a curvature of mode="{mode}"'):
            trained(model, optimizer, steps=1)


def test_workers_that_keep_the_bases_of_some_layers_are_refused() -> None:
    class Two(SingleProcess):
        world_size = 2

    with pytest.raises(ValueError, match="inverse_workers must be None with mode='adam'"):
        Curvature(net(), mode="adam").connect(SingleProcess(), worker_grid=WorkerGrid(SingleProcess(), Two()))


def test_a_preconditioner_without_a_basis_is_told() -> None:
    model = net()
    with pytest.raises(RuntimeError, match="Identity without change_basis"):
        trained(model, Thor(model.parameters(), mode="adam", preconditioner=Identity()), steps=1)


@pytest.mark.parametrize(("mode", "step"), [("natural", "momentum"), ("polar", "momentum"), ("adam", "Adam")])
def test_the_table_says_what_parameters_without_curvature_take(mode: str, step: str) -> None:
    said = " ".join(map(str, curvature_report(Curvature(net(), mode=mode)).renderables))
    assert f"Biases and plain layers take plain {step}" in said
