"""Laws of meshes: with replicas, shards and tensor parallelism a model trains as on one process."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.communication.memory import held
from lightning_thor import Curvature
from lightning_thor.distributed.dtensor import boxes_of
from tests.helpers import mesh_strategies
from tests.helpers.boring import assert_bitwise
from tests.helpers.marks import marked
from tests.helpers.mesh_strategies import LEGS, TRIALS, legs, unbroken
from tests.helpers.mesh_workers import IN_BFLOAT16, LONG, PLAIN, TRAININGS, Case, Text, train, trained


@functools.lru_cache
def alone(case: Case) -> dict[str, Any]:
    """On one process, with the batches of all."""
    return train(case._replace(shape=(1, 1, 1), sequence=False, begins_over=None))


@pytest.mark.parametrize("name", marked(TRAININGS, LONG, PLAIN))
def test_a_training_over_a_mesh_is_that_of_one_process(name: str) -> None:
    """Weights, momentum or moments, factors and what is stored of them; replicas are equal bitwise."""
    found, expected = trained(name), alone(TRAININGS[name])
    mode, policy = TRAININGS[name].mode, TRAININGS[name].policy
    in_bfloat16 = policy in IN_BFLOAT16
    # Beside one process that trains in float32, or in bfloat16 too (docs/scaling.md states these bounds).
    apart = {"natural": 0.001, "polar": 0.006, "adam": 0.05}[mode]
    rtol, atol = (0.0, apart) if in_bfloat16 else (1e-9, 1e-9)
    for result in found:
        for part in ("weights",) if in_bfloat16 else ("weights", "state", "curvature"):
            torch.testing.assert_close(result[part], expected[part], rtol=rtol, atol=atol)
        for part in ("weights", "curvature"):
            assert_bitwise(result[part], found[0][part])


@pytest.mark.parametrize(("name", "travels"), [("tp_adam", False), ("tp_on_borders", True)])
def test_observing_sends_nothing_where_the_borders_of_blocks_are_those_of_shards(name: str, travels: bool) -> None:
    """Every second step observes; the model's own messages are the same in each."""
    for result in trained(name):
        observed, plain = result["n_of_model"][::2], result["n_of_model"][1::2]
        assert len({*plain}) == 1
        assert [one > plain[0] for one in observed] == [travels, travels]


def test_a_step_sends_what_a_block_on_two_ranks_needs_and_nothing_else() -> None:
    """Replicas of two ranks hold whole blocks, in adam mode of all layers."""
    for result in trained("tp_adam"):
        assert [[op for op, _ in calls] for calls in result["sent"]] == [
            ["all_gather", "all_reduce", "all_gather"], [], ["all_reduce", "all_gather"], [],
        ]  # fmt: skip


@pytest.mark.slow
def test_experts_stay_on_the_rank_that_holds_them() -> None:
    """Nothing else of this model has one block."""
    for result in trained("fsdp_experts_polar"):
        assert not any(op == "all_to_all" for calls in result["sent"] for op, _ in calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("fsdp_natural", "hsdp_polar", "tp_natural", "tp_fsdp_natural"),
        *("two_workers_of_two", "two_workers", "fsdp_workers_adam", "hsdp_workers_polar", "tp_fsdp_workers_natural"),
    ],
)
def test_ranks_hold_the_bytes_that_the_benchmark_counts(name: str) -> None:
    """To a twentieth: it takes vectors as whole under tensor parallelism, which shards some."""
    case = TRAININGS[name]
    curvature = Curvature(Text(case.hidden).double(), mode=case.mode, block_size=4)
    n_rows = case.n_ranks // (case.inverse_workers or case.n_ranks)
    counted = held(curvature, shards=case.shape[1], width=case.shape[2], n_rows=n_rows)
    largest = {key: max(result["bytes"][key] for result in trained(name)) for key in ("weights", "momentum")}
    momentum = 0 if case.mode == "adam" else counted.weights
    assert largest == pytest.approx({"weights": counted.weights, "momentum": momentum}, rel=0.05)
    of_curvature = [result["bytes"]["curvature"] for result in trained(name)]
    assert max(of_curvature) == counted.curvature
    # Each layer's inverses are on so many ranks.
    whole = held(curvature).curvature
    n_missing = case.n_ranks - (case.inverse_workers or case.n_ranks)
    assert sum(whole - one for one in of_curvature) == n_missing * whole / 3
    assert trained("fsdp_natural")[0]["bytes"]["weights"] < 0.3 * alone(Case())["bytes"]["weights"]


