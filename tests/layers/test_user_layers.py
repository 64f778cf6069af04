"""Laws of layers that are not torch's own: registered ones, fused ones, and subclasses of `nn.Linear`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_thor import Curvature, Thor, register_layer
from lightning_thor.factors.layout import SIDES
from lightning_thor.layers import registry
from lightning_thor.layers.discovery import discover_layers
from tests.helpers.formulas import preconditioned


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {})


class OfALibrary(nn.Module):
    """As PyTorch Geometric's linear layer, which is no subclass of torch's."""

    def __init__(self, width: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_out, width)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


OfALibrary.__module__, OfALibrary.__qualname__ = "torch_geometric.nn.dense.linear", "Linear"


def test_a_linear_layer_of_a_library_is_torchs() -> None:
    model = nn.Sequential(OfALibrary(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    other.load_state_dict(model.state_dict())
    x = torch.randn(6, 3, dtype=torch.float64)
    for name in ("0", "2"):
        found, expected = (statistics_of(one, x, name, precondition_bias=True)[1] for one in (model, other))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


class Grouped(nn.Module):
    """A linear layer in two groups; weight ``[in / 2, 2, out / 2]``."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gi,igo->...go", x.unflatten(-1, (2, 3)), self.kernel).flatten(-2)


def grouped_rows(module: Grouped, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return a.reshape(-1, 2, 3).transpose(0, 1), g.reshape(-1, 2, 4).transpose(0, 1)


def grouped_matrix(module: Grouped, weight: Tensor) -> Tensor:
    return weight.permute(1, 2, 0)


def statistics_of(model: nn.Module, x: Tensor, name: str, **options: Any) -> tuple[Curvature, list[Tensor]]:
    curvature = Curvature(model, block_size=None, averaging=0.0, **{"max_rows": None, **options})
    model(x).sin().mean().backward()
    curvature.update()
    curvature.close()
    index = list(curvature.layers).index(name)
    return curvature, [curvature.factors.blocks(index, SIDES[side], "average") for side in (0, 1)]


@pytest.mark.parametrize("max_rows", [None, 7])
@pytest.mark.parametrize("statistics", ["expand", "reduce"])
def test_a_registered_layer_is_what_it_would_be_as_linear_layers(statistics: str, max_rows: int | None) -> None:
    register_layer(Grouped, grouped_rows, matrix=grouped_matrix, weight="kernel")
    model = nn.Sequential(Grouped()).double()

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves = nn.ModuleList(nn.Linear(3, 4, bias=False).double() for _ in range(2))
            for index, half in enumerate(self.halves):
                half.weight = nn.Parameter(model[0].kernel.detach()[:, index].T.clone())

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([half(part) for half, part in zip(self.halves, x.chunk(2, -1), strict=True)], -1)

    x = torch.randn(5, 3, 6, dtype=torch.float64)
    options: dict[str, Any] = {"statistics": statistics, "max_rows": max_rows}
    ours, (A, G) = statistics_of(model, x, "0", **options)
    halves = Halves()
    theirs, _ = statistics_of(halves, x, "halves.0", **options)
    for index in (0, 1):
        torch.testing.assert_close(A[index], theirs.factors.blocks(index, "A", "average")[0])
        torch.testing.assert_close(G[index], theirs.factors.blocks(index, "G", "average")[0])
    kernel = model[0].kernel
    layer = ours.layers["0"]
    A_inverse, G_inverse = ours.inverses_of("0")
    (direction,) = preconditioned(layer, [kernel.grad], A_inverse, G_inverse)
    assert direction.is_contiguous()
    for index in (0, 1):
        grad = kernel.grad[:, index].T
        torch.testing.assert_close(
            direction[:, index].T, G_inverse[index, 0] @ grad @ A_inverse[index, 0], rtol=1e-10, atol=1e-12
        )


def test_the_law_of_a_registered_layer() -> None:
    register_layer(Grouped, grouped_rows, matrix=grouped_matrix, weight="kernel")
    module = Grouped().double()
    (layer,) = discover_layers(module, block_size=None, precondition_bias=True)[0].values()
    x = torch.randn(5, 6, dtype=torch.float64)
    y = module(x)
    y.retain_grad()
    y.sin().sum().backward()
    rows = layer.observe(x, y.grad, torch.float64, None)
    torch.testing.assert_close(rows.g @ rows.a.mT, layer.kind.to_matrix(layer, [module.kernel.grad]))


def test_a_registered_subclass_of_a_supported_layer_overrules_it() -> None:
    class ChannelsFirst(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    register_layer(ChannelsFirst, lambda module, a, g: (a.movedim(1, -1).flatten(0, 1), g.movedim(1, -1).flatten(0, 1)))
    x = torch.randn(5, 3, 7)
    _, (A, _) = statistics_of(nn.Sequential(ChannelsFirst(3, 4)), x, "0")
    rows = x.mT.flatten(0, 1)
    torch.testing.assert_close(A[0, 0], rows.T @ rows / len(rows))


def test_a_registered_subclass_of_a_convolution_has_a_loss_with_a_term_per_image_too() -> None:
    class Patched(nn.Conv2d):
        pass

    register_layer(Patched, lambda module, a, g: (F.unfold(a, 3).mT.flatten(0, 1), g.flatten(2).mT.flatten(0, 1)))
    x, found = torch.randn(5, 2, 6, 6, dtype=torch.float64), []
    for kind in (Patched, nn.Conv2d):
        torch.manual_seed(0)
        found.append(statistics_of(nn.Sequential(kind(2, 4, 3)).double(), x, "0")[1])
    torch.testing.assert_close(found[0], found[1])


class Other(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def test_a_subclass_with_a_forward_of_its_own_is_left_out_and_its_base_is_not() -> None:
    register_layer(Grouped, grouped_rows, matrix=grouped_matrix, weight="kernel")
    layers, left_out = discover_layers(nn.Sequential(Other(), Grouped()), block_size=None, precondition_bias=False)
    assert list(layers) == ["1"]
    assert left_out == {"0": "Other has a forward of its own, which may not be Grouped's"}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3, grouped_rows), TypeError, "takes a class of modules, got 3"),
        ((int, grouped_rows), TypeError, "takes a class of modules"),
        ((Grouped, None), TypeError, "one of rows_of, a function, like, .* got none"),
        ((nn.Linear, grouped_rows), ValueError, "Linear has curvature already"),
        (
            (Grouped, grouped_rows, {"like": nn.Linear}),
            TypeError,
            "one of rows_of, a function, like, .* got rows_of and like",
        ),
        ((Grouped, None, {"like": nn.Linear, "weight": "kernel"}), TypeError, "matrix and weight with rows_of only"),
        ((Grouped, None, {"like": nn.Bilinear}), ValueError, "like must be a type with curvature, such as nn.Linear"),
        ((Grouped, None, {"like": nn.MultiheadAttention}), ValueError, "like must be a type with curvature"),
        ((Grouped, None, {"like": nn.Linear(2, 2)}), ValueError, "like must be a type with curvature"),
        ((Grouped, None, {"like": nn.LSTM}), ValueError, "a recurrent one for its subclasses alone"),
        ((nn.Conv2d, None, {"like": nn.Linear}), ValueError, "Conv2d has curvature already"),
        ((Grouped, grouped_rows, {"matrix": "w"}), TypeError, "matrix must be a function, got 'w'"),
        ((Grouped, grouped_rows, {"weight": 3}), TypeError, "weight must be the name of a parameter, got 3"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments: Any, error: type[Exception], words: str) -> None:
    module_type, rows, options = (*arguments, {})[:3]
    with pytest.raises(error, match=words):
        register_layer(module_type, rows, **options)


def test_a_type_is_registered_once() -> None:
    register_layer(Grouped, grouped_rows, matrix=grouped_matrix, weight="kernel")
    with pytest.raises(ValueError, match="Grouped has curvature already"):
        register_layer(Grouped, grouped_rows)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (lambda module, w: w.permute(1, 2, 0).clone(), "a copy of shape"),
        (lambda module, w: w[:, 0], "shape"),
        (lambda module, w: w.flatten(), "shape"),
        (lambda module, w: None, "got None"),
    ],
)
def test_a_matrix_that_is_no_view_of_the_weight_is_refused(matrix: Any, words: str) -> None:
    register_layer(Grouped, grouped_rows, matrix=matrix, weight="kernel")
    with pytest.raises(ValueError, match=f"matrix of Grouped.*{words}"):
        Curvature(Grouped())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (lambda module, a, g: (a, g), r"must be tensors \[2, n, 3\] and \[2, n, 4\] to fit its weight; got"),
        (lambda module, a, g: (None, g), "rows of Grouped.*got None and"),
        (lambda module, a, g: (a, g[0]), "rows of Grouped"),
    ],
)
def test_rows_of_another_shape_are_refused(rows: Any, words: str) -> None:
    register_layer(Grouped, rows, matrix=grouped_matrix, weight="kernel")
    module = Grouped()
    curvature = Curvature(module)
    assert list(curvature.layers) == [""]
    with pytest.raises(ValueError, match=words):
        module(torch.randn(5, 6)).sum().backward()


