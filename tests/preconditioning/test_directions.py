"""Laws of the polar mode: what it computes, that roots do not matter, and what it is without curvature."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, configure_thor
from lightning_thor.layers.base import Layer
from lightning_thor.linalg.matrix_sign import msign
from lightning_thor.preconditioning import directions
from lightning_thor.trainer.start_report import curvature_table
from tests.helpers.boring import assert_bitwise
from tests.helpers.models import ByLinears, every_kind, grads_of, observed
from tests.helpers.preconditioners import Identity


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The polar factor by as many polynomials as it takes."""
    monkeypatch.setattr(directions, "msign", lambda x: msign(x, steps=14))


def dense(curvature: Curvature, name: str, side: str) -> Tensor:
    """The damped factor, ``[groups, width, width]``, from its averages alone."""
    layer = curvature.layers[name]
    blocks = layer.A if side == "A" else layer.G
    average = curvature.factors.blocks(list(curvature.layers).index(name), side, "average")
    full = torch.stack([torch.block_diag(*group)[: blocks.width, : blocks.width] for group in average])
    mean = full.diagonal(dim1=-2, dim2=-1).sum() / (blocks.groups * blocks.width)
    return full + 0.1 * mean * torch.eye(blocks.width, dtype=full.dtype)


def power(matrices: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrices)
    return vectors * values[:, None, :] ** exponent @ vectors.mT


def polar_by_square_roots(curvature: Curvature, layer: Layer, grad: Tensor) -> Tensor:
    A, G = (power(dense(curvature, layer.name, side), -0.5) for side in ("A", "G"))
    U, _, Vh = torch.linalg.svd(G @ layer.to_matrix([grad], torch.float64) @ A, full_matrices=False)
    return layer.from_matrix(G @ (U @ Vh) @ A, [grad])[0]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("block_size", [5, None])
def test_the_polar_direction_is_that_of_symmetric_square_roots(block_size: int | None) -> None:
    """G^-½ msign(G^-½ M A^-½) A^-½ by eigenvalues and SVD, from roots that are neither symmetric nor its own."""
    model = every_kind()
    curvature = observed(model, block_size=block_size)
    grads = {p: torch.randn_like(p) for p in model.parameters()}  # of full rank: else the polar factor is not unique
    found = curvature.precondition(grads, "polar")
    assert curvature.polar_layers == {"1", "3", "4", "5"}
    for name in curvature.polar_layers:
        weight = curvature.layers[name].parameters[0]
        expected = polar_by_square_roots(curvature, curvature.layers[name], grads[weight])
        torch.testing.assert_close(found[weight], expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("shape", [(144, 200), (200, 144)])
@pytest.mark.parametrize(("block_size", "n_parts"), [(24, 3), (48, 3), (72, 2), (144, 1)])
def test_rows_or_columns_have_a_sign_of_their_own_up_to_64_of_them_in_whole_blocks(
    shape: tuple[int, int], block_size: int, n_parts: int
) -> None:
    """By SVD; what else a layer's direction is made of is the same."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Linear(shape[0], 3)).double()
    curvature = Curvature(model, mode="polar", block_size=block_size)
    model(torch.randn(400, shape[1], dtype=torch.float64)).square().mean().backward()
    curvature.update()
    weight, grad = model[0].weight, torch.randn(shape, dtype=torch.float64)
    A, G = (torch.block_diag(*one[0]) for one in curvature.inverses_of("0") if one is not None)
    whitened = G @ grad @ A.mT
    parts = whitened.chunk(n_parts, dim=0 if shape[0] < shape[1] else 1)
    U, _, Vh = zip(*(torch.linalg.svd(part, full_matrices=False) for part in parts), strict=True)
    signs = torch.cat([u @ vh for u, vh in zip(U, Vh, strict=True)], dim=0 if shape[0] < shape[1] else 1)
    torch.testing.assert_close(curvature.precondition({weight: grad}, "polar")[weight], G.mT @ signs @ A)


@pytest.mark.usefixtures("exact")
def test_any_root_gives_the_same_direction() -> None:
    model = every_kind()
    curvature = observed(model)
    grads = grads_of(model)
    before = curvature.precondition(grads, "polar")
    for stack in curvature.factors.batches.values():
        rotations = torch.linalg.qr(torch.randn_like(stack.inverse))[0]
        stack.inverse.copy_(rotations @ stack.inverse)
    after = curvature.precondition(grads, "polar")
    for p, direction in before.items():
        torch.testing.assert_close(after[p], direction, rtol=1e-7, atol=1e-7 * direction.abs().max().item())


def test_roots_give_the_natural_direction_too() -> None:
    model = every_kind()
    roots, inverses = observed(model, "polar"), observed(model, "natural")
    grads = grads_of(model)
    found, expected = roots.precondition(grads), inverses.precondition(grads)
    polar = roots.precondition(grads, "polar")
    output = model[8].weight
    for p, direction in expected.items():
        if p is not output:  # whose G is cut otherwise, see below
            torch.testing.assert_close(found[p], direction, rtol=1e-8, atol=1e-8 * direction.abs().max().item())
    for p in (*model[0].parameters(), *model[7].parameters(), *model[8].parameters(), model[1].bias):
        assert_bitwise(polar[p], found[p])


def test_the_output_layer_has_the_diagonal_of_its_G_alone() -> None:
    """What lies beside it in E[g gᵀ] is the errors' mean, which an inverse would take out of the direction."""
    model = every_kind()
    curvature, whole = observed(model), observed(model, "natural", block_size=None)
    weight = model[8].weight
    A = torch.block_diag(*curvature.factors.blocks(list(curvature.layers).index("8"), "A", "average")[0])[:64, :64]
    A = A + 0.1 * A.trace() / 64 * torch.eye(64, dtype=A.dtype)
    G = dense(whole, "8", "G")[0].diagonal()
    expected = torch.linalg.solve(A, weight.grad.T).T / G[:, None]
    torch.testing.assert_close(curvature.precondition({weight: weight.grad})[weight], expected, rtol=1e-8, atol=1e-10)


def test_the_table_says_which_layers_are_polar() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(curvature_table(Curvature(every_kind(), mode="polar")))
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines if ", polar" in line] == ["1", "3", "4", "5"]