# ── under a Trainer, from checkpoint to checkpoint ──


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_a_trial_of_block_sizes_leaves_no_trace_over_any_mesh(tmp_path: Path, name: str) -> None:
    (found,) = legs(name)
    (size,) = {result["block_size"] for result in found}
    expected = unbroken(tmp_path, name, size)
    for result in found:
        for part in ("weights", "moments", "curvature"):
            torch.testing.assert_close(result[part], expected[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", marked(LEGS, mesh_strategies.LONG))
def test_a_training_that_moves_to_another_mesh_after_each_epoch_is_the_unbroken_one(tmp_path: Path, name: str) -> None:
    """One device, DDP, shards, replicas and tensor parallelism, with groups that are not in the model's order."""
    found, expected = legs(name), unbroken(tmp_path, name)
    assert [step for ranks in found for step in ranks[0]["steps"]] == expected["steps"]
    for result in found[-1]:
        for part in ("weights", "moments", "curvature"):
            torch.testing.assert_close(result[part], expected[part], rtol=1e-9, atol=1e-9)


# ── where shards are ──


@pytest.fixture
def eight_processes() -> Iterator[int]:
    """Of which this is one, and the others are not there."""
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    yield 5
    dist.destroy_process_group()


def test_boxes_are_where_fsdp_and_tensor_parallelism_put_the_shards(eight_processes: int) -> None:
    """Of widths that the ranks do not divide: this rank's by torch's own account, and all together the whole."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    for replicas, plan in itertools.product((1, 2), (None, ColwiseParallel, RowwiseParallel)):
        model = nn.Sequential(nn.Linear(10, 18))
        if plan is not None:
            parallelize_module(model, mesh["tensor"], {"0": plan()})
        fully_shard(model, mesh=mesh["replicate", "shard"] if replicas > 1 else mesh["shard"])
        weight: Any = model[0].weight
        boxes = boxes_of(weight)
        assert len(boxes) == (4 if plan else 2)
        shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        assert [(side.start, side.stop) for side in boxes[eight_processes]] == [
            (start, start + n) for start, n in zip(offset, shape, strict=True)
        ]
        assert sum(box.area for box in boxes.values()) == 180
        assert all(one.overlap(other) is None for one, other in itertools.combinations(boxes.values(), 2))


def test_a_replicated_tensor_is_whole_on_each_rank(eight_processes: int) -> None:
    mesh, tensor = init_device_mesh("cpu", (8,)), torch.zeros(4, 6)
    for one in (tensor, distribute_tensor(tensor, mesh, [Replicate()])):
        assert {rank: box.area for rank, box in boxes_of(one).items()} == {eight_processes: 24}
    assert [box.area for box in boxes_of(distribute_tensor(tensor, mesh, [Shard(1)])).values()] == [4] * 6 + [0] * 2


def test_a_scalar_is_one_row_and_one_column_on_each_rank(eight_processes: int) -> None:
    mesh, scalar = init_device_mesh("cpu", (8,)), torch.tensor(3.0)
    for one in (scalar, distribute_tensor(scalar, mesh, [Replicate()])):
        assert {rank: box.area for rank, box in boxes_of(one).items()} == {eight_processes: 1}
    assert torch.equal(boxes_of(scalar)[eight_processes].of(scalar), scalar)
