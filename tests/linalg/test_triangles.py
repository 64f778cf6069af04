"""Packed triangles: nothing is lost, nothing is sent twice, and what is not finite stays where it is."""

from __future__ import annotations

import pytest
import torch

from lightning_thor.linalg.packing import pack, packed_numel, unpack
from tests.helpers.boring import assert_bitwise

SIZES = [1, 2, 3, 4, 5, 8, 13]


def symmetric(n: int, size: int) -> torch.Tensor:
    blocks = torch.randn(n, size, size, dtype=torch.float64)
    return blocks + blocks.mT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["symmetric", "lower", "full"])
def test_packing_and_unpacking_give_the_same_bits(size: int, form: str) -> None:
    blocks = {"symmetric": symmetric(3, size), "lower": torch.randn(3, size, size).tril()}.get(
        form, torch.randn(3, size, size)
    )
    packed = pack(blocks, form)
    assert packed.shape == (3, packed_numel(size, form))
    assert_bitwise(unpack(packed, size, form), blocks)


@pytest.mark.parametrize("size", SIZES)
def test_each_number_of_the_lower_triangle_travels_once_and_none_of_the_upper_one(size: int) -> None:
    block = torch.arange(size * size).view(1, size, size)
    rows, columns = torch.tril_indices(size, size)
    assert sorted(pack(block)[0].tolist()) == sorted(block[0, rows, columns].tolist())


def test_a_number_that_is_not_finite_stays_where_it_is() -> None:
    blocks = symmetric(2, 4)
    blocks[0, 3, 1] = blocks[0, 1, 3] = torch.inf
    blocks[1, 3, 3] = torch.nan
    torch.testing.assert_close(unpack(pack(blocks), 4), blocks, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [16, 32, 96, 128])
def test_what_travels_is_at_most_0_55_of_the_block_for_the_sizes_that_hold_most_of_the_bytes(size: int) -> None:
    assert packed_numel(size) <= 0.55 * size**2