def test_a_block_that_fails_has_a_root_of_what_natural_mode_has() -> None:
    """The last good one, or before there ever was one that of the mean eigenvalue."""
    stored = []
    for mode in ("natural", "polar"):
        curvature = observed(every_kind(), mode)
        stack = curvature.factors.batches[4]
        stack.average[:2, 0, 1] += 10.0
        stack.average[:2, 1, 0] += 10.0
        curvature.factors.inverted_blocks[4][1], stack.inverse[1] = False, torch.eye(4)
        curvature.factors.invert(
            curvature.factors.layout.index(tuple(range(len(curvature.layers)))), "sqrt", 1e-4, curvature.solve
        )
        assert int(curvature.factors.failed_inversions) == 2
        stored.append(stack.inverse)
    torch.testing.assert_close(stored[1].mT @ stored[1], stored[0], rtol=1e-8, atol=1e-8)


def test_signs_in_chunks_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    curvature = Curvature(model, mode="polar")
    model(torch.randn(16, 8)).square().mean().backward()
    curvature.update()
    together = curvature.precondition(grads_of(model), "polar")
    monkeypatch.setattr(directions, "MSIGN_CHUNK_NUMEL", 64 * 3)
    torch.testing.assert_close(curvature.precondition(grads_of(model), "polar"), together)


class Unpolar(Identity):
    """Without curvature: the polar factor of each matrix."""

    def directions(self, tensors: dict[nn.Parameter, Tensor], mode: str) -> list[dict[nn.Parameter, Tensor]]:
        return [{p: directions.msign(momentum[None])[0] for p, momentum in tensors.items()}]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("through", ["a preconditioner that changes nothing", "a curvature that saw nothing"])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"momentum": 0.6}, {"weight_decay": 0.1}], ids=str)
