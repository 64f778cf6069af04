"""Laws of what is stored per block: exact where it succeeds, and a mask where it fails."""

from __future__ import annotations

import math
from threading import Event, Thread
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_thor.factors.state import FactorState
from lightning_thor.linalg.block_diagonal import BlockPartition
from lightning_thor.linalg.decompositions import damped_inverse_roots, damped_inverses, eigenvectors
from lightning_thor.preconditioning.modes import MODES
from tests.helpers.boring import assert_bitwise


@pytest.mark.parametrize("size", [1, 2, 17, 33, 100, 128])
def test_inverse_times_damped_block_is_the_identity_and_a_root_is_one_of_the_inverse(size: int) -> None:
    rows = torch.randn(5, size, 3, dtype=torch.float64)
    damping = torch.tensor([0.1, 1.0, 10.0, 0.5, 2.0], dtype=torch.float64)
    inverses, succeeded = damped_inverses(rows @ rows.mT, damping)
    assert succeeded.all()
    identity = torch.eye(size, dtype=torch.float64)
    damped = rows @ rows.mT + damping[:, None, None] * identity
    torch.testing.assert_close(inverses @ damped, identity.expand(5, size, size))
    assert_bitwise(inverses, inverses.mT)
    roots, succeeded = damped_inverse_roots(rows @ rows.mT, damping)
    assert succeeded.all()
    torch.testing.assert_close(roots.mT @ roots, inverses)


@pytest.mark.parametrize("size", [2, 33, 100, 128, 129])
def test_inverses_are_symmetric_to_the_last_bit_in_float32_too(size: int) -> None:
    rows = torch.randn(5, size, 3)
    inverses, succeeded = damped_inverses(rows @ rows.mT, torch.full((5,), 0.1))
    assert succeeded.all()
    assert_bitwise(inverses, inverses.mT)


