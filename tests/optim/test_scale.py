"""Laws of scale: exact for every finite number, whatever its dtype, shape and memory order."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

from lightning_thor import Thor
from lightning_thor.linalg import memory
from lightning_thor.optim.norms import root_mean_squares
from lightning_thor.optim.update_scaling import scale_to_norms_
from tests.helpers.boring import assert_bitwise
from tests.helpers.preconditioners import Identity

HOSTS = pytest.mark.parametrize("host", [{"cpu"}, set()], ids=["as on a CPU", "as on a GPU"])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
EXPONENTS = {torch.float16: (-24, 15), torch.float64: (-1074, 1023), torch.complex128: (-1074, 1022)}
"""Of two, from the least denormal number to the greatest: of the others those of float32."""
VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1) if x.dim() else x,
    "with gaps": lambda x: x[..., ::2] if x.dim() else x,
}


@some.composite
def tensors(draw: Any) -> Tensor:
    """Numbers of one size, or of very different ones, in each dtype; views, and tensors of no and of one number."""
    dtype = draw(some.sampled_from(DTYPES))
    shape = draw(some.sampled_from([(), (0,), (1,), (7,), (4, 3), (2, 3, 4), (2, 3, 5, 5), (70_000,)]))
    least, most = EXPONENTS.get(dtype, (-149, 126))
    exponent, spread = draw(some.integers(least, most)), draw(some.sampled_from([0, 1, 20, 150]))
    generator = torch.Generator().manual_seed(draw(some.integers(0, 2**16)))
    exponents = exponent - spread * torch.rand(shape, generator=generator, dtype=torch.float64)
    # In two steps: 2**-1074 is no power that torch can take.
    numbers = (1 + torch.rand(shape, generator=generator, dtype=torch.float64)) / 2
    numbers = numbers * torch.exp2((exponents / 2).floor()) * torch.exp2(exponents - (exponents / 2).floor())
    numbers = numbers * torch.randn(shape, generator=generator).sign()
    return VIEWS[draw(some.sampled_from(sorted(VIEWS)))](numbers.to(dtype))


def norm_and_exponent(x: Tensor) -> tuple[float, int]:
    """``(n, e)``: the L2 norm is ``n * 2**e``, by Python's own hypot; e keeps n in its range."""
    real = [math.frexp(one) for one in (torch.view_as_real(x) if x.is_complex() else x).double().flatten().tolist()]
    largest = max((exponent for number, exponent in real if number), default=0)
    return math.hypot(*(math.ldexp(number, exponent - largest) for number, exponent in real)), largest


def rounding(dtype: torch.dtype) -> float:
    """How far off a norm may be: each number's rounding, or that of a float32 sum."""
    return max(2 * torch.finfo(dtype).eps, 2e-6 if dtype.itemsize == 4 or dtype == torch.complex64 else 0.0, 1e-12)


@pytest.mark.fuzz
@HOSTS
@given(x=tensors(), rms=some.floats(0.01, 100.0))
def test_any_finite_tensor_is_brought_to_its_root_mean_square(host: set[str], x: Tensor, rms: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "HOST", host)
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
        scale_to_norms_([y], [x], [rms * math.sqrt(x.numel())])
    before, _ = norm_and_exponent(x)
    found, exponent = norm_and_exponent(y)
    if not before:
        assert not y.any()
        return
    assert math.ldexp(found, exponent) == pytest.approx(rms * math.sqrt(x.numel()), rel=rounding(x.dtype))


@HOSTS
@pytest.mark.parametrize("x", [1e-7, 1.0, 3e4])
def test_a_limit_beyond_all_norms_changes_nothing(host: set[str], x: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HOST", host)
    for dtype in (torch.float16, torch.float32, torch.float64):
        y = torch.full((3,), x, dtype=dtype)
        before = y.clone()
        scale_to_norms_([y], [y], [sys.float_info.max], at_most=True)
        assert torch.equal(y, before)


@pytest.mark.fuzz
@HOSTS
@given(x=tensors(), relative=some.sampled_from([0.5, 0.999, 1.001, 2.0]))
def test_a_tensor_is_shrunk_to_a_norm_or_left_as_it_is(host: set[str], x: Tensor, relative: float) -> None:
    before, exponent = norm_and_exponent(x)
    limits = torch.finfo(x.dtype)
    try:
        wanted = math.ldexp(before * relative, exponent)
    except OverflowError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "HOST", host)
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
        if wanted:
            scale_to_norms_([y], [x], [wanted], at_most=True)
    if relative > 1.0 or not wanted:
        assert torch.equal(x, y)
    elif wanted > 1e3 * limits.tiny * math.sqrt(x.numel()):  # below, numbers have few digits
        found, exponent = norm_and_exponent(y)
        assert math.ldexp(found, exponent) == pytest.approx(wanted, rel=rounding(x.dtype))


