"""Laws of `inverse_workers`: whoever keeps the inverses, the numbers are those of everyone keeping all."""

from __future__ import annotations

import copy
import functools
import pickle
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.communication.messages import Counting, moved
from examples.resnet import ResNet50
from lightning_thor import Curvature, Thor, ThorDDPStrategy, configure_thor
from lightning_thor.distributed import shared_directions
from lightning_thor.distributed.communicator import SingleProcess, WorkerGrid
from lightning_thor.distributed.shared_directions import SharedDirections
from lightning_thor.trainer.start_report import curvature_report, curvature_table
from tests.helpers.boring import assert_bitwise, without_words
from tests.helpers.distributed_workers import LONG, ROWS, Module, fit, four_ranks, results_folder, two_ranks
from tests.helpers.distributed_workers import state as strategy_state
from tests.helpers.fakes import FakeCommunicator, Place, on_ranks
from tests.helpers.marks import marked

N, WIDTH, VOCABULARY = 12, 8, 7
LAYOUTS = [(2, 1), (3, 1), (4, 2)]


class Net(nn.Module):
    """A packed attention, a norm, a convolution, a bias, and a table that is the output layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.body = nn.Linear(WIDTH, 3 * WIDTH)
        self.back = nn.Linear(3 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.table.weight
        self.skipped = nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(self, tokens: Tensor, skip: bool = False) -> Tensor:
        x = self.table(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + self.conv(x.mT).mT
        x = x + self.back(self.body(x).tanh())
        logits: Tensor = self.head(x if skip else x + self.skipped(x))
        return logits


NET = Net()
TOKENS = torch.randint(VOCABULARY, (N, 6), generator=torch.Generator().manual_seed(6))


class Trained(NamedTuple):
    """What came out of a training on one process."""

    net: Net
    optimizer: Thor
    curvature: Curvature
    place: Place

    def weights(self) -> dict[str, Tensor]:
        return dict(self.net.named_parameters())

    @property
    def receivers(self) -> FakeCommunicator:
        return self.place.workers.gradient_workers


def fresh(place: Place, **options: Any) -> Trained:
    net = copy.deepcopy(NET).to(options.pop("dtype", torch.float64))
    mode = options.setdefault("mode", "natural")
    options = {"update_every_n_steps": 3, "block_size": 4, "precondition_bias": True, **options}
    curvature = Curvature(net, **options)
    curvature.connect(place.world, worker_grid=place.workers)
    return Trained(net, configure_thor(net, lr=0.01, mode=mode, preconditioner=curvature), curvature, place)


def go_on(trained: Trained, steps: range, skip_at: int = -1) -> None:
    """Steps on each process's part of the batch, and the gradients' mean, as DDP takes it."""
    net, optimizer, _, place = trained
    for step in steps:
        own = TOKENS.roll(step, 1).chunk(place.world.world_size)[place.rank]
        F.cross_entropy(net(own, skip=step == skip_at).flatten(0, 1), own.roll(1, 1).flatten()).backward()
        for p in net.parameters():
            if p.grad is not None and place.world.world_size > 1:
                mean = p.grad.flatten() / place.world.world_size
                place.world.all_reduce(mean).wait()
                p.grad.copy_(mean.view_as(p.grad))
        optimizer.step()
        optimizer.zero_grad()


def train(n_ranks: int, n_workers: int | None, n_steps: int = 8, skip_at: int = -1, **options: Any) -> list[Trained]:
    def work(place: Place) -> Trained:
        trained = fresh(place, **options)
        go_on(trained, range(n_steps), skip_at)
        return trained

    return on_ranks(n_ranks, n_workers, work)


def alone(**options: Any) -> Trained:
    return fresh(Place(0, SingleProcess(), None), **options)


def state(trained: Trained) -> dict[str, Any]:
    return without_words(trained.curvature.state_dict())


def common(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    keys = sorted(one.keys() & other.keys())
    return {key: one[key] for key in keys}, {key: other[key] for key in keys}


OPTIONS: dict[str, dict[str, Any]] = {
    "natural": {},
    "polar": {"mode": "polar"},
    # A table and its output layer are refreshed at steps of their own then.
    "staggered": {"stagger": True, "update_every_n_steps": 4, "damping": lambda step: 0.3 / (1 + step)},
    "trace rule": {"trace_rule": (0.05, 0.001), "update_every_n_steps": 2},
    "polar, staggered, pi": {"mode": "polar", "stagger": True, "damping_rule": "pi", "damping": 1e-3},
}


@functools.cache
def one_process(options: str, n_steps: int = 8) -> Trained:
    """The training on one process, which keeps everything."""
    return train(1, None, n_steps, **OPTIONS[options])[0]


@pytest.mark.parametrize(
    ("options", "n_ranks", "n_workers"),
    [("natural", 3, 1), ("polar", 3, 1), *((options, 4, 2) for options in OPTIONS), ("polar, staggered, pi", 4, 1)],
)
def test_whoever_keeps_the_inverses_the_numbers_are_the_same(options: str, n_ranks: int, n_workers: int) -> None:
    expected, found = one_process(options), train(n_ranks, n_workers, **OPTIONS[options])
    for trained in found:
        torch.testing.assert_close(trained.weights(), expected.weights(), rtol=1e-10, atol=1e-12)
        assert_bitwise(trained.weights(), found[0].weights())
        theirs, ours = state(expected), state(trained)
        for name, layer in ours.pop("layers").items():
            torch.testing.assert_close(*common(layer, theirs["layers"][name]), rtol=1e-8, atol=1e-10)
        assert ours == {key: value for key, value in theirs.items() if key != "layers"}


@pytest.mark.parametrize(("n_ranks", "n_workers"), LAYOUTS)
def test_each_layer_has_its_inverses_on_as_many_processes_as_were_said(n_ranks: int, n_workers: int) -> None:
    trained = train(n_ranks, n_workers, n_steps=1)
    keepers = [
        sum(any(key.endswith("_inverse") for key in one.curvature.state_dict()["layers"][name]) for one in trained)
        for name in trained[0].curvature.layers
    ]
    assert keepers == [n_workers] * len(keepers)


@pytest.mark.parametrize("mode", ["natural", "polar"])
def test_inverses_of_others_take_no_memory(mode: str) -> None:
    """All tensors that a curvature holds, by their storages, are what it says; and its share falls as 1 / groups."""

    def storages(curvature: Curvature) -> int:
        stacks = curvature.factors
        held = [stacks.flat_sums, *(copy for copies in stacks.tied_averages.values() for copy in copies)]
        for stack in stacks.batches.values():
            assert all(tensor is not None for tensor in vars(stack).values())
            held += [tensor for name, tensor in vars(stack).items() if name in ("average", "inverse")]
        n_counts = stacks.counts.numel() * stacks.counts.element_size()
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()) - n_counts

    def said(curvature: Curvature) -> int:
        return sum(map(curvature.n_bytes, curvature.layers))

    whole = train(2, None, n_steps=1, mode=mode)[0].curvature
    parts = [one.curvature for one in train(4, 1, n_steps=1, mode=mode)]
    inverses = sum(stack.inverse.nbytes for stack in whole.factors.batches.values())
    assert storages(whole) == said(whole)
    assert [storages(part) for part in parts] == [said(part) for part in parts]
    assert sum(said(whole) - said(part) for part in parts) == 3 * inverses
    assert all(said(whole) - said(part) > inverses / 2 for part in parts)


def test_the_table_at_the_start_of_a_fit_says_what_is_kept_here() -> None:
    curvature = Curvature(Net())
    whole = curvature_table(curvature)
    communicator = Counting(2)
    curvature.connect(communicator, worker_grid=WorkerGrid(SingleProcess(), communicator))
    table = curvature_table(curvature)
    n = len(curvature.layers) - len(curvature.factors.has_inverse)
    headline = str(next(iter(curvature_report(curvature).renderables)))
    assert headline.endswith(f"KiB on this rank (others store the inverses of {n})")
    cells = [list(column.cells) for column in (whole.columns[0], whole.columns[3], table.columns[3])]
    for name, before, after in zip(*cells, strict=True):
        own = name in curvature.layers and list(curvature.layers).index(str(name)) in curvature.factors.has_inverse
        assert (before == after) == (own or name not in curvature.layers)


def test_the_page_on_scaling_holds_what_is_kept_and_sent() -> None:
    model = ResNet50()
    curvature = Curvature(model)
    n_bytes = sum(map(curvature.n_bytes, curvature.layers))
    inverses = n_bytes / 3e6  # as much as sums and averages each
    kept = []
    for group in range(8):
        communicator = Counting(8)
        communicator.rank = group
        curvature.connect(communicator, worker_grid=WorkerGrid(SingleProcess(), communicator))
        kept.append(inverses - (n_bytes - sum(map(curvature.n_bytes, curvature.layers))) / 1e6)
    grads = {p: p.detach() for p in model.parameters()}
    list(curvature._shared.all_gather_uneven([dict(curvature._shared.own_grads(grads))], grads))
    sent = moved(communicator.messages, 8) / 1e6
    ddp = moved([("all_reduce", sum(p.nbytes for p in grads))], 8) / 1e6
    page = " ".join((Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8").split())
    assert (
        f"stores {min(kept):.0f} to {max(kept):.0f} MB of the {inverses:.0f} MB of inverses on each rank and sends "
        f"{sent:.0f} MB a step; DDP sends {ddp:.0f} MB"
    ) in page


def test_nothing_is_allocated_for_inverses_before_it_is_said_who_keeps_them() -> None:
    curvature = Curvature(Net())
    assert not any("inverse" in vars(stack) for stack in curvature.factors.batches.values())


# ── messages ──


def test_a_step_takes_one_message_of_all_directions_and_a_refresh_one_number_more() -> None:
    found = train(4, 2, n_steps=5)
    lengths = []
    for trained in found[:2]:  # one of each group
        layers = list(trained.curvature.layers.values())
        own = {p for index in trained.curvature.factors.has_inverse for p in layers[index].parameters}
        lengths.append(sum(p.numel() for p in own))
    number, directions = [("all_reduce", 1), ("wait", 1)], ("all_gather", max(lengths))
    assert max(lengths) < sum(lengths) == sum(p.numel() for p in NET.parameters())
    for trained in found:
        assert trained.receivers.log == [*number, *[directions] * 3, *number, *[directions] * 2]
        assert trained.receivers.dtypes == [torch.int64, *[torch.float64] * 3, torch.int64, *[torch.float64] * 2]


@pytest.mark.parametrize(
    ("dtypes", "travels"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
    ],
)
def test_directions_travel_in_the_widest_dtype_of_the_gradients_but_not_in_float16(
    dtypes: tuple[torch.dtype, ...], travels: torch.dtype
) -> None:
    net = nn.Sequential(*(nn.Linear(4, 4, bias=False).to(dtype) for dtype in dtypes))
    layers = Curvature(net).layers
    communicator = Counting(2)
    shared = SharedDirections(communicator, layers, products=1, polar=())
    grads = {p: torch.randn_like(p) for p in net.parameters()}
    own_grads = {p: grad.clone() for p, grad in shared.own_grads(grads).items()}
    (found,) = shared.all_gather_uneven([own_grads], grads)
    assert communicator.messages == [("all_gather", 16 * travels.itemsize)]
    assert {direction.dtype for direction in found.values()} == {torch.float32}
    (own,) = shared.own_grads(grads)
    assert_bitwise(found[own], grads[own].float())


@pytest.mark.parametrize("mode", ["natural", "polar"])
def test_layers_without_a_gradient_are_left_out_on_all_processes(mode: str) -> None:
    """A step in which no process uses a layer: its parameters have no gradient, as under DDP."""
    expected = train(4, None, skip_at=5, mode=mode)[0]
    for trained in train(4, 1, skip_at=5, mode=mode):
        torch.testing.assert_close(trained.weights(), expected.weights(), rtol=1e-10, atol=1e-12)


def test_parameter_groups_of_both_modes_get_the_directions_of_each() -> None:
    def work(place: Place) -> Trained:
        trained = fresh(place, mode="polar")
        trained.optimizer.param_groups[1]["mode"] = "natural"
        go_on(trained, range(4))
        return trained

    (expected, *_), found = (on_ranks(2, n_workers, work) for n_workers in (None, 1))
    for trained in found:
        torch.testing.assert_close(trained.weights(), expected.weights(), rtol=1e-10, atol=1e-12)


def test_layers_with_a_parameter_in_common_are_found_among_many() -> None:
    """In a time that grows with them: each compared with each, so many would take minutes."""
    a, b, c, d, *others = (nn.Parameter(torch.zeros(())) for _ in range(30_000))
    start = time.monotonic()
    found = shared_directions._tied([[a, b], [c], [b, d], *([p] for p in others), [c], [d]])
    assert time.monotonic() - start < 10
    assert sorted(map(sorted, found))[:3] == [[0, 2, len(others) + 4], [1, len(others) + 3], [3]]
    assert len(found) == len(others) + 2


def test_the_work_of_a_step_is_shared_out_evenly() -> None:
    """Twelve equal layers on four groups: three each; layers with a parameter in common are together."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(12)))
    layers = Curvature(model).layers
    found = []
    for group in range(4):
        communicator = Counting(4)
        communicator.rank = group
        found.append(SharedDirections(communicator, layers, products=2, polar=layers).own)
    assert sorted(layer for own in found for layer in own) == list(range(12))
    assert [len(own) for own in found] == [3] * 4
    for trained in train(4, 1, n_steps=0):
        own = {
            name
            for index, name in enumerate(trained.curvature.layers)
            if index in trained.curvature.factors.has_inverse
        }
        for together in ({"table", "head"}, {f"attention.{role}_proj" for role in "qkv"}):
            assert together <= trained.curvature.layers.keys()
            assert together <= own or not together & own


