"""Laws of directions that several processes compute together: they are those that one process computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.communication import sharded_updates
from lightning_thor import Curvature, register_layer
from lightning_thor.distributed.dtensor import Box, Boxes, whole_box
from lightning_thor.fsdp import sharded_curvature
from lightning_thor.fsdp.box_partition import Part, Transfer, assign_parts, transfers_of
from lightning_thor.fsdp.sharded_curvature import ShardedCurvature, layer_blocks_of_layers
from lightning_thor.layers import registry
from tests.helpers.boring import assert_bitwise
from tests.helpers.fakes import FakeCommunicator, Place, on_ranks
from tests.helpers.launching import fork
from tests.helpers.sharded_workers import fully_shard
from tests.helpers.watch import Watch


class Everything(nn.Module):
    """Each kind of layer, with widths that few numbers of processes divide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.norm = nn.LayerNorm((5, 12))
        self.fused = nn.Linear(12, 30)
        self.scale = nn.RMSNorm(30)
        self.convolution = nn.Conv1d(30, 14, 3, groups=2, padding=1)
        self.transposed = nn.ConvTranspose1d(14, 10, 3, groups=2, padding=1)
        self.recurrent = nn.GRU(10, 3, batch_first=True)
        self.head = nn.Linear(3, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.table(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.scale(self.fused(x)).mT
        x = self.transposed(F.relu(self.convolution(x))).mT
        return self.head(self.recurrent(x)[0])


def curvature_of(
    mode: str, block_size: int | None = 4, precondition_bias: bool = False, model: nn.Module | None = None
) -> Curvature:
    """Of `Everything`, in float64, after two refreshes; gradients are those of the last one."""
    torch.manual_seed(2)
    model = model or Everything()
    curvature = Curvature(
        model.double(), mode=mode, block_size=block_size, precondition_bias=precondition_bias, update_every_n_steps=1
    )
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(torch.randint(11, (8, 5))).flatten(0, 1), torch.randint(13, (40,))).backward()
        curvature.update()
    return curvature


def shards_of(tensor: Tensor, n: int) -> list[Tensor]:
    """As FSDP2 cuts: the last of them may have fewer rows, or none."""
    parts = list(tensor.chunk(n))
    return parts + [tensor[:0]] * (n - len(parts))


def boxes_of_rows(p: nn.Parameter, n: int) -> Boxes:
    return sharded_updates.row_shards(p.shape[0], n, p.shape[1] if p.dim() > 1 else 1)


def directions_of(
    preconditioner: Curvature | ShardedCurvature, tensors: dict[nn.Parameter, Tensor], mode: str
) -> dict[nn.Parameter, Tensor]:
    return {p: direction for part in preconditioner.directions(tensors, mode) for p, direction in part.items()}


def directions_together(
    curvature: Curvature, grads: dict[nn.Parameter, Tensor], n: int, is_polar: bool = False
) -> tuple[list[dict[nn.Parameter, Tensor]], list[list[int]]]:
    """The directions on each rank, twice (the second time by a plan that is there), and how many numbers it sent."""

    def work(place: Place) -> tuple[dict[nn.Parameter, Tensor], list[int]]:
        own = {p: shards_of(grad, n)[place.rank] for p, grad in grads.items()}
        sharded = ShardedCurvature(curvature, place.world, lambda p: boxes_of_rows(p, n))
        found = [directions_of(sharded, own, "polar" if is_polar else "natural") for _ in range(2)]
        assert {op for op, _ in place.world.log} <= {"all_to_all"}
        return found[1], [numel for _, numel in place.world.log]

    found, sent = zip(*on_ranks(n, None, work), strict=True)
    return list(found), list(sent)


def assert_the_same(together: list[dict[nn.Parameter, Tensor]], alone: dict[nn.Parameter, Tensor]) -> None:
    for p, direction in alone.items():
        parts = [found[p] for found in together]
        assert [part.shape for part in parts] == [part.shape for part in shards_of(direction, len(parts))]
        torch.testing.assert_close(torch.cat(parts), direction, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("mode", ["natural", "polar"])
@pytest.mark.parametrize(("block_size", "precondition_bias"), [(4, False), (5, True), (None, True)])
def test_the_directions_of_all_kinds_of_layers_are_those_of_one_process(
    mode: str, n: int, block_size: int | None, precondition_bias: bool
) -> None:
    curvature = curvature_of(mode, block_size, precondition_bias)
    grads = {p: p.grad.clone() for p in curvature.model.parameters() if p.grad is not None}
    before = {p: grad.clone() for p, grad in grads.items()}
    assert_the_same(directions_together(curvature, grads, n)[0], curvature.precondition(grads))
    if mode == "polar":
        found, _ = directions_together(curvature, grads, n, is_polar=True)
        assert_the_same(found, directions_of(curvature, grads, "polar"))
    for p, grad in grads.items():
        assert torch.equal(grad, before[p])


def grid_boxes(p: nn.Parameter) -> Boxes:
    """Of matrices the boxes of two rows and two columns of ranks; of other parameters rows, over four."""
    if p.dim() != 2:
        return boxes_of_rows(p, 4)
    rows, columns = (sharded_updates.row_shards(n, 2) for n in p.shape)
    return {2 * i + j: Box(rows[i].rows, columns[j].rows) for i in range(2) for j in range(2)}


@pytest.mark.parametrize(("mode", "block_size"), [("natural", 4), ("natural", 5), ("natural", None), ("polar", 4)])
def test_directions_of_weights_that_are_cut_along_columns_too_are_those_of_one_process(
    mode: str, block_size: int | None
) -> None:
    curvature = curvature_of(mode, block_size)
    grads = {p: p.grad.clone() for p in curvature.model.parameters() if p.grad is not None}

    def work(place: Place) -> dict[nn.Parameter, Tensor]:
        own = {p: grid_boxes(p)[place.rank].of(grad) for p, grad in grads.items()}
        return directions_of(ShardedCurvature(curvature, place.world, grid_boxes), own, mode)

    alone = directions_of(curvature, grads, mode)
    for rank, found in enumerate(on_ranks(4, None, work)):
        for p, direction in alone.items():
            torch.testing.assert_close(found[p], grid_boxes(p)[rank].of(direction), rtol=1e-10, atol=1e-10)


def test_a_scalar_takes_its_plain_gradient() -> None:
    """As a temperature beside layers that tensor parallelism shares out."""
    model = nn.Linear(6, 4)
    model.temperature = nn.Parameter(torch.tensor(2.0))
    curvature = Curvature(model)
    grads = {p: torch.randn_like(p) for p in model.parameters()}
    assert_bitwise(ShardedCurvature(curvature).precondition(grads), curvature.precondition(grads))


def test_columns_travel_only_where_a_block_lies_on_two_processes() -> None:
    curvature = Curvature(nn.Linear(16, 16, bias=False), block_size=4)
    grads = {p: torch.randn_like(p) for p in curvature.model.parameters()}

    def work(place: Place) -> list[Any]:
        own = {p: grid_boxes(p)[place.rank].of(grad) for p, grad in grads.items()}
        ShardedCurvature(curvature, place.world, grid_boxes).precondition(own)
        return place.world.log

    assert on_ranks(4, None, work) == [[]] * 4


def test_a_bias_in_A_that_is_on_other_ranks_than_its_weight_is_refused() -> None:
    curvature = curvature_of("natural", precondition_bias=True, model=Everything())
    grads = {p: p.grad for p in curvature.model.parameters() if p.grad is not None}
    sharded = ShardedCurvature(
        curvature, FakeCommunicator(2), lambda p: {0: whole_box(p)} if p.dim() == 1 else boxes_of_rows(p, 2)
    )
    with pytest.raises(ValueError, match=r"its bias are on different ranks.*precondition_bias=False"):
        sharded.precondition(grads)


@pytest.mark.parametrize("n", [1, 3, 16])
@pytest.mark.parametrize(("block_size", "precondition_bias"), [(4, False), (5, True)])
def test_shards_change_to_the_eigenbasis_and_back_as_one_process_does(
    n: int, block_size: int | None, precondition_bias: bool
) -> None:
    curvature = curvature_of("adam", block_size, precondition_bias)
    grads = {p: p.grad.clone() for p in curvature.model.parameters() if p.grad is not None}

    def work(place: Place) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, Tensor]]:
        sharded = ShardedCurvature(curvature, place.world, lambda p: boxes_of_rows(p, n))
        rotated = sharded.change_basis({p: shards_of(grad, n)[place.rank] for p, grad in grads.items()})
        return rotated, sharded.change_basis(rotated, back=True)

    there, back = zip(*on_ranks(n, None, work), strict=True)
    assert_the_same(list(there), curvature.change_basis(grads))
    assert_the_same(list(back), grads)


