"""Laws of `Curvature.export`: the factors are those of the formulas, in the units of the loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_thor import Curvature

X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("factor", [1.0, 1e-14])  # the latter has another unit of gradients inside
@pytest.mark.parametrize("block_size", [None, 2])
def test_exported_factors_are_the_second_moments_of_inputs_and_gradients(block_size: int | None, factor: float) -> None:
    torch.manual_seed(1)
    model = nn.Linear(6, 4).double()
    curvature = Curvature(model, block_size=block_size, averaging=0.0, max_rows=None)
    output = model(X)
    (factor * output.sin().sum(1)).mean().backward()
    curvature.update()
    (layer,) = curvature.export().values()
    g = factor * output.detach().cos()  # of the per-sample loss
    for side, rows in (("A", X), ("G", g)):
        size = block_size or rows.shape[1]
        whole = rows.T @ rows / len(rows)
        mask = torch.block_diag(*[torch.ones(size, size, dtype=torch.float64)] * (rows.shape[1] // size))
        dense = torch.block_diag(*layer[side][0])
        torch.testing.assert_close(dense, whole * mask, rtol=1e-10, atol=0.0)
        vectors, values = layer[f"{side}_eigenvectors"], layer[f"{side}_eigenvalues"]
        torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, layer[side], rtol=1e-9, atol=1e-40)
        assert layer[f"{side}_width"] == rows.shape[1]
    assert (layer["n_windows"], layer["rows_per_sample"]) == (1, 1.0)


def test_of_one_sample_the_kronecker_product_is_the_fisher_matrix() -> None:
    """For a row-major weight, as ``flatten`` has it, with the bias as the last column."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    curvature = Curvature(model, block_size=None, averaging=0.0, precondition_bias=True, max_rows=None)
    model(X[:1]).sin().sum().backward()
    curvature.update()
    exported = curvature.export()
    for name in ("0", "3"):
        grad = torch.cat([model[int(name)].weight.grad, model[int(name)].bias.grad[:, None]], 1).flatten()
        layer = exported[name]
        assert layer["with_bias"]
        torch.testing.assert_close(torch.kron(layer["G"][0, 0], layer["A"][0, 0]), torch.outer(grad, grad))
    assert "A" not in exported["2"]
    assert exported["0"]["A"].data_ptr() != curvature.factors.blocks(0, "A", "average").data_ptr()