# ── failures ──


def spoil(curvature: Curvature, name: str) -> None:
    """Make a block of a layer's A indefinite, which no covariance becomes by itself."""
    curvature.factors.blocks(list(curvature.layers).index(name), "A", "average")[0, 0, 0, 0] = -1e6


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_failure_is_counted_once_on_all_processes_and_keeps_the_older_inverse(n_workers: int) -> None:
    def work(place: Place) -> Trained:
        trained = fresh(place, damping_rule="sqrt", damping=1e-3)
        go_on(trained, range(2))
        for name in ("body", "conv"):
            spoil(trained.curvature, name)
        go_on(trained, range(2, 5))
        return trained

    (expected, *_), found = (on_ranks(4, n, work) for n in (None, n_workers))
    assert int(expected.curvature.factors.failed_inversions) == 2
    for trained in found:
        assert int(trained.curvature.factors.failed_inversions) == 2
        torch.testing.assert_close(trained.weights(), expected.weights(), rtol=1e-10, atol=1e-12)


def test_connecting_after_a_step_is_refused() -> None:
    (trained,) = on_ranks(1, None, lambda place: fresh(place))
    go_on(trained, range(1))
    communicator = Counting(2)
    trained.curvature.connect(communicator)  # as before: everyone keeps all
    with pytest.raises(RuntimeError, match=r"came after 1 steps.*Connect before the first"):
        trained.curvature.connect(communicator, worker_grid=WorkerGrid(SingleProcess(), communicator))