@pytest.mark.parametrize("n", [2, 3, 16])
@pytest.mark.parametrize("mode", ["natural", "polar"])
def test_what_travels_is_what_the_benchmark_counts(mode: str, n: int) -> None:
    curvature = curvature_of(mode)
    grads = {p: p.grad for p in curvature.model.parameters() if p.grad is not None}
    _, numels = directions_together(curvature, grads, n, is_polar=mode == "polar")
    sent = [sum(own) * 8 / 2 for own in numels]  # of float64, twice
    counted = sharded_updates.counted(curvature, n)
    assert (sum(sent) / n, max(sent)) == pytest.approx((counted["sent"], counted["busiest"]))


def test_nothing_travels_where_no_block_lies_on_two_processes() -> None:
    model = nn.Sequential(nn.Embedding(8, 6), nn.LayerNorm(6), nn.Linear(6, 16), nn.Linear(16, 8))
    curvature = Curvature(model, block_size=4)
    grads = {p: torch.randn_like(p) for p in model.parameters()}
    assert directions_together(curvature, grads, 2)[1] == [[], []]
    # Of 8 rows each has 2, and a block has 4.
    assert {len(sent) for sent in directions_together(curvature, grads, 4)[1]} == {4}


def ends(side: slice) -> tuple[int, int]:
    return side.start, side.stop


