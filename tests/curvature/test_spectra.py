"""Laws of what is measured of factors: eigenvalues, effective rank, what blocks lose, and the change at a refresh."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature
from lightning_thor.curvature.export import effective_rank
from tests.helpers.watch import Watch


def net() -> nn.Sequential:
    """Widths of 7 and 5, which blocks of at most 4 cannot divide, groups, and a norm."""
    return nn.Sequential(
        nn.Linear(7, 5), nn.LayerNorm(5), nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 10, 1, groups=5), nn.Flatten()
    ).double()


def observed(model: nn.Module, n: int, scale: float = 1.0, **options: Any) -> Curvature:
    """After ``n`` steps on batches of 6, all of which refresh."""
    curvature = Curvature(model, update_every_n_steps=1, **options)
    for _ in range(n):
        (scale * model(torch.randn(6, 7, dtype=torch.float64))).square().mean().backward()
        curvature.measures_change = True
        curvature.update()
    return curvature


def dense(blocks: Tensor, width: int) -> Tensor:
    """``[groups, n_blocks, size, size]`` as one matrix, without the padding of each group."""
    return torch.block_diag(*(torch.block_diag(*group)[:width, :width] for group in blocks))


@pytest.mark.parametrize(("block_size", "scale"), [(4, 1.0), (None, 1.0), (4, 1e-9)])
def test_the_figures_are_those_of_the_exported_factors(block_size: int | None, scale: float) -> None:
    """Whatever unit gradients are stored in: with such a small loss it is not 1."""
    curvature = observed(net(), 3, scale, block_size=block_size, damping=0.1)
    assert (float(curvature.gradient_unit) == 1.0) == (scale == 1.0)
    exported, figures = curvature.export(), curvature.figures()
    for name, own in figures.items():
        for side in {"A", "G"} & own.keys():
            matrix = dense(exported[name][side], exported[name][f"{side}_width"])
            values = torch.linalg.eigvalsh(matrix).flip(0)
            damping = 0.1 * values.mean()
            assert own[side]["width"] == len(values)
            expected = [float(values[rank - 1]) for rank in own[side]["ranks"]]
            assert own[side]["eigenvalues"] == pytest.approx(expected, rel=1e-3, abs=1e-12 * expected[0])
            assert own[side]["trace"] == pytest.approx(float(matrix.trace()))
            assert own[side]["damping"] == pytest.approx(float(damping))
            assert own[side]["condition"] == pytest.approx(float((values[0] + damping) / (values[-1] + damping)))
            assert own[side]["effective_rank"] == pytest.approx(effective_rank(values.clamp_min(0)))
            assert own[side]["is_partitioned"] == (block_size == 4 and name == "0")
    assert "A" not in figures["1"]
    assert all(own["inverted_at"] == 2 and own["stopped"] is None for own in figures.values())
    assert figures["0"]["rows"] == 6


def test_the_effective_rank_of_two_unequal_eigenvalues_is_the_exponential_of_their_entropy() -> None:
    expected = math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert effective_rank(torch.tensor([3.0, 1.0, 0.0])) == pytest.approx(expected)
    assert effective_rank(torch.zeros(3)) == 0.0


def test_blocks_of_half_the_width_lose_half_of_a_factor_of_ones() -> None:
    model = nn.Linear(64, 2, bias=False)
    curvature = Curvature(model, block_size=None, update_every_n_steps=1)
    model(torch.ones(3, 64)).sum().backward()
    curvature.update()
    assert curvature.figures()[""]["A"]["outside"] == pytest.approx({"16": 0.75, "32": 0.5})
    assert curvature.figures()[""]["G"]["outside"] == {}


def test_the_change_is_that_of_the_norms_of_the_averages() -> None:
    model = net()
    curvature = observed(model, 1, block_size=4)
    assert curvature.changed_at is None
    assert curvature.measures_change  # still: the first refresh changes nothing
    assert bool(curvature.factor_change.isnan().all())
    for _ in range(2):
        before = curvature.export()
        curvature.measures_change = True
        model(torch.randn(6, 7, dtype=torch.float64)).square().mean().backward()
        curvature.update()
        after, figures = curvature.export(), curvature.figures()
        for name, own in figures.items():
            for side in {"A", "G"} & own.keys():
                change = (after[name][side] - before[name][side]).norm() / before[name][side].norm()
                assert own[side]["change"] == pytest.approx(float(change), rel=1e-9)
    assert (curvature.changed_at, curvature.measures_change) == (2, False)


def test_a_layer_that_is_observed_for_the_first_time_has_not_changed() -> None:
    model = net()
    curvature = Curvature(model, update_every_n_steps=1)
    for used in (model[:2], model):
        used(torch.randn(6, 7, dtype=torch.float64)).square().mean().backward()
        curvature.measures_change = True
        with pytest.warns(UserWarning, match="1 of 3 layers") if used is not model else nullcontext():
            curvature.update()
    changes = curvature.factor_change[:, 1].isnan().tolist()  # of G
    assert dict(zip(curvature.layers, changes, strict=True)) == {"0": False, "1": False, "3": True}


def test_a_measured_refresh_waits_for_nothing_and_makes_the_same_factors() -> None:
    factors = []
    for measures in (False, True):
        torch.manual_seed(0)
        model = net()
        curvature = Curvature(model, update_every_n_steps=1)
        for _ in range(3):
            model(torch.randn(6, 7, dtype=torch.float64)).square().mean().backward()
            curvature.measures_change = measures
            with Watch() as watch:
                curvature.update()
            assert not watch.waiting
        factors.append(curvature.export())
    torch.testing.assert_close(factors[0], factors[1], rtol=0, atol=0)