# ── fused outputs ──


@pytest.mark.parametrize("precondition_bias", [False, True])
def test_the_blocks_of_a_fused_layer_are_those_of_its_parts(precondition_bias: bool) -> None:
    """Blocks of at most 4 would straddle the borders of three parts of 6, and G would have five."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 18)).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    options: dict[str, Any] = {"averaging": 0.0, "precondition_bias": precondition_bias, "fused": {"*": 3}}
    curvature = Curvature(model, block_size=4, **options)
    y = model(x)
    y.retain_grad()
    y.sin().mean().backward()
    curvature.update()
    full = y.grad.T @ y.grad * len(x)
    expected = torch.stack([full[i : i + 3, i : i + 3] for i in range(0, 18, 3)])
    torch.testing.assert_close(curvature.factors.blocks(0, "G", "average").flatten(0, 1), expected)
    found = curvature.precondition({p: p.grad for p in model.parameters() if p.grad is not None})
    A_inverse, G_inverse = (curvature.factors.blocks(0, side, "inverse") for side in SIDES)
    A_dense, G_dense = (torch.block_diag(*inverse.flatten(0, 1)) for inverse in (A_inverse, G_inverse))
    weight, bias = model[0].weight, model[0].bias
    if precondition_bias:
        both = G_dense @ torch.cat([weight.grad, bias.grad[:, None]], 1) @ A_dense[:6, :6]
        torch.testing.assert_close(found[bias], both[:, 5])
        torch.testing.assert_close(found[weight], both[:, :5])
    else:
        torch.testing.assert_close(found[weight], G_dense @ weight.grad @ A_dense[:5, :5])


@pytest.mark.parametrize(
    ("fused", "words"),
    [
        ({"qkv": 3}, "'qkv' is the name of no linear layer with curvature. There are: 0"),
        ({"0": 5}, "the 18 outputs of '0' cannot be 5 equal parts"),
        ({"0": 0}, "fused must map patterns"),
        ({"0": True}, "fused must map patterns"),
        ({3: 3}, "fused must map patterns"),
        ("0", "fused must map patterns"),
    ],
)
def test_a_wrong_fused_is_refused(fused: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Curvature(nn.Sequential(nn.Linear(5, 18), nn.LayerNorm(18)), fused=fused)


def test_a_fused_layer_may_be_frozen_or_of_another_optimizer_and_has_its_parts_when_it_trains() -> None:
    model = nn.Sequential(nn.Linear(5, 18), nn.LayerNorm(18), nn.Linear(18, 2))
    of_others = Curvature(model, fused={"0": 3}, parameters=model[2].parameters())
    assert list(of_others.layers) == ["2"]
    model[0].requires_grad_(False)
    curvature = Curvature(model, block_size=4, fused={"0": 3})
    assert curvature.include(model[0].parameters()) == ["0"]
    assert curvature.layers["0"].G.groups == 3
    with pytest.raises(ValueError, match="'1' is the name of no linear layer"):
        Curvature(model, fused={"1": 3}, parameters=model[2].parameters())


# ── subclasses of nn.Linear ──


class LoRA(nn.Linear):
    """A frozen linear layer with a trained product of two narrow ones beside it."""

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__(n_in, n_out)
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) + self.up(self.down(x))
        return out


def test_the_trained_matrices_of_a_lora_have_curvature_and_the_frozen_one_has_not() -> None:
    model = nn.Sequential(LoRA(6, 5, 2), nn.Tanh(), LoRA(5, 4, 2)).double()
    curvature = Curvature(model, averaging=0.0)
    assert list(curvature.layers) == ["0.down", "0.up", "2.down", "2.up"]
    assert curvature.left_out == {"0": "frozen", "2": "frozen"}
    x = torch.randn(7, 6, dtype=torch.float64)
    optimizer = Thor([p for p in model.parameters() if p.requires_grad], preconditioner=curvature)
    model(x).sin().mean().backward()
    optimizer.step()
    assert curvature.factors.updates.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(curvature.factors.blocks(0, "A", "average")[0, 0], x.T @ x / len(x))