def parts_of(curvature: Curvature, n: int, is_polar: bool = False) -> list[Part]:
    boxes = {p: boxes_of_rows(p, n) for p in curvature.model.parameters()}
    return assign_parts(layer_blocks_of_layers(curvature, boxes, is_polar=is_polar), boxes)


def transfers(parts: list[Part], n: int) -> list[Transfer]:
    return transfers_of(parts, {p: boxes_of_rows(p, n) for one in parts for p in one.layer_blocks.layer.parameters})


def test_neighbouring_blocks_of_one_process_are_one_range() -> None:
    parts = parts_of(Curvature(nn.Linear(3, 12, bias=False), block_size=3), 3)
    assert [(*ends(one.box.rows), one.owner) for one in parts] == [(0, 3, 0), (3, 9, 1), (9, 12, 2)]


def test_planning_looks_at_few_shards_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at all of them, which for a GPT-2 on 1,024 ranks takes minutes."""
    overlap, n_looks = Box.overlap, [0]

    def counted(one: Box, other: Box) -> Box | None:
        n_looks[0] += 1
        return overlap(one, other)

    monkeypatch.setattr(Box, "overlap", counted)
    for n in (32, 128):
        n_looks[0] = 0
        parts = parts_of(Curvature(nn.Linear(4, 512, bias=False), block_size=4), n)
        assert len(transfers(parts, n)) == len(parts) == n
        assert n_looks[0] == 2 * n


def test_the_rows_of_a_block_go_to_whoever_holds_most_of_them() -> None:
    model = nn.Linear(3, 12, bias=False)  # shards of 4, 4 and 4 rows; blocks of 0 to 6 and of 6 to 12
    parts = parts_of(Curvature(model, block_size=6), 3)
    assert [(*ends(one.box.rows), one.owner) for one in parts] == [(0, 6, 0), (6, 12, 2)]
    assert [(one.in_shard.rows, one.in_part.rows, one.holder, one.owner) for one in transfers(parts, 3)] == [
        (slice(0, 4), slice(0, 4), 0, 0),
        (slice(0, 2), slice(4, 6), 1, 0),
        (slice(2, 4), slice(0, 2), 1, 2),
        (slice(0, 4), slice(2, 6), 2, 2),
    ]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 16])
def test_only_rows_of_blocks_that_lie_on_two_processes_travel(n: int) -> None:
    parts = parts_of(curvature_of("natural", block_size=3), n)
    layer_blocks_of = {placeholder: one.layer_blocks for one in parts for placeholder in one.layer.parameters}
    for one in transfers(parts, n):
        layer_blocks, held = layer_blocks_of[one.placeholder], -(-one.parameter.shape[0] // n)
        size, (first, last) = (
            layer_blocks.rows_per_block,
            ends(layer_blocks.in_parameter(layer_blocks.whole, one.parameter).rows),
        )
        block = (one.holder * held + one.in_shard.rows.start - first) // size * size + first
        straddles = block // held != (min(block + size, last) - 1) // held
        assert one.holder == one.owner or straddles


def test_a_block_that_lies_on_two_processes_alike_goes_to_the_one_that_has_less_to_do() -> None:
    curvature = Curvature(nn.Sequential(*(nn.Linear(3, 8, bias=False) for _ in range(4))), block_size=8)
    assert [one.owner for one in parts_of(curvature, 2)] == [0, 1, 0, 1]


def test_polar_layers_are_shared_out_whole_by_their_work() -> None:
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for width in (64, 32, 32, 32, 8)))
    curvature = Curvature(model, mode="polar", block_size=8)
    parts = parts_of(curvature, 2, is_polar=True)
    owners = {one.layer_blocks.layer.name: one.owner for one in parts if one.layer_blocks.side is None}
    assert set(owners) == {"0", "1", "2", "3"}
    assert owners["0"] not in {owners["1"], owners["2"], owners["3"]}


@pytest.mark.parametrize("mode", ["natural", "polar"])
def test_rows_of_several_dtypes_keep_theirs(mode: str) -> None:
    curvature, is_polar = curvature_of(mode), mode == "polar"
    dtypes = [torch.float32, torch.float64]
    grads = {p: p.grad.to(dtypes[len(p) % 4 // 2]) for p in curvature.model.parameters()}
    alone = directions_of(curvature, grads, mode)
    together, _ = directions_together(curvature, grads, 3, is_polar)
    for p, direction in alone.items():
        assert {found[p].dtype for found in together} == {direction.dtype} == {grads[p].dtype}
        torch.testing.assert_close(torch.cat([found[p] for found in together]), direction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["natural", "polar"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_send_messages_of_one_dtype_also_those_who_have_nothing_to_send(mode: str, dtype: torch.dtype) -> None:
    curvature = curvature_of(mode)
    grads = {p: p.grad.to(dtype) for p in curvature.model.parameters() if p.grad is not None}

    def work(place: Place) -> list[torch.dtype]:
        own = {p: shards_of(grad, 16)[place.rank] for p, grad in grads.items()}
        sharded = ShardedCurvature(curvature, place.world, lambda p: boxes_of_rows(p, 16))
        assert {direction.dtype for direction in directions_of(sharded, own, mode).values()} == {torch.float32}
        return place.world.dtypes

    expected = torch.float32 if dtype == torch.float16 else dtype
    assert on_ranks(16, None, work) == [[expected] * 2] * 16


@pytest.mark.parametrize("precondition_bias", [False, True])
def test_a_weight_that_lies_the_other_way_round_is_cut_unless_its_bias_crosses_it(precondition_bias: bool) -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(10, 7)), nn.Parameter(torch.zeros(7))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    curvature = Curvature(
        (model := Conv1D().double()), block_size=4, precondition_bias=precondition_bias, update_every_n_steps=1
    )
    model(torch.randn(30, 10).double()).pow(3).mean().backward()
    curvature.update()
    grads = {p: p.grad for p in model.parameters() if p.grad is not None}
    assert_the_same(directions_together(curvature, grads, 3)[0], curvature.precondition(grads))
    assert len(parts_of(curvature, 3)) == (1 if precondition_bias else 3)


def test_polar_directions_of_a_natural_curvature_are_refused() -> None:
    with pytest.raises(RuntimeError, match='got a curvature of mode="natural"'):
        ShardedCurvature(curvature_of("natural")).directions({}, "polar")


def test_a_registered_layer_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTERED", {})

    class Columns(nn.Linear):
        """Its rows are the same as a linear layer's; nobody knows where they may be cut."""

    register_layer(
        Columns, lambda module, a, g: (a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])),
        matrix=lambda module, weight: weight,
    )  # fmt: skip
    curvature = Curvature(Columns(3, 10, bias=False).double(), block_size=2)
    grads = {p: torch.randn_like(p) for p in curvature.model.parameters()}
    assert_the_same(directions_together(curvature, grads, 3)[0], curvature.precondition(grads))
    (whole,) = parts_of(curvature, 3)
    assert ends(whole.box.rows) == (0, 10)


