"""Laws of blocks: everything equals the dense computation, masked to the diagonal blocks."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature
from lightning_thor.linalg import block_diagonal
from lightning_thor.linalg.block_diagonal import (
    BlockPartition,
    add_covariance_,
    diagonal,
    left_product,
    partition,
    right_product,
)

CUTS = [
    partition(12, 4),
    partition(12, None),
    partition(7, 3),
    partition(9, 2, groups=3),
    partition(5, 8),
    partition(1, 4),
    diagonal(6),
    partition(257, 128),
]


def dense(blocks: Tensor, layout: BlockPartition) -> Tensor:
    """``[groups, width, width]`` with the blocks on the diagonal."""
    return torch.stack([torch.block_diag(*group)[: layout.width, : layout.width] for group in blocks])


def mask(layout: BlockPartition) -> Tensor:
    return dense(torch.ones(layout.shape, dtype=torch.float64), layout)


@pytest.mark.parametrize("layout", CUTS, ids=str)
def test_a_cut_covers_the_width_in_equal_blocks(layout: BlockPartition) -> None:
    assert layout.n_blocks * layout.size >= layout.width
    assert 0 <= layout.padding < layout.n_blocks
    assert mask(layout).shape == (layout.groups, layout.width, layout.width)


@pytest.mark.parametrize("layout", CUTS, ids=str)
def test_covariance_is_the_dense_one_masked(layout: BlockPartition) -> None:
    rows = torch.randn(layout.groups, layout.width, 11, dtype=torch.float64)
    out = torch.zeros(layout.shape, dtype=torch.float64)
    add_covariance_(out.view(layout.sums_shape), rows, layout)
    add_covariance_(out.view(layout.sums_shape), rows, layout)
    torch.testing.assert_close(dense(out, layout), 2 * rows @ rows.mT * mask(layout))


@pytest.mark.parametrize("scale", [-3.0, torch.tensor(-3.0, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("layout", CUTS, ids=str)
def test_covariance_is_of_scaled_rows(layout: BlockPartition, scale: float | torch.Tensor) -> None:
    rows = torch.randn(layout.groups, layout.width, 11, dtype=torch.float64)
    before = rows.clone()
    scaled, out = torch.zeros(2, *layout.shape, dtype=torch.float64)
    add_covariance_(scaled.view(layout.sums_shape), rows, layout, scale)
    add_covariance_(out.view(layout.sums_shape), -3.0 * rows, layout)
    torch.testing.assert_close(scaled, out)
    assert rows.equal(before)


def test_covariance_takes_rows_of_any_strides() -> None:
    layout, rows = partition(12, 4), torch.randn(11, 12, dtype=torch.float64)
    out = torch.zeros(layout.shape, dtype=torch.float64)
    add_covariance_(out.view(layout.sums_shape), rows.T[None], layout)
    torch.testing.assert_close(dense(out, layout)[0], rows.T @ rows * mask(layout)[0])


@pytest.mark.parametrize("layout", CUTS, ids=str)
def test_products_are_the_dense_ones(layout: BlockPartition) -> None:
    factor = torch.randn(layout.shape, dtype=torch.float64)
    full = dense(factor, layout)
    matrix = torch.randn(layout.groups, layout.width, 5, dtype=torch.float64)
    torch.testing.assert_close(left_product(factor.mT, matrix, layout), full.mT @ matrix)
    torch.testing.assert_close(right_product(matrix.mT, factor.mT, layout), matrix.mT @ full.mT)
    torch.testing.assert_close(left_product(factor, matrix, layout), full @ matrix)
    torch.testing.assert_close(right_product(matrix.mT, factor, layout), matrix.mT @ full)


@pytest.mark.parametrize("layout", [partition(512, 128), partition(257, 128), partition(128, 64, groups=3)], ids=str)
def test_large_products_in_float32_are_the_dense_ones(layout: BlockPartition) -> None:
    """Another algorithm, on a CPU."""
    factor = torch.randn(layout.shape)
    full = dense(factor, layout)
    matrix = torch.randn(layout.groups, layout.width, 1111)
    torch.testing.assert_close(left_product(factor.mT, matrix, layout), full.mT @ matrix, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(left_product(factor, matrix, layout), full @ matrix, rtol=1e-4, atol=1e-3)
    transposed = matrix.mT.contiguous()
    torch.testing.assert_close(right_product(transposed, factor, layout), transposed @ full, rtol=1e-4, atol=1e-3)
    found = right_product(transposed, factor.mT, layout)
    torch.testing.assert_close(found, transposed @ full.mT, rtol=1e-4, atol=1e-3)


def test_a_divisor_of_the_width_needs_no_padding() -> None:
    assert [
        (c.size, c.padding)
        for c in (partition(576, 128), partition(512, 128), partition(300, 128), partition(131, 128))
    ] == [
        (96, 0),
        (128, 0),
        (100, 0),
        (66, 1),
    ]


@pytest.mark.parametrize("one_by_one", [set(), {"cpu"}], ids=["as on a GPU", "as on a CPU"])
def test_a_product_with_blocks_goes_to_its_columns(monkeypatch: pytest.MonkeyPatch, one_by_one: set[str]) -> None:
    monkeypatch.setattr(block_diagonal, "UNBATCHED_DEVICES", one_by_one)
    torch.manual_seed(3)
    matrix, factor = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(3, 4, 4, dtype=torch.float64)
    expected = (matrix.flatten(1) @ torch.block_diag(*factor)).view_as(matrix)
    into = torch.full_like(matrix, math.nan)
    block_diagonal.columns_product(matrix, factor.mT.contiguous().mT, into)
    torch.testing.assert_close(into, expected)
    if one_by_one:
        block_diagonal.columns_product(matrix, factor, into=matrix)
        torch.testing.assert_close(matrix, expected)


def test_on_a_cpu_no_batch_of_products_is_written_into_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would make them one after the other there."""
    bmm, made = torch.bmm, []

    def watched(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        made.append(out is None or out.is_contiguous())
        return bmm(a, b) if out is None else bmm(a, b, out=out)

    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 3, bias=False))
    curvature = Curvature(model, block_size=4)
    model(torch.randn(6, 2, 4, 4)).square().mean().backward()
    curvature.update()
    monkeypatch.setattr(torch, "bmm", watched)
    curvature.precondition({p: p.grad for p in model.parameters() if p.grad is not None})
    assert len(made) == 6
    assert all(made)


def test_memory_that_products_share_shows_in_none_of_them() -> None:
    """One product after another, larger, smaller and in other dtypes; first in inference mode, and in two threads."""

    def products(seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        found = []
        for rows, n_blocks, size, dtype in (
            (4, 2, 3, torch.float32),
            (9, 5, 4, torch.float32),
            (2, 1, 3, torch.float64),
        ):
            matrix = torch.randn(rows, n_blocks, size, generator=generator).to(dtype)
            factor = torch.randn(n_blocks, size, size, generator=generator).to(dtype)
            into = torch.empty_like(matrix)
            block_diagonal.columns_product(matrix, factor, into=into)
            found.append((into, torch.einsum("rbi,bij->rbj", matrix, factor)))
        return found

    with torch.inference_mode():
        products(0)
    with ThreadPoolExecutor(2) as pool:
        for each in [products(1), *pool.map(products, range(2, 12))]:
            for found, expected in each:
                torch.testing.assert_close(found, expected)