@pytest.mark.fuzz
@HOSTS
@given(exponent=some.integers(-100, 100), seed=some.integers(0, 2**16), dtype=some.sampled_from(DTYPES[2:]))
def test_a_power_of_two_changes_no_bit(host: set[str], exponent: int, seed: int, dtype: torch.dtype) -> None:
    x = torch.randn(40, 30, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    both = [x.clone(), x * 2.0**exponent]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "HOST", host)
        for one in both:
            scale_to_norms_([one], [x], [0.2])
    assert_bitwise(both[1], both[0])


@HOSTS
@pytest.mark.parametrize("draw", [torch.randn, torch.ones], ids=["random", "equal"])
def test_ten_million_numbers_are_brought_to_scale(monkeypatch: pytest.MonkeyPatch, host: set[str], draw: Any) -> None:
    """Of equal numbers all roundings of a sum have one sign; the fewer a processor adds at once, the more there are."""
    monkeypatch.setattr(memory, "HOST", host)
    x = draw(10**7) * 0.3
    scale_to_norms_([x], [x], [0.2 * math.sqrt(x.numel())])
    assert x.double().square().mean().sqrt().item() == pytest.approx(0.2, rel=5e-5 if draw is torch.ones else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_halves_are_measured_as_their_copies_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    assert root_mean_squares([x]) == root_mean_squares([x.float()])


def test_a_factor_that_is_no_normal_number_keeps_its_digits() -> None:
    x = torch.tensor([1e18, -2e18])
    scale_to_norms_([x], [x], [1e-22 * math.sqrt(5.0)])
    torch.testing.assert_close(x, torch.tensor([1e-22, -2e-22]), rtol=1e-6, atol=0)


# ── kl_clip ──


@HOSTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("scale", [1e20, 1e-20, 1e-30, 1e37, 1.0, 1e160, 1e-150])
def test_kl_clip_is_right_for_products_of_any_size(
    monkeypatch: pytest.MonkeyPatch, host: set[str], dtype: torch.dtype, scale: float
) -> None:
    monkeypatch.setattr(memory, "HOST", host)
    if not 1e-40 < scale < 1e38 and dtype != torch.float64:
        pytest.skip("no numbers of this dtype")
    lr = 1e-20 if scale == 1e160 else 1.0  # so that kl_clip is a number though products are not
    kl_clip, weights = 0.25 * (lr * scale) ** 2, [nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2)]
    if not 0 < kl_clip < math.inf:
        pytest.skip("no number is so large")
    for p, own in zip(weights, ([1.0, -2.0, 0.5], [0.25, 0.0, 1.0]), strict=True):
        p.grad = (torch.tensor(own, dtype=torch.float64) * scale).to(dtype)
    Thor(weights, lr=lr, match_rms=None, kl_clip=kl_clip, momentum=0.0, preconditioner=Identity()).step()
    products = 1.0 + 4.0 + 0.25 + 0.0625 + 1.0
    shrink = math.sqrt(0.25 / products)
    for p in weights:
        torch.testing.assert_close(p.detach() / scale / lr, -p.grad / scale * shrink, rtol=1e-6, atol=0)


@HOSTS
def test_kl_clip_without_a_learning_rate_changes_nothing(monkeypatch: pytest.MonkeyPatch, host: set[str]) -> None:
    monkeypatch.setattr(memory, "HOST", host)
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    weights[0].grad, weights[1].grad = torch.full((3,), 1e20), torch.ones(3)
    Thor(weights, lr=0.0, match_rms=None, kl_clip=1e-3, preconditioner=Identity()).step()
    assert all(torch.equal(p.detach(), torch.ones(3)) for p in weights)