def test_a_layer_that_is_left_out_later_takes_its_plain_gradient() -> None:
    curvature = curvature_of("natural")
    grads = {p: p.grad.clone() for p in curvature.model.parameters() if p.grad is not None}

    def work(place: Place) -> list[dict[nn.Parameter, Tensor]]:
        own = {p: shards_of(grad, 2)[place.rank] for p, grad in grads.items()}
        sharded, found = ShardedCurvature(curvature, place.world, lambda p: boxes_of_rows(p, 2)), []
        for _ in range(2):
            found.append(directions_of(sharded, own, "natural"))
            place.world.all_gather(torch.zeros(1))  # both have their directions
            if place.rank == 0 and len(found) == 1:
                curvature._leave_out(0, "a test")
            place.world.all_gather(torch.zeros(1))
        return found

    first = next(iter(curvature.layers.values())).parameters[0]
    for rank, (before, after) in enumerate(on_ranks(2, None, work)):
        plain = shards_of(grads[first], 2)[rank]
        assert not torch.equal(before[first], plain)
        torch.testing.assert_close(after[first], plain, rtol=0, atol=0)


def test_layers_that_some_steps_do_not_use_leave_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_curvature, "MOST_PLANS", 2)
    curvature = curvature_of("natural")
    grads = {p: p.grad.clone() for p in curvature.model.parameters() if p.grad is not None}
    alone = curvature.precondition(grads)

    def work(place: Place) -> int:
        own = {p: shards_of(grad, 2)[place.rank] for p, grad in grads.items()}
        sharded = ShardedCurvature(curvature, place.world, lambda p: boxes_of_rows(p, 2))
        for layer in [*curvature.layers.values()][:4]:
            used = {p: shard for p, shard in own.items() if p not in {*layer.parameters}}
            for some in (used, own):
                for p, direction in directions_of(sharded, some, "natural").items():
                    torch.testing.assert_close(direction, shards_of(alone[p], 2)[place.rank], rtol=1e-10, atol=1e-10)
        return len(sharded._plans)

    assert on_ranks(2, None, work) == [2, 2]


