"""Against an independent K-FAC, in float64: curvlinops, empirical Fisher, expand and reduce."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature

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
    reference = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        fisher_type="empirical",
        kfac_approx=statistics,
        check_deterministic=False,
        num_per_example_loss_terms=terms,
        num_data=shape[0],
    )
    dense = reference @ torch.eye(reference.shape[1], dtype=torch.float64)
    curvature = Curvature(model, block_size=None, averaging=0.0, max_rows=None, statistics=statistics)
    nn.functional.cross_entropy(model(x), y).backward()
    curvature.update()
    start = 0
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            index = list(curvature.layers).index(name.removesuffix(".weight"))
            A, G = (curvature.stacks.blocks_of(factor, "average")[0, 0] for factor in (2 * index, 2 * index + 1))
            theirs = dense[start : start + p.numel(), start : start + p.numel()]
            torch.testing.assert_close(torch.kron(G, A), theirs, rtol=1e-10, atol=1e-14)
        start += p.numel()
