"""Buckets that start in backward: not too early, not twice, in one order, and without a trace in the numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_thor import Curvature
from lightning_thor.distributed.communicator import SingleProcess
from lightning_thor.distributed.factor_reducer import FactorReducer, by_layer, by_size
from lightning_thor.distributed.shared_inversions import SharedInversions
from lightning_thor.factors.layout import SIDES
from tests.helpers.boring import assert_bitwise, without_words
from tests.helpers.fakes import FakeCommunicator, Place, on_ranks
from tests.helpers.watch import Watch

START, WAIT = ("all_reduce", 28), ("wait", 28)
"""A and G of one layer, 6 x 6 in blocks of 3: 2 x 2 x 6 numbers, and 4 that are counted."""
UNIT = ("all_gather", 5)
"""Once in a run: the unit of gradients, and a number of each layer."""
Forward = Callable[[nn.ModuleList, Tensor, int], Tensor]


def layers() -> nn.ModuleList:
    torch.manual_seed(4)
    return nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(4)]).double()


def chain(model: nn.ModuleList, x: Tensor, step: int) -> Tensor:
    for layer in model:
        x = layer(x).tanh()
    return x


def twice(model: nn.ModuleList, x: Tensor, step: int) -> Tensor:
    return chain(model, chain(model, x, step), step)


def growing(model: nn.ModuleList, x: Tensor, step: int) -> Tensor:
    for _ in range(1 + step):
        x = chain(model, x, step)
    return x


def segments(use_reentrant: bool) -> Forward:
    def forward(model: nn.ModuleList, x: Tensor, step: int) -> Tensor:
        for _ in range(2):
            x = checkpoint(lambda x: chain(model, x, step), x, use_reentrant=use_reentrant)
        return x

    return forward


def unused_head(model: nn.ModuleList, x: Tensor, step: int) -> Tensor:
    model[0](x)
    return chain(model, x, step)


def unused_head_that_is_held(model: nn.ModuleList, x: Tensor, step: int) -> Tensor:
    model.held = model[0](x).sum
    return chain(model, x, step)


def sometimes(model: nn.ModuleList, x: Tensor, step: int) -> Tensor:
    return chain(model, x, step) if step % 2 == 0 else chain(model[1:], x, step)


def train(forward: Forward, communicator: Any = None, steps: int = 4, is_sync_step: Any = lambda: True) -> Curvature:
    model = layers()
    curvature = Curvature(model, update_every_n_steps=1, block_size=3)
    if communicator is not None:
        curvature.connect(communicator, bucket_fn=by_size(1), is_sync_step=is_sync_step)
        curvature.solve = SharedInversions(SingleProcess())  # twins invert everything
    for step in range(steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64, requires_grad=True)
        forward(model, x, step).square().mean().backward()
        curvature.update()
    return curvature


@pytest.mark.parametrize(
    "forward",
    [chain, twice, growing, unused_head, sometimes, segments(False), segments(True)],
    ids=lambda f: f.__name__,
)
def test_twins_that_start_their_sums_in_backward_are_one_process(forward: Forward) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "0: observed before")  # it is silent in every second step of one model
        actual, expected = train(forward, FakeCommunicator()), train(forward)
    torch.testing.assert_close(
        without_words(actual.state_dict()), without_words(expected.state_dict()), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize(
    ("forward", "early"),
    [
        # By refresh; 4 buckets of one layer each, last layer first.
        (chain, [0, 4, 4]),
        (twice, [0, 4, 4]),
        (growing, [0, 4, 4]),
        (unused_head, [0, 4, 4]),
        (unused_head_that_is_held, [0, 3, 3]),  # one pair of the first layer is promised and never comes
        (sometimes, [0, 3, 4]),
        (segments(True), [0, 4, 4]),
        (segments(False), [0, 4, 4]),  # the graph of what is recomputed is freed at once
    ],
)
def test_a_bucket_starts_in_backward_when_its_layers_have_given_all_they_promised(
    forward: Forward, early: list[int]
) -> None:
    communicator = FakeCommunicator()
    train(forward, communicator, steps=3)
    assert [sum(communicator.in_backward[4 * step :][:4]) for step in range(3)] == early


def test_all_sums_start_before_the_first_wait_and_each_is_waited_for_once() -> None:
    communicator = FakeCommunicator()
    train(chain, communicator, steps=2)
    assert communicator.log == [UNIT] + ([START] * 4 + [WAIT] * 4) * 2


class Masked(nn.Linear):
    """Its gradient is not the product of a pair."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x * self.mask, self.weight)

    mask = torch.tensor([0.0, 1.0] * 3, dtype=torch.float64)


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_layer_that_does_not_fit_is_left_out_whenever_it_is_first_used_and_on_whichever_process(
    first: int, resumes: bool
) -> None:
    def train_one(place: Place | None) -> tuple[list[str], list[int]]:
        """The layers that are left out, and the steps in which processes agreed."""
        model = nn.ModuleList([*layers(), Masked(6, 6, bias=False).double()])
        agreements: list[int] = []
        state = None
        for n_steps in (2, 6) if resumes else (6,):
            curvature = Curvature(model, update_every_n_steps=1, block_size=3)
            if place is not None:
                curvature.connect(place.world, is_sync_step=lambda: True)
                curvature.solve = SharedInversions(SingleProcess())
            if state is not None:
                curvature.load_state_dict(state)
            while curvature.step < n_steps:
                step, before = curvature.step, 0 if place is None else len(place.world.log)
                x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
                uses = step >= first + 1 or (step == first and (place is None or place.rank == 1))
                chain(model if uses else model[:4], x, step).square().mean().backward()
                curvature.update()
                if place is not None:
                    agreements += [step for op, _ in place.world.log[before:] if op == "all_gather"]
            state = curvature.state_dict()
            curvature.close()
        return list(curvature.left_out), agreements

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone, _ = train_one(None)
        results = on_ranks(2, None, train_one)
    assert alone == ["4"]
    # As long as no process has used it they ask again.
    assert results == [(["4"], list(range(first + 1)))] * 2