@pytest.mark.parametrize("mode", ["natural", "polar"])
def test_no_directions_wait_for_the_device(mode: str) -> None:
    curvature = curvature_of(mode)
    grads = {p: p.grad for p in curvature.model.parameters() if p.grad is not None}

    def work(place: Place) -> set[str]:
        own = {p: shards_of(grad, 3)[place.rank] for p, grad in grads.items()}
        sharded = ShardedCurvature(curvature, place.world, lambda p: boxes_of_rows(p, 3))
        with Watch() as watch:
            directions_of(sharded, own, mode)
        assert watch.called
        return watch.waiting

    assert on_ranks(3, None, work) == [set()] * 3


# ── inverses on some ranks ──

LAYOUTS = [(2, 1), (3, 1), (6, 2)]


def columns_of(n: int, n_workers: int) -> list[list[int]]:
    """Of a grid of ``n`` ranks in rows of ``n_workers``."""
    n_rows = n // n_workers
    return [list(range(first, first + n_rows)) for first in range(0, n, n_rows)]


def part_of(curvature: Curvature, place: Place) -> Curvature:
    """A curvature of the same state, on a rank that stores the inverses of its row's layers alone."""
    assert place.workers is not None
    n, n_workers = place.world.world_size, place.workers.inverse_workers.world_size
    part = Curvature(curvature.model, **curvature._options)
    part.connect(place.world, worker_grid=place.workers._replace(columns=columns_of(n, n_workers)))
    part.load_state_dict(curvature.state_dict())
    return part


