"""Laws of weights that are used several times: statistics are sums over uses, on the scale of one sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature
from lightning_thor.factors.layout import SIDES
from lightning_thor.layers.discovery import discover_layers
from lightning_thor.linalg.block_diagonal import diagonal_to_blocks
from lightning_thor.linalg.decompositions import Problems, Solutions
from lightning_thor.trainer.start_report import curvature_table
from tests.helpers.formulas import preconditioned

N, POSITIONS, WIDTH = 6, 4, 5


def factors(curvature: Curvature, name: str) -> list[Tensor]:
    index = list(curvature.layers).index(name)
    return [curvature.factors.blocks(index, SIDES[side], "average") for side in (0, 1)]


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


class Positions(nn.Module):
    """One weight at four positions: as a convolution, or as a linear layer (or two that are tied) called at each."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.calls = layers if len(layers) > 1 else layers * POSITIONS

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.calls[0], nn.Conv1d):
            y: Tensor = self.calls[0](x)
        else:
            y = torch.stack([layer(x[..., i]) for i, layer in enumerate(self.calls)], dim=-1)
        return y.sin().flatten(1).sum(1)


def linear(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(WIDTH, 3, bias=False).double()
    layer.weight = weight
    return layer


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_linear_layer_called_at_each_position_is_a_convolution(tied: bool, micro_batches: int) -> None:
    """The convolution is held against curvlinops elsewhere, so this fixes the scale of A and G."""
    conv = nn.Conv1d(WIDTH, 3, 1, bias=False).double()
    weight = nn.Parameter(conv.weight.detach()[..., 0].clone())
    n_modules = POSITIONS if tied else 1
    models = Positions([conv]), Positions([linear(weight) for _ in range(n_modules)])
    found = []
    for model in models:
        curvature = Curvature(
            model, block_size=None, averaging=0.0, max_rows=None, loss_multiplier=lambda: 1.0 / micro_batches
        )
        for x in x_of(N, WIDTH, POSITIONS).chunk(micro_batches):
            (model(x).mean() / micro_batches).backward()
        curvature.update()
        found.append(factors(curvature, "layers.0"))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_tied_linear_layers_take_the_gradient_that_their_weight_has_from_both() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()
    model[2].weight = model[0].weight
    curvature = Curvature(model, precondition_bias=True)
    assert list(curvature.layers) == ["0"]
    assert curvature.left_out == {}
    assert not curvature.layers["0"].with_bias  # two biases, one weight
    model(x_of(N, WIDTH)).sin().mean().backward()
    curvature.update()
    found = curvature.precondition({p: p.grad for p in model.parameters() if p.grad is not None})
    A_inverse, G_inverse = (curvature.factors.blocks(0, side, "inverse")[0, 0] for side in SIDES)
    weight = model[0].weight
    torch.testing.assert_close(found[weight], G_inverse @ weight.grad @ A_inverse)
    rows = table_rows(curvature)
    assert rows["2"] == "tied to 0"


def test_uses_with_different_numbers_of_rows_have_the_scale_of_each() -> None:
    """G is the sum of each use's own expectation over samples (an encoder and a decoder that share a table)."""
    layer = nn.Linear(WIDTH, 3, bias=False).double()
    short, long = x_of(4, WIDTH), x_of(10, WIDTH)

    def G_of(*inputs: Tensor) -> Tensor:
        curvature = Curvature(layer, block_size=None, averaging=0.0, max_rows=None)
        torch.stack([layer(x).sin().mean() for x in inputs]).sum().backward()
        curvature.update()
        curvature.close()
        return factors(curvature, "")[1]

    torch.testing.assert_close(G_of(short, long), G_of(short) + G_of(long))


class Tied(nn.Module):
    """Predicts tokens by the table that it looks them up in."""

    def __init__(self, head_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        modules = {"table": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7, bias=False)}
        for name in sorted(modules, key=lambda name: (name == "table") == head_first):
            self.add_module(name, modules[name])
        self.head.weight = self.table.weight
        self.double()

    table: nn.Embedding
    body: nn.Linear
    head: nn.Linear

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.table(tokens)).tanh())
        return logits


TOKENS = torch.tensor([[1, 2, 3, 3], [4, 1, 1, 6]])


def loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.roll(1, 1).flatten())


def table_rows(curvature: Curvature) -> dict[str, str]:
    table = curvature_table(curvature)
    return dict(zip(table.columns[0].cells, table.columns[2].cells, strict=True))


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("block_size", [None, 3])
def test_a_table_tied_to_the_output_layer_has_the_balanced_sums_of_both_as_factors(
    block_size: int | None, head_first: bool
) -> None:
    model = Tied(head_first)
    assert (next(iter(model._modules)) == "table") != head_first
    curvature = Curvature(model, block_size=block_size, averaging=0.0, max_rows=None)
    loss(model).backward()
    curvature.update()
    D, G_table = factors(curvature, "table")
    A, G = factors(curvature, "head")
    head = list(curvature.layers).index("head")

    def trace(blocks: Tensor) -> Tensor:
        return blocks.diagonal(dim1=-2, dim2=-1).sum()

    t_table, t_head = (trace(D) * trace(G_table)).sqrt(), (trace(A) * trace(G)).sqrt()
    scale = (t_table**2 + t_head**2).sqrt() / (t_table + t_head)
    cut = curvature.layers["head"].G
    vocabulary = scale * (diagonal_to_blocks(D.flatten(), cut) * t_table / trace(D) + G * t_head / trace(G))
    width = scale * (G_table * t_table / trace(G_table) + A * t_head / trace(A))
    torch.testing.assert_close(trace(vocabulary) * trace(width), trace(D) * trace(G_table) + trace(A) * trace(G))
    # Of the vocabulary at most a token for each five rows counts.
    for factor, expected, n in (("A", width, 4), ("G", vocabulary, min(7, TOKENS.numel() / 5))):
        damped = expected + 0.2 * trace(expected) / n * torch.eye(expected.shape[-1], dtype=torch.float64)
        torch.testing.assert_close(curvature.factors.blocks(head, factor, "inverse"), torch.linalg.inv(damped))
    found = curvature.precondition({p: p.grad for p in model.parameters() if p.grad is not None})
    grad = model.table.weight.grad
    A_inverse, G_inverse = curvature.inverses_of("head")
    expected = preconditioned(curvature.layers["head"], [grad], A_inverse, G_inverse)[0]
    torch.testing.assert_close(found[model.table.weight], expected)
    rows = table_rows(curvature)
    assert rows["table"].endswith("tied to head")
    assert rows["head"].startswith("A ")