def test_nothing_starts_in_a_backward_that_only_accumulates() -> None:
    communicator = FakeCommunicator()
    train(chain, communicator, is_sync_step=lambda: False)
    assert not any(communicator.in_backward)
    assert len(communicator.in_backward) == 16


def test_a_pair_that_comes_late_is_left_out_with_a_warning_and_never_again() -> None:
    """A second backward in one step, where there was one before: A and the rows of the first count, of both later."""

    def passes(curvature: Curvature, model: nn.ModuleList, n: int) -> None:
        for seed in range(n):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            chain(model, x, 0).square().mean().backward()
        curvature.update()

    late, exact = layers(), layers()
    curvature = Curvature(late, update_every_n_steps=1, averaging=0.0)
    curvature.connect(FakeCommunicator(), bucket_fn=by_size(1), is_sync_step=lambda: True)
    curvature.solve = SharedInversions(SingleProcess())
    expected = Curvature(exact, update_every_n_steps=1, averaging=0.0)
    passes(curvature, late, 1)
    with pytest.warns(UserWarning, match=r"Layer '3' was used again after its factors were on their way") as told:
        passes(curvature, late, 2)
    assert len(told) == 1
    passes(expected, exact, 1)
    expected._schedule.step = 2
    for factor in product(range(4), SIDES):
        torch.testing.assert_close(
            curvature.factors.blocks(*factor, "average"), expected.factors.blocks(*factor, "average")
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passes(curvature, late, 2)
    passes(expected, exact, 2)
    for factor in product(range(4), SIDES):
        torch.testing.assert_close(
            curvature.factors.blocks(*factor, "average"), expected.factors.blocks(*factor, "average")
        )


def test_a_skipped_step_ends_what_is_on_its_way_and_leaves_no_trace() -> None:
    communicator = FakeCommunicator()
    curvature = train(chain, communicator, steps=2)
    before = {name: tensor.clone() for name, tensor in curvature.state_dict()["layers"]["1"].items()}
    chain(curvature.model, torch.randn(5, 6, dtype=torch.float64), 0).mean().backward()
    curvature.discard()
    assert communicator.log[-8:] == [START] * 4 + [WAIT] * 4
    assert curvature.factors.flat_sums.abs().sum() == 0
    assert_bitwise(curvature.state_dict()["layers"]["1"], before)


def test_a_skipped_step_ends_sums_that_only_others_have_started() -> None:
    communicator = FakeCommunicator()
    curvature = train(chain, communicator, steps=1)
    curvature.discard()
    assert communicator.log[9:] == [START] * 4 + [WAIT] * 4


def test_without_early_starts_a_skipped_step_says_nothing_to_others() -> None:
    communicator = FakeCommunicator()
    curvature = train(chain, communicator, steps=1, is_sync_step=None)
    curvature.discard()
    assert len(communicator.log) == 9


def test_gradients_that_are_thrown_away_end_sums_that_only_others_have_started() -> None:
    communicator = FakeCommunicator()
    curvature = train(chain, communicator, steps=1)
    curvature.forget()
    assert communicator.log[9:] == [START] * 4 + [WAIT] * 4


BACKWARD, FORGET = "backward", "forget"


@pytest.mark.parametrize(
    "order",
    [
        [BACKWARD],  # model.zero_grad()
        [FORGET, BACKWARD],
        [FORGET, FORGET, BACKWARD],
        [BACKWARD, FORGET, BACKWARD],  # of which the first is another optimizer's
        [FORGET, BACKWARD, FORGET, BACKWARD],
    ],
    ids=" ".join,
)
def test_gradients_that_are_thrown_away_in_each_step_cost_no_message_and_the_rest_is_sent_in_backward(
    order: list[str],
) -> None:
    communicator, model = FakeCommunicator(), layers()
    curvature = Curvature(model, update_every_n_steps=1, block_size=3)
    curvature.connect(communicator, bucket_fn=by_size(1), is_sync_step=lambda: True)
    curvature.solve = SharedInversions(SingleProcess())
    for _ in range(3):
        for part in order:
            if part == FORGET:
                curvature.forget()
            else:
                chain(model, torch.randn(5, 6, dtype=torch.float64), 0).square().mean().backward()
        curvature.update()
    assert communicator.log == [UNIT] + ([START] * 4 + [WAIT] * 4) * 3
    assert communicator.in_backward == [False] * 4 + [True] * 8


def test_gradients_that_are_thrown_away_leave_no_trace_where_one_process_saw_no_layer() -> None:
    first = layers()  # here, since threads share the generator

    def training(place: Place, throws_away: bool) -> Any:
        model = copy.deepcopy(first)
        curvature = Curvature(model, update_every_n_steps=1, block_size=3)
        curvature.connect(place.world, bucket_fn=by_size(1), is_sync_step=lambda: True)
        for step in range(4):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            if throws_away and step == 2:
                if place.rank == 0:
                    chain(model, 2 * x, step).square().mean().backward()
                curvature.forget()
            chain(model, x + place.rank, step).square().mean().backward()
            curvature.update()
        return without_words(curvature.state_dict())

    thrown_away, plain = (on_ranks(2, None, partial(training, throws_away=one)) for one in (True, False))
    assert_bitwise(thrown_away, plain)


# ── what is counted on the host ──


def test_counts_go_to_the_device_in_one_piece_whatever_the_number_of_layers() -> None:
    def operations(n: int) -> int:
        curvature = Curvature(nn.Sequential(*(nn.Linear(3, 3) for _ in range(n))))
        for _ in range(2):
            curvature.model(torch.randn(4, 3)).sum().backward()
        with Watch() as watch:
            counts = curvature.factors.counts
        assert counts[:, :2].tolist() == [[8.0, 8.0]] * n
        with Watch() as again:
            assert curvature.factors.counts is counts
        assert not again.called
        return sum(watch.called.values())

    assert operations(1) == operations(20)


def test_a_bucket_that_starts_early_takes_the_counts_of_its_own_layers_alone() -> None:
    """Of fractions that are added up on the host the sum does not tell when other layers' buckets started."""
    stacks = Curvature(layers().float(), block_size=3).factors
    whole, parts = Curvature(layers().float(), block_size=3).factors, [0.1, 1e6 / 7, 0.3]
    for part in parts:
        for each in (stacks, whole):
            for layer in (0, 2, 3):
                each.count(layer, 1, part, 0.0)
        flat = stacks.pack_window(stacks.layout.index((3,)))
    assert flat[-3] > 0
    assert_bitwise(stacks.counts[:3], whole.counts[:3])
    assert whole.counts[2, 1] == torch.tensor(sum(parts), dtype=torch.float32)


def test_numbers_of_the_host_and_of_the_device_add_up() -> None:
    stacks = Curvature(layers(), block_size=3).factors
    stacks.count(2, torch.tensor(3.0), torch.tensor(2.0), 0.0)
    stacks.count(2, 4, 0.5, 7.0)
    assert stacks.counts[2].tolist() == [7.0, 2.5, 7.0, 0.0]
    stacks.count(2, 1, 1, 0.0)
    assert stacks.counts.tolist() == [[0.0] * 4, [0.0] * 4, [8.0, 3.5, 7.0, 0.0], [0.0] * 4]


def test_what_is_counted_of_a_skipped_step_is_forgotten_with_it() -> None:
    curvature = train(chain, steps=1)
    chain(curvature.model, torch.randn(5, 6, dtype=torch.float64), 0).mean().backward()
    curvature.discard()
    assert not curvature.factors.counts.any()


# ── the order of backward ──


ORDER = (2, 0, 3, 1)
"""In which modules run that were registered as 0, 1, 2, 3."""


def misordered(model: nn.ModuleList, communicator: FakeCommunicator, seed: int) -> None:
    """Forward and backward; the log tells of each gradient too, after what happened when it came."""

    def told(layer: int) -> Callable[[Tensor], None]:
        return lambda g: communicator.log.append(("gradient", layer))

    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for layer in ORDER:
        x = model[layer](x)
        x.register_hook(told(layer))
        x = x.tanh()
    x.square().mean().backward()


def in_twins(model: nn.ModuleList, communicator: Any, cut: Any = None, **options: Any) -> Curvature:
    curvature = Curvature(model, block_size=3, **options)
    curvature.connect(communicator, bucket_fn=cut or by_size(1), is_sync_step=lambda: True)
    curvature.solve = SharedInversions(SingleProcess())
    return curvature


AT_THE_END = [("gradient", 1), ("gradient", 3), ("gradient", 0), ("gradient", 2), *[START] * 4]
AS_IT_RUNS = [("gradient", 1), START, ("gradient", 3), START, ("gradient", 0), START, ("gradient", 2), START]


def test_from_the_second_refresh_on_buckets_start_in_the_order_in_which_modules_run() -> None:
    model, communicator = layers(), FakeCommunicator()
    curvature = in_twins(model, communicator, update_every_n_steps=1)
    for step, expected in enumerate((AT_THE_END, AS_IT_RUNS, AS_IT_RUNS)):
        communicator.log.clear()
        misordered(model, communicator, step)
        curvature.update()
        assert [call for call in communicator.log if call != UNIT] == [*expected, *[WAIT] * 4]


def test_staggered_and_resumed_each_turn_learns_its_own_order() -> None:
    model, communicator = layers(), FakeCommunicator()
    curvature = in_twins(model, communicator, update_every_n_steps=2, stagger=True)
    misordered(model, communicator, 0)
    curvature.update()
    resumed = in_twins(model, communicator, update_every_n_steps=2, stagger=True)
    resumed.load_state_dict(curvature.state_dict())
    curvature.close()
    for step in range(1, 5):
        communicator.log.clear()
        due = resumed._schedule.due()
        assert len(due) == 2
        misordered(model, communicator, step)
        resumed.update()
        early = [call for call in communicator.log if call != WAIT]
        if step <= 2:
            assert early == [*AT_THE_END[:4], START, START]
        else:
            expected = [("gradient", layer) for layer in reversed(ORDER)]
            for layer in due:
                expected.insert(expected.index(("gradient", layer)) + 1, START)
            assert early == expected


def test_groups_of_split_indices_stay_together_in_the_order_in_which_they_are_whole() -> None:
    cut = by_layer([1, 3], [True] * 6)
    assert cut([0, 5, 2, 1, 4, 3], [1] * 6) == [[0, 1], [5, 4], [2, 3]]


def test_processes_that_saw_other_orders_agree_on_one() -> None:
    """That of the sums of places, 4 2 6 7 here: a layer that was silent on one of the three is the last there."""
    orders = ([0, 1, 2, 3], [0, 1, 3, 2], [1, 2, 3])
    models = [layers() for _ in orders]

    def found(place: Place) -> list[list[int]]:
        stacks = Curvature(models[place.rank], block_size=3).factors
        reducer = FactorReducer(stacks, place.world, lambda: (0, 1, 2, 3), by_size(1), lambda: False)
        for layer in orders[place.rank]:
            reducer.expect(layer)
            reducer.mark_ready(layer)
        reducer.sum()
        return [list(bucket.numbers) for bucket in reducer._opened()]

    assert on_ranks(3, None, found) == [[[1], [0], [2], [3]]] * 3


# ── buckets ──


def test_split_indices_count_as_nn_thor_does() -> None:
    """54 layers with A and G, each followed by a norm but the last: [26, 53] makes 0 to 26 and 27 to 53."""
    has_A = [True, False] * 53 + [True]
    first, second = by_layer([26, 53], has_A)(range(106, -1, -1), [1] * 107)
    assert sum(has_A[layer] for layer in first) == sum(has_A[layer] for layer in second) == 27
    assert (first, second) == (list(range(106, 53, -1)), list(range(53, -1, -1)))


def test_an_index_that_no_layer_has_is_refused() -> None:
    with pytest.raises(ValueError, match="names layer 5, but this model has 3 layers"):
        by_layer([1, 5], [True, True, False, True])