def test_without_curvature_it_is_muon(options: dict[str, Any], through: str) -> None:
    """torch's own, made to iterate to the end too (by the classical quintic, in bfloat16: hence the tolerance)."""
    options = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0, **options}
    targets = torch.randn(20, 6, 9)

    def train(make: Callable[[nn.Sequential], torch.optim.Optimizer]) -> Tensor:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(9, 6, bias=False), nn.Linear(6, 4, bias=False))
        weight, start = model[0].weight, model[0].weight.detach().clone()
        optimizer = make(model)
        for target in targets:
            weight.grad = weight.detach() - target
            optimizer.step()
        return weight.detach() - start

    def muon(model: nn.Sequential) -> torch.optim.Optimizer:
        classical = {"ns_coefficients": (1.875, -1.25, 0.375), "ns_steps": 30, "adjust_lr_fn": "match_rms_adamw"}
        return torch.optim.Muon([model[0].weight], lr=0.05, **options, **classical)

    def thor(model: nn.Sequential) -> torch.optim.Optimizer:
        # Silent layers keep the identity; one that never fires is an error, so the step is one that refreshes nothing.
        curvature = Curvature(model, mode="polar", update_every_n_steps=100)
        for layer in (0, 1):
            curvature._schedule.dismiss(layer)
        preconditioner = Unpolar() if through.startswith("a preconditioner") else curvature
        unlimited = {**options, "max_relative_step": None}
        return Thor([model[0].weight], lr=0.05, mode="polar", preconditioner=preconditioner, **unlimited)

    found, expected = train(thor), train(muon)
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_comes_first_and_is_that_of_the_raw_gradients(nesterov: bool) -> None:
    model = every_kind()
    curvature = observed(model)
    optimizer = Thor(
        model.parameters(), lr=0.1, mode="polar", match_rms=None, nesterov=nesterov, preconditioner=curvature
    )
    momentum = {p: torch.zeros_like(p) for p in model.parameters()}
    for _ in range(3):
        grads = {p: torch.randn_like(p) for p in model.parameters()}
        for p, grad in grads.items():
            p.grad = grad.clone()
            momentum[p] = 0.9 * momentum[p] + grad
        looked_at = {p: grads[p] + 0.9 * momentum[p] for p in grads} if nesterov else momentum
        before = {p: p.detach().clone() for p in model.parameters()}
        expected = curvature.precondition(looked_at, "polar")
        optimizer.step()
        for p in model.parameters():
            torch.testing.assert_close(before[p] - p.detach(), 0.1 * expected[p])
            assert_bitwise(p.grad, grads[p])


def trained(model: nn.Module, curvature: Curvature, optimizer: Thor, steps: range, scale: float = 1.0) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        tokens = torch.randint(9, (40,), generator=torch.Generator().manual_seed(step))
        (scale * (model(tokens) - 1.0).square().mean()).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def fresh(**options: Any) -> tuple[nn.Module, Curvature, Thor]:
    model = every_kind()
    curvature = Curvature(model, mode="polar", update_every_n_steps=3, block_size=5)
    return model, curvature, configure_thor(model, lr=0.01, mode="polar", preconditioner=curvature, **options)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    runs = [trained(*fresh(), range(7), scale) for scale in (1.0, 1000.0)]
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-9)


def test_it_trains() -> None:
    model, curvature, optimizer = fresh()
    tokens = torch.arange(9)
    before = (model(tokens) - 1.0).square().mean().item()
    trained(model, curvature, optimizer, range(60))
    assert (model(tokens) - 1.0).square().mean().item() < 0.05 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_gradients_move_nothing(dtype: torch.dtype) -> None:
    model = every_kind().to(dtype)
    curvature = Curvature(model, mode="polar")
    for layer in range(len(curvature.layers)):
        curvature._schedule.dismiss(layer)
    optimizer = Thor(model.parameters(), lr=0.1, mode="polar", nesterov=True, preconditioner=curvature)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_bitwise([p.detach() for p in model.parameters()], before)


def test_groups_of_natural_and_of_polar_mode_take_the_steps_of_their_mode() -> None:
    """On one curvature: those of a model all of whose groups are natural, bitwise, or polar."""
    weights = {}
    for modes in (("polar", "natural"), ("natural", "natural"), ("polar", "polar")):
        model = every_kind()
        curvature = observed(model)
        own = list(model[3].parameters())
        rest = [p for p in model.parameters() if all(p is not q for q in own)]
        groups = [{"params": params, "mode": mode} for params, mode in zip((rest, own), modes, strict=True)]
        optimizer = Thor(groups, lr=0.01, preconditioner=curvature)
        for _ in range(3):
            optimizer.step()
        weights[modes] = [[p.detach().clone() for p in params] for params in (rest, own)]
    (rest, own), (_, natural), (polar, _) = weights.values()
    assert_bitwise(own, natural)
    torch.testing.assert_close(rest, polar)