# ── checkpoints ──


@pytest.mark.parametrize("options", ["natural", "polar", "staggered", "trace rule"])
@pytest.mark.parametrize(("before", "after"), [((4, 1), (1, None)), ((2, 1), (4, 2)), ((2, None), (2, 1))])
def test_a_checkpoint_of_the_first_process_goes_on_with_any_number_of_processes_and_workers(
    options: str, before: tuple[int, int | None], after: tuple[int, int | None]
) -> None:
    n_steps = 7  # staggered, some layers were refreshed in the first step alone, others since
    unbroken = one_process(options, 11)
    saved = train(*before, n_steps=n_steps, **OPTIONS[options])[0]
    states = copy.deepcopy((saved.curvature.state_dict(), saved.optimizer.state_dict(), saved.net.state_dict()))

    def work(place: Place) -> Trained:
        resumed = fresh(place, **OPTIONS[options])
        parts = (resumed.curvature, resumed.optimizer, resumed.net)
        for part, its in zip(parts, copy.deepcopy(states), strict=True):
            part.load_state_dict(its)
        go_on(resumed, range(n_steps, 11))
        return resumed

    for resumed in on_ranks(*after, work):
        torch.testing.assert_close(resumed.weights(), unbroken.weights(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("mode", "damping_rule"), [("natural", "trace"), ("natural", "pi"), ("polar", "trace")])
@pytest.mark.parametrize("n_steps", [1, 6])
def test_inverses_that_a_checkpoint_lacks_come_back(n_steps: int, mode: str, damping_rule: str) -> None:
    """With a table and its output layer that are refreshed apart: those that the others have, to rounding.

    Not bitwise: how LAPACK and a batched product round depends on where in memory, and in which batch, a block lies.
    What needs no inverting is.
    """
    options = {"mode": mode, "damping_rule": damping_rule, "stagger": True, "update_every_n_steps": 4}
    states = [state(one) for one in train(4, 1, n_steps, **options)]
    everywhere: dict[str, dict[str, Tensor]] = {}
    for one in states:
        for name, layer in one["layers"].items():
            everywhere.setdefault(name, {}).update(layer)
    lacking = [name for name, layer in states[0]["layers"].items() if layer.keys() < everywhere[name].keys()]
    assert 0 < len(lacking) < len(everywhere)
    restored = alone(mode=mode)
    restored.curvature.load_state_dict({**states[0], "mode": mode})
    found = state(restored)["layers"]
    torch.testing.assert_close(found, everywhere, rtol=1e-12, atol=1e-12)
    for name, layer in found.items():
        assert_bitwise(*common(layer, states[0]["layers"][name]))


def test_a_silent_layer_has_the_identity_after_a_checkpoint_too() -> None:
    def silent(place: Place) -> Trained:
        trained = fresh(place)
        trained.curvature.is_listening = lambda: False
        trained.curvature._accumulator._checked = True
        go_on(trained, range(1))
        return trained

    for saved in on_ranks(2, 1, silent):
        restored = alone()
        restored.curvature.load_state_dict(saved.curvature.state_dict())
        for name, layer in restored.curvature.state_dict()["layers"].items():
            identity = torch.eye(layer["G"].shape[-1], dtype=torch.float64).expand_as(layer["G"])
            assert_bitwise(layer["G_inverse"], identity)
            assert not layer["G_inverted"].any(), name


def test_a_block_whose_inversion_failed_has_lost_its_older_inverse_and_that_is_told() -> None:
    def work(place: Place) -> Trained:
        trained = fresh(place, damping_rule="sqrt", damping=1e-3)
        go_on(trained, range(2))
        for name in trained.curvature.layers:
            if name in ("body", "conv", "back"):
                spoil(trained.curvature, name)
        go_on(trained, range(2, 5))
        return trained

    first = on_ranks(4, 1, work)[0].curvature
    kept = [name for index, name in enumerate(first.layers) if index in first.factors.has_inverse]
    lost = [name for name in ("body", "conv", "back") if name not in kept]
    assert lost
    used = alone()
    go_on(used, range(1))
    restored = used.curvature
    with pytest.warns(UserWarning, match=rf"and {len(lost)} blocks of them cannot be inverted.*raise damping"):
        restored.load_state_dict(first.state_dict())
    assert int(restored.factors.failed_inversions) == 3  # counted before, not again
    for name in lost:
        own = restored.state_dict()["layers"][name]
        trace = own["A"].diagonal(dim1=-2, dim2=-1).sum()
        mean = trace / restored.layers[name].A.width
        block = torch.eye(own["A"].shape[-1], dtype=torch.float64) / (mean + own["A_added"])
        torch.testing.assert_close(own["A_inverse"][0, 0], block)
        assert own["A_inverted"].tolist()[0] is False


def test_a_factor_that_became_zero_keeps_its_inverse_but_not_through_a_checkpoint_that_lacks_it() -> None:
    """It has the identity over its last damping then."""
    trained = alone()
    go_on(trained, range(1))
    stacks, name = trained.curvature.factors, "body"
    before = copy.deepcopy(trained.curvature.state_dict()["layers"][name])
    stacks.blocks(list(trained.curvature.layers).index(name), "G", "average").zero_()
    stacks.invert(stacks.layout.index(tuple(stacks.has_inverse)), "trace", 0.7, trained.curvature.solve)
    saved = copy.deepcopy(trained.curvature.state_dict())
    for key in ("G_added", "G_inverse"):
        assert_bitwise(saved["layers"][name][key], before[key])
    saved["layers"][name].pop("G_inverse")
    trained.curvature.load_state_dict(saved)
    expected = torch.eye(4, dtype=torch.float64).expand(1, 6, 4, 4) / before["G_added"]
    torch.testing.assert_close(trained.curvature.state_dict()["layers"][name]["G_inverse"], expected)


# ── real processes ──


@pytest.mark.parametrize(
    ("training", "expected"),
    marked(
        [
            ("one", "halves"),
            ("one_resumed", "halves"),
            ("one_from_all", "halves"),
            ("all_from_one", "halves"),
            ("one_polar", "polar"),
            ("one_staggered", "staggered"),
            ("one_trace_rule", "trace_rule"),
            ("one_quarters", "quarters"),
            ("one_nobody", "all_nobody"),
        ],
        LONG,
    ),
)
def test_two_ranks_that_keep_half_of_the_inverses_each_train_as_two_that_keep_all(training: str, expected: str) -> None:
    """Resumed ones too, from checkpoints that lack half of them, or have all; with layers that no rank uses."""
    first, second = two_ranks(training)
    assert_bitwise(strategy_state(first, "curvature"), strategy_state(second, "curvature"))
    whole = two_ranks(expected)[0]
    torch.testing.assert_close(
        strategy_state(first, "curvature"), strategy_state(whole, "curvature"), rtol=1e-8, atol=1e-8
    )
    for result in (first, second):
        for name, layer in result["curvature"]["layers"].items():
            torch.testing.assert_close(*common(layer, whole["curvature"]["layers"][name]), rtol=1e-8, atol=1e-8)
    if training != "all_from_one":
        assert first["inverse_bytes"] + second["inverse_bytes"] == whole["inverse_bytes"]
        assert whole["said_bytes"] - first["said_bytes"] == second["inverse_bytes"]


@pytest.mark.slow
def test_an_overflow_is_skipped_by_ranks_that_keep_half_of_the_inverses_each() -> None:
    whole = two_ranks("overflow")[0]
    for result in two_ranks("one_overflow"):
        assert result["steps"] == whole["steps"] == [1, 2, 3, 3, 4, 5]
        torch.testing.assert_close(result["weights"], whole["weights"], rtol=1e-4, atol=1e-5)  # in float16


@pytest.mark.slow
def test_as_many_workers_as_ranks_are_bitwise_the_way_of_none() -> None:
    for training, expected, ranks in (("two", "halves", two_ranks), ("four_four", "four", four_ranks)):
        for result, whole in zip(ranks(training), ranks(expected), strict=True):
            assert_bitwise(strategy_state(result), strategy_state(whole))
            assert len(result["collectives"]) <= len(whole["collectives"])


@pytest.mark.slow
def test_each_step_sends_one_message_in_a_group_of_its_own() -> None:
    for result in two_ranks("one"):
        n_refreshes, n_steps = 4, len(result["steps"])
        first, *collectives = result["collectives"]
        assert first["op"] == "all_gather"  # once in a run: the unit of gradients
        directions = [call for call in collectives if call["op"] == "all_gather"]
        assert len(collectives) == n_steps + 2 * n_refreshes  # factors, and the number of failures
        assert len(directions) == n_steps
        assert all(call["own_group"] and not call["in_backward"] for call in directions)


@pytest.mark.parametrize("training", marked(["four_one", "four_two", "four_two_polar", "four_two_resumed"], LONG))
def test_four_ranks_train_as_one_whoever_keeps_the_inverses(training: str, tmp_path: Path) -> None:
    mode = "polar" if training.endswith("polar") else "natural"
    epochs = 3 if training.endswith("resumed") else 2
    alone = fit(tmp_path, Module((ROWS,), mode=mode), devices=1, max_epochs=epochs)
    ranks = four_ranks(training)
    for result in ranks:
        torch.testing.assert_close(result["weights"], alone["weights"], rtol=1e-8, atol=1e-8)
        assert_bitwise(strategy_state(result, "curvature"), strategy_state(ranks[0], "curvature"))
    assert ranks[0]["steps"][0] == (5 if training.endswith("resumed") else 1)
    n_workers = 1 if training == "four_one" else 2
    assert sum(result["inverse_bytes"] for result in ranks) == n_workers * alone["inverse_bytes"]


@pytest.mark.slow
def test_a_checkpoint_of_ranks_that_keep_half_of_the_inverses_goes_on_with_one(tmp_path: Path) -> None:
    saved = torch.load(results_folder() / "one" / "epoch=0.ckpt", weights_only=True)
    layers = saved["callbacks"]["ThorCallback"]["curvature"]["layers"].values()
    assert 0 < sum("G_inverse" in layer for layer in layers) < len(layers)
    unbroken = fit(tmp_path, Module((ROWS,)), devices=1, max_epochs=3)
    resumed = fit(tmp_path, Module((ROWS,)), devices=1, max_epochs=3, resume=results_folder() / "one" / "epoch=0.ckpt")
    assert resumed["steps"][0] == 5
    torch.testing.assert_close(strategy_state(resumed), strategy_state(unbroken), rtol=1e-9, atol=1e-9)


# ── the argument ──


def test_inverse_workers_that_do_not_divide_the_ranks_are_refused() -> None:
    strategy = ThorDDPStrategy(inverse_workers=4)
    strategy.cluster_environment = LightningEnvironment()
    strategy.cluster_environment.set_world_size(6)
    with pytest.raises(
        ValueError, match=r"inverse_workers=4 does not divide the 6 processes.*give 1, 2, 3, 6, or None"
    ):
        strategy.new_worker_grid()
    strategy.cluster_environment.set_world_size(4)
    assert strategy.new_worker_grid() is None


def test_one_worker_on_one_process_is_bitwise_a_single_device(tmp_path: Path, clean_process: None) -> None:
    found = fit(tmp_path, Module((ROWS,)), devices=1, max_epochs=1, strategy=ThorDDPStrategy(inverse_workers=1))
    assert found["strategy"] == "ThorDDPStrategy"
    assert found["collectives"] == []
    assert_bitwise(strategy_state(found), strategy_state(fit(tmp_path, Module((ROWS,)), devices=1, max_epochs=1)))


def test_strategies_with_workers_can_be_handed_to_spawned_ranks() -> None:
    strategy = pickle.loads(pickle.dumps(ThorDDPStrategy(inverse_workers=2, start_method="spawn")))
    assert strategy._inverse_workers == 2
