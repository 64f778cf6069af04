"""Laws of the polar factor: against the singular value decomposition, for every shape, scale and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_thor.linalg.matrix_sign import POLYNOMIALS, msign


def exact(matrices: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    return U @ Vh


def matrices(shape: tuple[int, ...], smallest: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random ones whose singular values lie evenly, on a logarithmic scale, between ``smallest`` and 1."""
    n, p, q = shape
    k = min(p, q)
    U, V = torch.linalg.qr(torch.randn(n, p, k, dtype=torch.float64))[0], torch.randn(n, q, k, dtype=torch.float64)
    values = torch.logspace(float(torch.tensor(smallest).log10()), 0, k, dtype=torch.float64)
    return (U * values @ torch.linalg.qr(V)[0].mT).to(dtype)


@pytest.mark.parametrize(
    "shape", [(3, 5, 5), (2, 5, 7), (2, 4, 9), (2, 9, 4), (4, 1, 6), (4, 6, 1), (1, 1, 1), (0, 3, 2)], ids=str
)
def test_many_polynomials_give_the_polar_factor(shape: tuple[int, ...]) -> None:
    x = matrices(shape, 0.05)
    torch.testing.assert_close(msign(x, steps=9), exact(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "share", "error"), [(4, 1e-2, 0.09), (4, 5e-3, 0.11), (5, 5e-3, 2e-3), (6, 5e-3, 2e-5)]
)
@pytest.mark.parametrize("shape", [(4, 40, 59), (4, 40, 61), (4, 61, 40)], ids=str)
def test_singular_values_come_as_close_to_one_as_is_promised(
    steps: int, share: float, error: float, shape: tuple[int, ...]
) -> None:
    x = matrices(shape, share)
    U, before, Vh = torch.linalg.svd(x, full_matrices=False)
    after = (U.mT @ msign(x, steps) @ Vh.mT).diagonal(dim1=-2, dim2=-1)
    promised = before >= share * before.pow(8).sum(-1, keepdim=True).pow(1 / 8)
    assert promised.sum() > 100
    assert (after - 1)[promised].abs().max() < error
    assert after.max() < 1 + error


def test_each_polynomial_is_level_on_its_interval() -> None:
    """The best polynomial leaves the smallest and the largest value equally far from 1."""
    x = torch.logspace(math.log10(5e-3), 0, 100001, dtype=torch.float64)
    for a, b, c in POLYNOMIALS[:5]:
        x = a * x + b * x**3 + c * x**5
        assert 1 - x.min().item() == pytest.approx(x.max().item() - 1, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-3, 1e3, 1e30, 1e38])
def test_the_scale_does_not_matter_however_extreme(scale: float) -> None:
    x = torch.sign(matrices((2, 6, 8), 0.1, torch.float32))
    torch.testing.assert_close(msign(x * scale), msign(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_of_zeros_stays_zero_and_hurts_no_other(dtype: torch.dtype) -> None:
    x = matrices((3, 6, 8), 0.1, dtype)
    x[1] = 0.0
    assert torch.equal(msign(x)[1], torch.zeros(6, 8, dtype=dtype))
    # Other numbers of products may round otherwise, and rounding grows as much as the smallest singular value: tenfold.
    torch.testing.assert_close(msign(x)[::2], msign(x[::2]), rtol=0, atol=max(1e-5, 10 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_does_not_blow_up_where_singular_values_are_equal(rank: int, dtype: torch.dtype) -> None:
    """Those of a matrix of rank one are at the end of the interval, beyond which the polynomials explode."""
    x = (torch.randn(16, 24, rank) @ torch.randn(16, rank, 32)).to(dtype)
    values = torch.linalg.svdvals(msign(x).float())
    assert (values[:, :rank] - 1).abs().max() < 0.2
    assert values.max() < 1.2


@pytest.mark.parametrize("steps", [6, 7, 20])
@pytest.mark.parametrize("shape", [(16, 20), (16, 64)], ids=str)
def test_nor_does_it_where_they_are_zero_however_many_steps_are_taken(shape: tuple[int, int], steps: int) -> None:
    """Such singular values are rounding, and grow towards 1 like any others, but not beyond."""
    p, q = shape
    x = torch.randn(8, p, 3) @ torch.randn(8, 3, q)
    values = torch.linalg.svdvals(msign(x, steps))
    assert values.max() < 1.001
    assert (values[:, :3] - 1).abs().max() < 0.001


def test_it_is_the_same_for_each_matrix_alone() -> None:
    x = matrices((5, 12, 7), 0.02, torch.float32)
    alone = torch.cat([msign(x[i : i + 1]) for i in range(5)])
    # Rounding, of each of four steps, grows as much as the smallest singular value: fiftyfold.
    torch.testing.assert_close(msign(x), alone, rtol=0, atol=4 * 50 * torch.finfo(torch.float32).eps)