def test_an_inversion_of_other_layers_copies_no_averages() -> None:
    """With stagger each step inverts some layers, and the averages of all may be many times theirs."""
    model = Tied()
    curvature = Curvature(model)
    loss(model).backward()
    curvature.update()
    factors, body = curvature.factors, list(curvature.layers).index("body")
    read = []

    def solve(problems: Problems) -> Solutions:
        read.extend(blocks.untyped_storage().data_ptr() for blocks, _ in problems.values())
        return curvature.solve(problems)

    factors.invert(factors.layout.index((body,)), "trace", 0.2, solve)
    assert read == [factors.batches[4].average.untyped_storage().data_ptr()]


@pytest.mark.parametrize("silent", ["table", "head"])
def test_a_role_that_is_not_used_leaves_the_other_its_own_inverses(silent: str) -> None:
    model = Tied()
    curvature = Curvature(model, block_size=None, averaging=0.0, max_rows=None)
    x = model.table(TOKENS) if silent == "head" else x_of(2, 4, 4)
    y = model.body(x).tanh()
    (y if silent == "head" else model.head(y)).sin().mean().backward()
    with pytest.warns(UserWarning, match=f"not observed before the first step.*{silent}"):
        curvature.update()
    A_inverse, G_inverse = curvature.inverses_of("head")
    grad = model.table.weight.grad
    (direction,) = preconditioned(curvature.layers["head"], [grad], A_inverse, G_inverse)
    alone = Tied()
    alone.table.weight = nn.Parameter(alone.table.weight.detach().clone())
    reference = Curvature(alone, block_size=None, averaging=0.0, max_rows=None)
    x = alone.table(TOKENS) if silent == "head" else x
    y = alone.body(x).tanh()
    (y if silent == "head" else alone.head(y)).sin().mean().backward()
    with pytest.warns(UserWarning, match="not observed"):
        reference.update()
    weight = alone.table.weight if silent == "head" else alone.head.weight
    expected = reference.precondition({weight: weight.grad})[weight]
    cosine = nn.functional.cosine_similarity(direction.flatten(), expected.flatten(), dim=0)
    assert cosine > 1 - 1e-9  # balanced: each factor's own scale is another, their product's is not
    torch.testing.assert_close(direction, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("output_layer", [None, "head"])
@pytest.mark.parametrize("mode", ["polar", "adam"])
def test_an_output_layer_that_shares_its_weight_with_an_earlier_layer_is_the_output_layer(
    mode: Any, output_layer: str | None
) -> None:
    """As heads that predict from several depths: the weight has the name of the first one."""
    model = nn.ModuleDict({"early": nn.Linear(5, 3), "body": nn.Linear(5, 5), "head": nn.Linear(5, 3)})
    model["head"].weight = model["early"].weight
    curvature = Curvature(model, mode=mode, output_layer=output_layer)
    assert {name: layer.G.size for name, layer in curvature.layers.items()} == {"early": 1, "body": 5}
    assert curvature.polar_layers == ({"body"} if mode == "polar" else set())


def test_tables_that_are_tied_are_one_layer() -> None:
    model = nn.ModuleDict({"encoder": nn.Embedding(7, 4), "decoder": nn.Embedding(7, 4)})
    model["decoder"].weight = model["encoder"].weight
    layers, left_out = discover_layers(model, block_size=None, precondition_bias=False)
    assert [use.name for use in layers["encoder"].uses] == ["encoder", "decoder"]
    assert (list(layers), left_out) == (["encoder"], {})


def test_a_weight_shared_by_layers_of_other_kinds_is_preconditioned_as_the_first_has_it() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.ConvTranspose1d(3, 3, 1, bias=False)})
    model["b"].weight = model["a"].weight
    layers, left_out = discover_layers(model, block_size=None, precondition_bias=False)
    assert list(layers) == ["a"]
    assert left_out == {"b": "shares its weight with 'a', which is preconditioned"}


@pytest.mark.parametrize("max_rows", [None, 40, 12])
def test_a_second_use_counts_as_much_as_the_first_however_few_rows_are_taken(max_rows: int | None) -> None:
    """Rows of less than one image among them: the share of a convolution's positions that are looked at."""
    found = []
    for n_uses in (1, 2):
        conv = nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
        conv.weight.data.copy_(x_of(3, 2, 3, 3))
        model = nn.Sequential(conv)
        curvature = Curvature(model, averaging=0.0, max_rows=max_rows)
        x = x_of(3, 2, 12, 12)
        torch.stack([model(x).square().sum((1, 2, 3)).mean() for _ in range(n_uses)]).sum().backward()
        curvature.update()
        found.append(factors(curvature, "0")[1])
        assert found[-1].abs().sum() > 0
    torch.testing.assert_close(found[1], 2 * found[0])
