"""``statistics="masked"``: rows that the loss does not depend on have no part in A."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor
from lightning_thor.layers.discovery import discover_layers
from lightning_thor.layers.registry import EXPAND, MASKED

LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), {}),
    "fused": (lambda: nn.Linear(3, 4), {"fused": {"0": 2}}),
    "convolution": (lambda: nn.Conv1d(3, 4, 1), {}),
    "groups": (lambda: nn.Conv1d(4, 6, 1, groups=2), {}),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("precondition_bias", [False, True])
def test_rows_without_a_gradient_count_as_zeros(name: str, precondition_bias: bool) -> None:
    make, options = LAYERS[name]
    model = nn.Sequential(make()).double()
    width = 4 if name == "groups" else 3
    shape = (5, width, 6) if "conv" in name or name == "groups" else (5, 6, width)
    x, g = torch.randn(shape, dtype=torch.float64), torch.randn_like(model(torch.randn(shape, dtype=torch.float64)))
    is_padding = torch.zeros(5, 6, dtype=torch.bool)
    is_padding[1, 2:] = is_padding[4] = True
    mask = is_padding[:, None] if shape[2] == 6 else is_padding[..., None]
    g = g.masked_fill(mask, 0.0)
    x = x.masked_fill(mask, torch.nan)
    found = {}
    for statistics, inputs in ((MASKED, x), (EXPAND, x.masked_fill(mask, 0.0))):
        (layer,) = discover_layers(
            model, block_size=None, precondition_bias=precondition_bias, statistics=statistics, **options
        )[0].values()
        found[statistics] = layer.observe(inputs, g, torch.float64, None)
    masked, plain = found[MASKED], found[EXPAND]
    assert masked.a is not None
    assert plain.a is not None
    inputs = slice(None, -1) if precondition_bias else slice(None)
    torch.testing.assert_close(masked.a[:, inputs], plain.a[:, inputs])
    torch.testing.assert_close(masked.g, plain.g)
    assert (masked.n_rows, masked.n_samples) == (plain.n_rows, plain.n_samples)
    if precondition_bias:
        assert masked.a[:, -1].sum() == (~is_padding).sum() * len(masked.a)


class Tagger(nn.Module):
    """A label for each token, by an attention to all tokens that are no padding."""

    def __init__(self, *, is_tied: bool = False, padding_idx: int | None = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8, padding_idx=padding_idx)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 9 if is_tied else 3)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.table(tokens), src_key_padding_mask=tokens == 0))
        return logits


def trained(length: int, statistics: str, **options: Any) -> list[Tensor]:
    """Weights after ten steps on sentences of six tokens, padded to ``length``."""
    torch.manual_seed(1)
    model = Tagger(**options).double()
    optimizer = Thor(
        model.parameters(), lr=0.02, preconditioner=Curvature(model, statistics=statistics, update_every_n_steps=1)
    )
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        tokens = torch.randint(1, 9, (4, 6), generator=generator)
        labels = (tokens % 3).flatten()
        padded = nn.functional.pad(tokens, (0, length - 6))
        nn.functional.cross_entropy(model(padded)[:, :6].flatten(0, 1), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    "options", [{}, {"is_tied": True}, {"padding_idx": None}, {"is_tied": True, "padding_idx": None}]
)
def test_a_padded_batch_trains_as_one_without_its_padding(options: dict[str, Any]) -> None:
    """Factors differ by the share of padding alone, which relative damping and matched steps do not see."""
    for padded, plain in zip(trained(9, "masked", **options), trained(6, "expand", **options), strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(trained(9, "expand", **options)[1], trained(6, "expand", **options)[1], rtol=1e-3)