@pytest.mark.parametrize("damping", [1e-4, 1e-5])
def test_a_float32_inverse_is_as_exact_as_the_condition_allows(damping: float) -> None:
    """The condition number times the unit roundoff: rounding the entries of the block alone may change its inverse by
    as much. It is 0.4 to 0.45 times that, and LAPACK's error a third of ours or a half, by the processor."""
    orthogonal, _ = torch.linalg.qr(torch.randn(8, 128, 128, dtype=torch.float64))
    blocks = ((orthogonal * torch.logspace(-9, 0, 128, dtype=torch.float64)) @ orthogonal.mT).float()
    damped = (blocks + damping * torch.eye(128)).double()
    inverses, succeeded = damped_inverses(blocks, torch.full((8,), damping))
    exact = torch.linalg.inv(damped)
    error = (inverses - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert succeeded.all()
    unit_roundoff = torch.finfo(torch.float32).eps / 2
    assert (error < unit_roundoff * torch.linalg.cond(damped)).all()


@pytest.mark.parametrize("invert", [damped_inverses, damped_inverse_roots])
@pytest.mark.parametrize("newer", [False, True], ids=["set_float32_matmul_precision", "fp32_precision"])
def test_inverses_are_of_full_precision_where_the_program_allows_less(invert: Any, newer: bool) -> None:
    """Products in TF32 would make Schur complements indefinite. What was chosen is chosen again afterwards."""
    matmul, seen = torch.backends.cuda.matmul, set()
    if newer and not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch 2.9 or newer")

    def allows_less() -> bool:
        return matmul.fp32_precision == "tf32" if newer else torch.get_float32_matmul_precision() != "highest"

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "bmm" in func.overloadpacket.__name__:
                seen.add(allows_less())
            return func(*args, **(kwargs or {}))

    try:
        if newer:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        with Watch():
            invert(torch.eye(64).repeat(2, 1, 1), torch.ones(2))
        assert allows_less()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {False}


@pytest.mark.parametrize("newer", [False, True], ids=["set_float32_matmul_precision", "fp32_precision"])
def test_the_precision_stays_full_until_the_last_of_several_threads_has_inverted(newer: bool) -> None:
    """Two fits in one process; the setting is the process's."""
    matmul = torch.backends.cuda.matmul
    if newer and not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch 2.9 or newer")

    def precision() -> str:
        return matmul.fp32_precision if newer else torch.get_float32_matmul_precision()

    seen, first_is_within, first_may_go = [], Event(), Event()

    class WaitWithin(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "bmm" in func.overloadpacket.__name__:
                first_is_within.set()
                first_may_go.wait(60)
            return func(*args, **(kwargs or {}))

    class LetFirstGo(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "bmm" in func.overloadpacket.__name__:
                first_may_go.set()
                first.join()
                seen.append(precision())
            return func(*args, **(kwargs or {}))

    def invert_within(mode: TorchDispatchMode) -> None:
        with mode:
            damped_inverses(torch.eye(64).repeat(2, 1, 1), torch.ones(2))

    first = Thread(target=lambda: invert_within(WaitWithin()))
    try:
        if newer:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        chosen = precision()
        first.start()
        assert first_is_within.wait(60)
        invert_within(LetFirstGo())
        assert precision() == chosen
    finally:
        first_may_go.set()
        torch.set_float32_matmul_precision("highest")
    assert {*seen} == {"ieee" if newer else "highest"}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_singular_block_has_an_inverse_however_small_the_damping(scale: float) -> None:
    rows = torch.randn(4, 64, 1) * scale**0.5
    inverses, succeeded = damped_inverses(rows @ rows.mT, torch.full((4,), 1e-30))
    assert succeeded.all()
    assert torch.isfinite(inverses).all()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("make", "expected", "bad"),
    [
        (damped_inverses, 0.5, [math.nan, math.inf, -5.0]),
        (damped_inverse_roots, 0.5**0.5, [math.nan, math.inf, -5.0]),
        (eigenvectors, 1.0, [math.nan, math.inf]),
    ],
)
def test_a_bad_block_is_reported_and_hurts_no_other(make: Any, expected: float, bad: list[float], size: int) -> None:
    for entry in bad:
        blocks = torch.eye(size).repeat(3, 1, 1)
        blocks[1, 0, 0] = entry
        results, succeeded = make(blocks, torch.ones(3))
        assert succeeded.tolist() == [True, False, True]
        torch.testing.assert_close(results[::2], expected * torch.eye(size).repeat(2, 1, 1))


def test_a_block_of_zeros_without_damping_is_reported() -> None:
    for size in (1, 3):
        _, succeeded = damped_inverses(torch.zeros(1, size, size), torch.zeros(1))
        assert not succeeded.any()


@pytest.mark.parametrize("make", [damped_inverses, damped_inverse_roots, eigenvectors])
@given(
    exponents=st.lists(st.floats(-45, 38), min_size=3, max_size=3),
    damping=st.sampled_from([0.0, 1e-45, 1e-30, 1.0, 1e38, math.inf, math.nan]),
    size=st.sampled_from([1, 2, 5, 40]),
    bad=st.sampled_from([None, math.inf, -math.inf, math.nan, -1.0]),
)
def test_what_succeeds_is_finite_whatever_the_block(
    make: Any, exponents: list[float], damping: float, size: int, bad: float | None
) -> None:
    """Also denormal, mixed and indefinite ones, and ones that are not finite."""
    scale = torch.tensor(10.0, dtype=torch.float64) ** torch.tensor(exponents).repeat(-(-size // 3))[:size]
    x = torch.randn(1, size, 4) * scale.sqrt().float()[:, None]
    block = x @ x.mT
    if bad is not None:
        block[0, 0, 0] = bad
    result, succeeded = make(block, torch.tensor([damping]))
    assert not succeeded or bool(torch.isfinite(result).all())


@pytest.mark.parametrize("mode", list(MODES))
@given(exponent=st.floats(-45, 38), others=st.floats(-45, 38))
def test_what_is_stored_of_a_block_is_finite_whatever_the_factor(mode: str, exponent: float, others: float) -> None:
    """Where it was never inverted too: its mean eigenvalue has an inverse, or it counts as one that says nothing."""
    decomposition, cpu = MODES[mode].decomposition, torch.device("cpu")
    shapes = [(BlockPartition(1, 4, 1, 4), BlockPartition(1, 6, 2, 3))]
    state = FactorState(shapes, torch.float32, cpu, decomposition=decomposition)
    for factor, power in (("A", exponent), ("G", others)):
        blocks = state.blocks(0, factor, "average")
        x = torch.randn_like(blocks)
        blocks.copy_((x @ x.mT * 10.0**power).nan_to_num(posinf=3e38))
        # Indefinite: not to be inverted.
        blocks[0, 0, 0, 0] = -blocks[0, 0, 0, 0].abs()
    state.updates.fill_(1.0)
    solve = lambda problems: {n: decomposition.make(*one) for n, one in problems.items()}  # noqa: E731
    state.invert(state.layout.index((0,)), "trace", 0.2, solve)
    for batch in state.batches.values():
        assert bool(torch.isfinite(batch.inverse).all())


# ── eigenvectors ──


def covariances(n: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(n, size, 3 * size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    return x @ x.mT


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_they_are_orthonormal_and_make_a_block_diagonal(size: int, scale: float) -> None:
    blocks = covariances(3, size) * scale
    Q, succeeded = eigenvectors(blocks, torch.zeros(3))
    assert succeeded.all()
    torch.testing.assert_close(Q.mT @ Q, torch.eye(size, dtype=Q.dtype).expand(3, -1, -1))
    diagonal = Q.mT @ blocks @ Q
    values = diagonal.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, values.diag_embed(), rtol=0, atol=1e-12 * scale * size**2)
    assert (values.diff() >= 0).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_what_was_never_seen_and_padding_stay_apart_at_the_end(rank: int) -> None:
    """However many eigenvalues besides are zero too, of which eigenvectors could be mixed with them."""
    x = torch.randn(8, rank, dtype=torch.float64)
    x[[2, 6, 7]] = 0.0
    Q, _ = eigenvectors((x @ x.T)[None], torch.zeros(1))
    expected = torch.zeros(8, 3, dtype=torch.float64)
    expected[[2, 6, 7], [0, 1, 2]] = 1.0
    torch.testing.assert_close(Q[0, :, -3:].abs(), expected, rtol=0, atol=1e-12)
    assert not Q[0, 6:, :-2].any()


def test_where_lapack_gives_up_all_of_them_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    assert not eigenvectors(covariances(2, 4), torch.zeros(2))[1].any()
