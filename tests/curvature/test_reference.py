"""Against an independent K-FAC, in float64: curvlinops, empirical Fisher, expand and reduce."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, register_layer
from lightning_thor.factors.layout import SIDES
from lightning_thor.layers.registry import REGISTERED

curvlinops = pytest.importorskip("curvlinops", reason="the reference K-FAC is not installed (make test installs it)")


class Sequence(nn.Module):
    """Two linear layers on [batch, 7, 4]; logits for each position, or for the mean over positions."""

    def __init__(self, per_position: bool) -> None:
        super().__init__()
        self.first, self.second, self.per_position = nn.Linear(4, 6), nn.Linear(6, 3), per_position

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        logits: Tensor = self.second(hidden if self.per_position else hidden.mean(1))
        return logits.flatten(0, 1) if self.per_position else logits


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4))


def dense_reference(model: nn.Module, x: Tensor, y: Tensor, terms: int, statistics: str) -> dict[str, Tensor]:
    """The reference's matrix of each weight, on its own, by name of the module."""
    reference = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        fisher_type="empirical",
        kfac_approx=statistics,
        check_deterministic=False,
        num_per_example_loss_terms=terms,
        num_data=len(x),
    )
    dense = reference @ torch.eye(reference.shape[1], dtype=torch.float64)
    blocks, start = {}, 0
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            blocks[name.removesuffix(".weight")] = dense[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
    return blocks


def observed(model: nn.Module, x: Tensor, y: Tensor, statistics: str) -> Curvature:
    curvature = Curvature(model, block_size=None, averaging=0.0, max_rows=None, statistics=statistics)
    nn.functional.cross_entropy(model(x), y).backward()
    curvature.update()
    return curvature


def dense_of(curvature: Curvature, name: str) -> Tensor:
    index = list(curvature.layers).index(name)
    A, G = (curvature.factors.blocks(index, side, "average")[0, 0] for side in SIDES)
    return torch.kron(G, A)


@pytest.mark.parametrize(
    ("model", "shape", "terms", "statistics"),
    [
        (conv(), (5, 2, 6, 6), 1, "expand"),
        (conv(), (5, 2, 6, 6), 1, "reduce"),
        (Sequence(per_position=False), (5, 7, 4), 1, "reduce"),
        (Sequence(per_position=True), (5, 7, 4), 7, "expand"),
    ],
    ids=["convolution, expand", "convolution, reduce", "one loss per sequence, reduce", "one loss per token, expand"],
)
def test_the_kronecker_products_are_the_references(
    model: nn.Module, shape: tuple[int, ...], terms: int, statistics: str
) -> None:
    model = model.double()
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.randint(3, (shape[0] * terms,))
    curvature = observed(model, x, y, statistics)
    for name, theirs in dense_reference(model, x, y, terms, statistics).items():
        torch.testing.assert_close(dense_of(curvature, name), theirs, rtol=1e-10, atol=1e-14)


class Attending(nn.Module):
    """Self-attention with one head on [batch, 5, 4]: torch's, or written with linear layers of the same weights."""

    def __init__(self, attention: nn.MultiheadAttention, per_position: bool, by_linears: bool) -> None:
        super().__init__()
        self.attention, self.per_position = None if by_linears else attention, per_position
        if by_linears:
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(4, 4).double() for _ in range(4))
            for index, layer in enumerate((self.q_proj, self.k_proj, self.v_proj)):
                layer.weight.data = attention.in_proj_weight.detach().chunk(3)[index].clone()
                layer.bias.data = attention.in_proj_bias.detach().chunk(3)[index].clone()
            self.out_proj.load_state_dict(attention.out_proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        if self.attention is not None:
            y: Tensor = self.attention(x, x, x)[0]
        else:
            scores = self.q_proj(x) @ self.k_proj(x).mT / 2.0
            y = self.out_proj(scores.softmax(-1) @ self.v_proj(x))
        return y.flatten(0, 1) if self.per_position else y.mean(1)


@pytest.mark.parametrize(("terms", "statistics"), [(5, "expand"), (1, "reduce")])
def test_the_projections_of_an_attention_are_the_references_linear_layers(terms: int, statistics: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 1, batch_first=True).double()
    ours, theirs = (Attending(attention, terms > 1, by_linears) for by_linears in (False, True))
    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(4, (6 * terms,))
    curvature = observed(ours, x, y, statistics)
    reference = dense_reference(theirs, x, y, terms, statistics)
    assert list(reference) == ["q_proj", "k_proj", "v_proj", "out_proj"]
    if statistics == "reduce":
        # A softmax cancels what all keys have in common: the sum of a sample's gradients is 0 but for rounding. Ours
        # take each position as a row.
        assert reference.pop("k_proj").abs().max() < 1e-20
    for name, dense in reference.items():
        torch.testing.assert_close(dense_of(curvature, f"attention.{name}"), dense, rtol=1e-8, atol=1e-14)


class Mirrored(nn.Module):
    """A linear layer whose weight is [in, out]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("statistics", ["expand", "reduce"])
def test_a_registered_layer_is_the_references_linear_layer(statistics: str) -> None:
    if Mirrored not in REGISTERED:
        register_layer(
            Mirrored,
            lambda module, a, g: (a.flatten(0, -2), g.flatten(0, -2)),
            matrix=lambda module, weight: weight.T,
        )
    per_position = statistics == "expand"
    theirs = Sequence(per_position).double()
    ours = Sequence(per_position).double()
    ours.load_state_dict(theirs.state_dict())
    theirs.first.bias.data.zero_()
    ours.first = Mirrored(theirs.first.weight.detach().T.clone())
    terms = 7 if per_position else 1
    x, y = torch.randn(5, 7, 4, dtype=torch.float64), torch.randint(3, (5 * terms,))
    curvature = observed(ours, x, y, statistics)
    for name, dense in dense_reference(theirs, x, y, terms, statistics).items():
        torch.testing.assert_close(dense_of(curvature, name), dense, rtol=1e-10, atol=1e-14)