@pytest.mark.parametrize(("n", "n_workers"), LAYOUTS)
@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
@pytest.mark.parametrize(("block_size", "precondition_bias"), [(4, False), (5, True)])
def test_directions_need_inverses_on_one_rank_of_each_column_alone(
    mode: str, n: int, n_workers: int, block_size: int, precondition_bias: bool
) -> None:
    curvature = curvature_of(mode, block_size, precondition_bias)
    grads = {p: p.grad.clone() for p in curvature.model.parameters() if p.grad is not None}

    def work(place: Place) -> tuple[list[dict[nn.Parameter, Tensor]], set[int]]:
        own = {p: shards_of(grad, n)[place.rank] for p, grad in grads.items()}
        part = part_of(curvature, place)
        sharded = ShardedCurvature(part, place.world, lambda p: boxes_of_rows(p, n))
        if mode == "adam":
            rotated = sharded.change_basis(own)
            return [rotated, sharded.change_basis(rotated, back=True)], part.factors.has_inverse
        return [directions_of(sharded, own, mode)], part.factors.has_inverse

    found, stored = zip(*on_ranks(n, n_workers, work), strict=True)
    expected = [curvature.change_basis(grads), grads] if mode == "adam" else [directions_of(curvature, grads, mode)]
    for together, alone in zip(zip(*found, strict=True), expected, strict=True):
        assert_the_same(list(together), alone)
    assert [sum(layer in some for some in stored) for layer in range(len(curvature.layers))] == [n_workers] * len(
        curvature.layers
    )


