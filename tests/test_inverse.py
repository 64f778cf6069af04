"""Laws of damped inverses: exact where they succeed, silent and told where they fail."""

from __future__ import annotations

import pytest
import torch

from lightning_thor.inverse import damped_inverses


@pytest.mark.parametrize("size", [1, 2, 17, 33, 100, 128])
def test_inverse_times_damped_block_is_the_identity(size: int) -> None:
    rows = torch.randn(5, size, 3, dtype=torch.float64)
    damping = torch.tensor([0.1, 1.0, 10.0, 0.5, 2.0], dtype=torch.float64)
    inverses, succeeded = damped_inverses(rows @ rows.mT, damping)
    assert succeeded.all()
    identity = torch.eye(size, dtype=torch.float64)
    damped = rows @ rows.mT + damping[:, None, None] * identity
    torch.testing.assert_close(inverses @ damped, identity.expand(5, size, size))
    torch.testing.assert_close(inverses, inverses.mT, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_singular_block_has_an_inverse_however_small_the_damping(scale: float) -> None:
    rows = torch.randn(4, 64, 1) * scale**0.5
    inverses, succeeded = damped_inverses(rows @ rows.mT, torch.full((4,), 1e-30))
    assert succeeded.all()
    assert torch.isfinite(inverses).all()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -5.0])
def test_a_bad_block_is_told_and_hurts_no_other(size: int, entry: float) -> None:
    blocks = torch.eye(size).repeat(3, 1, 1)
    blocks[1, 0, 0] = entry
    inverses, succeeded = damped_inverses(blocks, torch.ones(3))
    assert succeeded.tolist() == [True, False, True]
    torch.testing.assert_close(inverses[::2], torch.eye(size).repeat(2, 1, 1) / 2)


def test_a_block_of_zeros_without_damping_is_told() -> None:
    for size in (1, 3):
        _, succeeded = damped_inverses(torch.zeros(1, size, size), torch.zeros(1))
        assert not succeeded.any()