@pytest.mark.parametrize(("saved", "loading"), [("natural", "polar"), ("polar", "natural")])
def test_a_state_of_the_other_mode_is_refused_and_changes_nothing(saved: Any, loading: Any) -> None:
    state = observed(every_kind(), saved).state_dict()
    other = Curvature(every_kind(), mode=loading, block_size=5)
    with pytest.raises(ValueError, match=rf"of mode='{saved}', this one of mode='{loading}'.*Thor\(mode='{saved}'\)"):
        other.load_state_dict(state)
    assert other.step == 0


def test_a_state_from_before_there_were_modes_is_natural() -> None:
    state = observed(every_kind(), "natural").state_dict()
    del state["mode"]
    Curvature(every_kind(), block_size=5).load_state_dict(state)
    with pytest.raises(ValueError, match="of mode='natural'"):
        Curvature(every_kind(), mode="polar", block_size=5).load_state_dict(state)


def test_a_polar_optimizer_on_a_natural_curvature_is_told_what_to_build() -> None:
    model = every_kind()
    curvature = observed(model, "natural")
    with pytest.raises(RuntimeError, match=r'Curvature\(model, mode="polar"\)'):
        Thor(model.parameters(), mode="polar", preconditioner=curvature).step()
    with pytest.raises(RuntimeError, match=r"got a Identity without directions"):
        Thor(model.parameters(), mode="polar", preconditioner=Identity()).step()


class Concatenated(nn.Module):
    """Three linear layers whose outputs are put together, and a head."""

    def __init__(self, whole: nn.Sequential) -> None:
        super().__init__()
        assert isinstance(whole[0], nn.Linear)
        self.parts = nn.ModuleList(nn.Linear(5, 4, bias=False).double() for _ in range(3))
        for part, weight in zip(self.parts, whole[0].weight.detach().chunk(3), strict=True):
            part.weight.data = weight.clone()
        self.rest = whole[1:]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rest(torch.cat([part(x) for part in self.parts], dim=-1))
        return y


@pytest.mark.parametrize(("width", "block_size"), [(5, 3), (6, 3), (12, None)])
def test_each_part_of_a_fused_layer_has_a_polar_direction_of_its_own(
    exact: None, width: int, block_size: int | None
) -> None:
    """Also where its matrix is multiplied as one, since no block has padding."""
    whole = nn.Sequential(nn.Linear(width, 12, bias=False), nn.Tanh(), nn.Linear(12, 3)).double()
    parts = Concatenated(whole)
    x = torch.randn(20, width, dtype=torch.float64)
    found = []
    for model, fused in ((whole, {"0": 3}), (parts, None)):
        # An absolute damping: a relative one is one number for the whole of a layer.
        curvature = Curvature(
            model, mode="polar", fused=fused, block_size=block_size, damping_rule="sqrt", damping=0.01
        )
        model.zero_grad()
        model(x).square().mean().backward()
        curvature.update()
        curvature.close()
        found.append((model, curvature.precondition(grads_of(model), "polar")))
    (_, ours), (_, theirs) = found
    torch.testing.assert_close(ours[whole[0].weight], torch.cat([theirs[part.weight] for part in parts.parts]))


def test_each_projection_of_an_attention_has_a_polar_direction_of_its_own(exact: None) -> None:
    attention = nn.MultiheadAttention(8, 1, batch_first=True).double()
    linears = ByLinears(attention)
    query, memory = (torch.randn(3, length, 8, dtype=torch.float64) for length in (4, 5))
    ours, theirs = (Curvature(m, mode="polar", block_size=3) for m in (attention, linears))
    attention(query, memory, memory, need_weights=False)[0].sin().mean().backward()
    linears(query, memory).sin().mean().backward()
    for curvature in (ours, theirs):
        curvature.update()
    packed = ours.precondition(grads_of(attention), "polar")[attention.in_proj_weight]
    apart = theirs.precondition(grads_of(linears), "polar")
    assert ours.polar_layers == {"q_proj", "k_proj", "v_proj"}
    weights = (linears.q_proj.weight, linears.k_proj.weight, linears.v_proj.weight)
    torch.testing.assert_close(packed, torch.cat([apart[p] for p in weights]), rtol=1e-6, atol=1e-8)