def test_parts_of_weights_stay_in_their_column() -> None:
    """Shards of 4 rows and blocks of 4: who stores the inverses of a layer computes what its neighbour holds, too."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(2)))
    curvature, n = Curvature(model, block_size=4), 4
    grads = {p: torch.randn_like(p) for p in model.parameters()}

    def work(place: Place) -> tuple[list[tuple[list[int], list[int]]], list[tuple[str, int]]]:
        own = {p: shards_of(grad, n)[place.rank] for p, grad in grads.items()}
        sharded = ShardedCurvature(part_of(curvature, place), place.world, lambda p: boxes_of_rows(p, n))
        sharded.precondition(own)
        return [(one.sent_lengths, one.received_lengths) for one in sharded._plans.values()], place.world.log

    for rank, (plans, log) in enumerate(on_ranks(n, 2, work)):
        # The other layer's 4 rows of 16 go to the neighbour, and 4 of its own come from there.
        alone = [64 if one == rank ^ 1 else 0 for one in range(n)]
        assert plans == [(alone, alone)]
        assert log == [("all_to_all", 64)] * 2


def test_what_travels_to_those_who_store_inverses_is_what_the_benchmark_counts() -> None:
    curvature, n, n_workers = curvature_of("natural"), 6, 2
    grads = {p: p.grad.clone() for p in curvature.model.parameters() if p.grad is not None}

    def work(place: Place) -> tuple[int, int]:
        own = {p: shards_of(grad, n)[place.rank] for p, grad in grads.items()}
        sharded = ShardedCurvature(part_of(curvature, place), place.world, lambda p: boxes_of_rows(p, n))
        sharded.precondition(own)
        (plan,) = sharded._plans.values()
        numel = sum(p.numel() for group in plan.groups for p in group.parameters)
        return sum(numel for _, numel in place.world.log), numel

    sent, numels = zip(*on_ranks(n, n_workers, work), strict=True)
    fresh = Curvature(curvature.model, **curvature._options)
    counted = sharded_updates.counted(fresh, n, n_workers)
    assert (sum(sent) * 8 / n, max(sent) * 8, max(numels) * 8) == pytest.approx(
        (counted["sent"], counted["busiest"], counted["at_once"])
    )


def test_what_others_store_can_be_gathered() -> None:
    """Bitwise, on those that want it."""
    curvature = curvature_of("natural")

    def work(place: Place) -> dict[str, Any]:
        part = part_of(curvature, place)
        state = part.state_dict()
        part.gather_inverses(state, keeps=place.rank > 0)
        return {name: {**layer} for name, layer in state["layers"].items()}

    own, *others = on_ranks(3, 1, work)
    expected = curvature.state_dict()["layers"]
    assert_bitwise(dict(enumerate(others)), {0: expected, 1: expected})
    assert any("G_inverse" not in layer for layer in own.values())


def test_layers_that_come_to_another_rank_when_one_begins_to_train_bring_their_inverses() -> None:
    """These could not be computed again: as after failed inversions, or eigenvectors on another device."""

    def work(place: Place) -> tuple[set[str], set[str]]:
        assert place.workers is not None
        model = nn.Sequential(nn.Linear(64, 64), *(nn.Linear(4, 4) for _ in range(3)))
        model[0].requires_grad_(False)
        curvature = Curvature(model)
        curvature.connect(place.world, worker_grid=place.workers._replace(columns=[[0, 1]]))
        before = stored(curvature)
        for name, inverses in before.items():
            for one in inverses.values():
                one.fill_(float(name))
        curvature.include(model[0].requires_grad_(True).parameters())
        after = stored(curvature)
        for name in after.keys() - {"0"}:
            for one in after[name].values():
                assert (one == float(name)).all()
        return {*before}, {*after} - {"0"}

    def stored(curvature: Curvature) -> dict[str, dict[str, Tensor]]:
        layers = curvature.state_dict()["layers"]
        found = {name: {k: v for k, v in one.items() if k.endswith("_inverse")} for name, one in layers.items()}
        return {name: one for name, one in found.items() if one}

    before, after = zip(*on_ranks(2, 1, work), strict=True)
    assert set().union(*before) == set().union(*after) == {"1", "2", "3"}
    assert before != after


def test_shards_over_ranks_that_would_send_to_others_are_refused() -> None:
    """As replicas that nobody told the strategy of."""
    curvature = curvature_of("natural")
    grads = {p: p.grad.clone() for p in curvature.model.parameters() if p.grad is not None}

    def work(place: Place) -> None:
        replica = place.rank // 2 * 2
        boxes = {p: dict(zip((replica, replica + 1), boxes_of_rows(p, 2).values(), strict=True)) for p in grads}
        ShardedCurvature(part_of(curvature, place), place.world, boxes.__getitem__).precondition(grads)

    with pytest.raises(ValueError, match=r"is sharded over the ranks \d, \d, of which some would send.*replicas="):
        on_ranks(4, 1, work)


# ── real shards ──


def two_passes_of_one_graph(sharded: bool) -> list[Tensor]:
    """The averages after a step of two backward passes, the first of which keeps the graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    if sharded:
        for module in (model[0], model[2], model):
            fully_shard(module)
    curvature = Curvature(model, max_rows=None)
    y = model(torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).sin()
    y[:, 0].sum().div(y.numel()).backward(retain_graph=True)
    y[:, 1:].sum().div(y.numel()).backward()
    curvature.update()
    return [batch.average for batch in curvature.factors.batches.values()]


def compare_two_passes() -> None:
    dist.init_process_group("gloo")
    torch.testing.assert_close(two_passes_of_one_graph(True), two_passes_of_one_graph(False), rtol=1e-10, atol=1e-12)
    dist.destroy_process_group()


def test_backward_passes_of_one_graph_add_up_where_weights_are_sharded() -> None:
    """Between them a whole weight has no gradient, and nobody dropped it."""
    fork(1, compare_two_passes)
