"""Laws of the damping's split between A and G."""

from __future__ import annotations

import pytest
import torch

from lightning_thor.factors.damping import DampingRule, split_damping

A, G, M = (torch.tensor(x, dtype=torch.float64) for x in ([4.0, 9.0], [0.25, 1.0], [1.0, 16.0]))


def test_trace_damping_has_no_units() -> None:
    damping_A, damping_G = split_damping("trace", 0.1, A, G, M)
    scaled_A, scaled_G = split_damping("trace", 0.1, 1e3 * A, 1e-3 * G, M)
    torch.testing.assert_close(scaled_A, 1e3 * damping_A)
    torch.testing.assert_close(scaled_G, 1e-3 * damping_G)


@pytest.mark.parametrize("rule", ["pi", "sqrt"])
def test_the_product_of_both_is_the_damping(rule: DampingRule) -> None:
    damping_A, damping_G = split_damping(rule, 0.3, A, G, M)
    torch.testing.assert_close(damping_A * damping_G, torch.full_like(A, 0.3))


def test_pi_damps_both_factors_by_the_same_share() -> None:
    damping_A, damping_G = split_damping("pi", 0.3, A, G, M)
    torch.testing.assert_close(damping_A / A, damping_G / G)


def test_sqrt_is_sqrt_of_damping_on_both_where_a_sample_is_one_row() -> None:
    damping_A, damping_G = split_damping("sqrt", 0.04, A, G, torch.ones_like(M))
    torch.testing.assert_close(damping_A, torch.full_like(A, 0.2))
    torch.testing.assert_close(damping_G, torch.full_like(A, 0.2))
