"""Laws of the trace rule: what is decided, when, at what price, alike on all ranks and after a resume."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, ThorCallback, configure_thor
from lightning_thor.curvature.refresh_schedule import DECISION_DELAY_STEPS, RefreshSchedule
from lightning_thor.factors.trace_rule import KEEP, STOP, UPDATE
from lightning_thor.linalg.memory import HostCopy
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, trainer, without_words
from tests.helpers.watch import Watch


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def batch(number: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def observe(model: nn.Module, x: Tensor) -> None:
    """Forward and backward of a mean loss; the weights are left alone, so a batch has the same rows at any step."""
    model(x).sin().sum(1).mean().backward()


# ── what is decided ──


@pytest.mark.parametrize("rule", [(0.1, 0.03), (0.05, 0.05), (0.2, 0.0)])
@pytest.mark.parametrize("averaging", [0.0, 0.6])
@pytest.mark.parametrize(("damping_rule", "damping"), [("sqrt", 0.01), ("pi", 0.01), ("trace", 0.2)])
def test_each_layer_does_what_the_papers_inequalities_say(
    rule: tuple[float, float], averaging: float, damping_rule: Any, damping: float
) -> None:
    """Every layer against a bookkeeping in float64 of its own: factors of each batch, Δ, and what follows."""
    every, steps = 4, 25
    options: dict[str, Any] = {"damping_rule": damping_rule, "damping": damping, "averaging": averaging}
    model = net()
    curvature = Curvature(model, trace_rule=rule, update_every_n_steps=every, **options)
    scales = torch.linspace(1.0, 0.7, steps).tolist()
    factors = [factors_of(batch(step, scales[step])) for step in range(steps)]
    expected = {name: Bookkeeping(rule, averaging, damping_rule, damping, every) for name in curvature.layers}
    seen: set[int] = set()
    for step in range(steps):
        observe(model, batch(step, scales[step]))
        curvature.update()
        for name, book in expected.items():
            book.step(step, factors[step][name], factors)
            index = list(curvature.layers).index(name)
            assert int(curvature.factors.updates[index]) == book.updates, f"{name} after step {step}"
            seen |= book.verdicts
    turns = len(range(0, steps, every)) * len(expected)
    # The last decisions are not followed yet.
    inverted = sum(step < steps - DECISION_DELAY_STEPS for book in expected.values() for step in book.refreshes)
    assert curvature.refreshes == (inverted, turns)
    assert UPDATE in seen
    assert len(seen) > 1, "these thresholds decide nothing"


def factors_of(x: Tensor) -> dict[str, tuple[Tensor | None, Tensor]]:
    """A and G of each layer of `net` from one batch: a curvature that sees nothing else."""
    model = net()
    alone = Curvature(model, averaging=0.0)
    observe(model, x)
    alone.update()
    layers = alone.state_dict()["layers"]
    return {name: (layers[name].get("A"), layers[name]["G"]) for name in layers}


class Bookkeeping:
    """The rule in plain numbers, for one layer with factors of one block."""

    def __init__(self, rule: tuple[float, float], averaging: float, damping_rule: str, damping: float, every: int):
        self.rule, self.averaging, self.damping_rule, self.damping = rule, averaging, damping_rule, damping
        self.every = every
        self.average: tuple[Tensor | None, Tensor] | None = None
        self.updates, self.turn, self.stopped = 0, 0, False
        self.refreshes: list[int] = []
        self.verdicts: set[int] = set()

    def trace(self, pair: tuple[Tensor | None, Tensor]) -> float:
        sides = [(f.diagonal(dim1=-2, dim2=-1).sum(), f.shape[1] * f.shape[2]) for f in pair if f is not None]
        product, added = 1.0, self.damping if self.damping_rule != "trace" else 1.0
        for trace, width in sides:
            product *= float(trace)
            added *= width * (self.damping * float(trace) / width if self.damping_rule == "trace" else 1.0)
        return product + added

    def mixed(self, pair: tuple[Tensor | None, Tensor]) -> tuple[Tensor | None, Tensor]:
        if self.average is None:
            return pair
        weight = (1 - self.averaging) / (1 - self.averaging ** (self.updates + 1))
        (old_A, old_G), (A, G) = self.average, pair
        return None if A is None or old_A is None else old_A.lerp(A, weight), old_G.lerp(G, weight)

    def step(self, step: int, pair: tuple[Tensor | None, Tensor], factors: list[Any]) -> None:
        if step != self.turn or self.stopped:
            return
        self.turn = step + self.every
        if self.average is not None:
            old, new = self.trace(self.average), self.trace(self.mixed(pair))
            change = abs(new - old) / old
            self.stopped = change < self.rule[1]
            self.verdicts |= {UPDATE if change > self.rule[0] else STOP if self.stopped else KEEP}
            if change <= self.rule[0]:
                return
        self.average = self.mixed(pair)
        self.updates += 1
        self.refreshes.append(step)


@pytest.mark.parametrize("stagger", [False, True])
def test_thor_nt_is_no_rule_at_all(stagger: bool) -> None:
    states = []
    for rule in ("THOR_NT", (0, 0), None):
        model = net()
        curvature = Curvature(model, trace_rule=rule, update_every_n_steps=3, stagger=stagger)
        for step in range(8):
            observe(model, batch(step))
            curvature.update()
        states.append(without_words(curvature.state_dict()))
    assert_bitwise(states[1:], [states[0]] * 2)


def test_the_loss_scale_and_accumulation_change_no_verdict() -> None:
    """Four parts of a batch, scaled by 128 / 4, are the batch: also for the traces."""
    whole, parts = net(), net()
    one = Curvature(whole, trace_rule=(0.2, 0.05), update_every_n_steps=2)
    four = Curvature(parts, trace_rule=(0.2, 0.05), update_every_n_steps=2, loss_multiplier=lambda: 128 / 4)
    for step in range(13):
        x = batch(step, 0.9**step)
        observe(whole, x)
        for part in x.chunk(4):
            (parts(part).sin().sum(1).mean() * (128 / 4)).backward()
        one.update()
        four.update()
    assert one.refreshes == four.refreshes
    assert 0 < one.refreshes[0] < one.refreshes[1]
    torch.testing.assert_close(without_words(four.state_dict()), without_words(one.state_dict()))


# ── its price ──


def test_a_layer_that_is_kept_is_not_inverted_and_nothing_waits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 9, 3), nn.Flatten(), nn.Linear(9 * 36, 3))
    curvature = Curvature(model, trace_rule=(1e9, 0.0), update_every_n_steps=3)
    x = torch.randn(4, 8, 8, 8)
    for step in range(9):
        with Watch() as watch:
            model(x).square().mean().backward()
            curvature.update()
        assert (watch.called["linalg_cholesky_ex"] > 0) == (step == 0)
        assert not watch.waiting, f"step {step} waits by {watch.waiting}"
    assert curvature.refreshes == (2, 6)


def test_steps_between_turns_launch_nothing() -> None:
    model = net()
    curvature = Curvature(model, trace_rule=(1e9, 0.0), update_every_n_steps=4)
    launched = []
    for step in range(9):
        observe(model, batch(step))
        with Watch() as watch:
            curvature.update()
        launched.append(watch.called.total())
    assert [count > 0 for count in launched] == [step % 4 == 0 for step in range(9)]


# ── what goes wrong ──


def test_a_batch_that_is_not_finite_keeps_the_curvature_and_is_counted() -> None:
    model = net()
    curvature = Curvature(model, trace_rule="THOR_stop", update_every_n_steps=3)
    for step in range(6):
        observe(model, batch(step) * (float("inf") if step == 3 else 1.0))
        curvature.update()
    assert curvature.refreshes == (4, 8)
    assert int(curvature.factors.rejected_windows) == 4
    assert not any(curvature._schedule.has_stopped)


def test_a_layer_that_was_silent_is_refreshed_once_it_speaks() -> None:
    model = nn.ModuleDict({"always": nn.Linear(3, 2), "late": nn.Linear(3, 2)})
    curvature = Curvature(model, trace_rule="THOR_stop", update_every_n_steps=3)

    def run() -> None:
        for step in range(9):
            x = torch.randn(5, 3)
            y = model["always"](x) + (model["late"](x) if step > 3 else 0.0)
            y.square().mean().backward()
            curvature.update()

    with pytest.warns(UserWarning, match="late"):
        run()
    late = curvature.state_dict()["layers"]["late"]
    assert float(late["updates"]) == 1.0  # silent at 3; at 6 it had a pair, and its first inverse at 8
    assert bool(late["A_inverted"].all())


# ── when ──


def test_a_turn_comes_once_in_an_interval_whatever_was_decided() -> None:
    schedule = RefreshSchedule(5, n_layers=3, has_trace_rule=True)
    events = []
    for step in range(16):
        due, inverted = schedule.due(), schedule.due_inversions()
        if due or inverted:
            events.append((step, due, inverted))
        decided = torch.tensor([(UPDATE, KEEP, STOP)[layer] for layer in due])
        decisions = HostCopy(decided) if schedule.decides else None
        schedule.advance(decisions=decisions)
        assert schedule.turns() == 3 * (step // 5 + 1)
    delay = DECISION_DELAY_STEPS
    assert events == [
        (0, (0, 1, 2), (0, 1, 2)),
        (5, (0, 1, 2), ()), (5 + delay, (), (0,)),
        (10, (0, 1), ()), (10 + delay, (), (0,)),
        (15, (0, 1), ()),
    ]  # fmt: skip
    assert (schedule.refreshes, schedule.turns()) == (3 + 2, 3 * 4)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_inversions_follow_their_decisions_at_any_interval(every: int) -> None:
    model = net()
    curvature = Curvature(model, trace_rule=(1e-9, 0.0), update_every_n_steps=every)
    inverses = []
    for step in range(12):
        observe(model, batch(step))
        curvature.update()
        assert int(curvature.factors.updates[0]) == 1 + step // every
        inverses.append(curvature.factors.blocks(0, "A", "inverse").clone())
    changed = [not torch.equal(before, after) for before, after in pairwise(inverses)]
    assert changed == [
        step - DECISION_DELAY_STEPS >= every and (step - DECISION_DELAY_STEPS) % every == 0 for step in range(1, 12)
    ]


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_layer_that_stopped_takes_nothing_more_at_any_interval(every: int, resumes: bool) -> None:
    """Not at the turns before the host learns of it either. Inputs of ones alone, so that traces are counts: 18 and 12
    of 16 are the thresholds themselves, 14 of 16 is the second again, and 15 is below it."""

    def new() -> tuple[nn.Module, Curvature]:
        model = nn.Linear(40, 2, bias=False).double()
        options: dict[str, Any] = {"averaging": 0.0, "damping_rule": "sqrt", "damping": 1e-30}
        return model, Curvature(model, trace_rule=(0.25, 0.125), update_every_n_steps=every, **options)

    model, curvature = new()
    updates = {16: 1, 20: 1, 18: 1, 12: 1, 14: 1, 15: 1, 40: 1, 8: 1, 24: 1}
    for ones, expected in updates.items():
        for _ in range(every):
            model(torch.arange(40, dtype=torch.float64)[None].lt(ones).double()).sum().backward()
            curvature.update()
            if resumes:
                state = curvature.state_dict()
                model, curvature = new()
                curvature.load_state_dict(state)
        assert int(curvature.factors.updates[0]) == expected, f"{ones} ones"
    assert curvature.refreshes == (1, len(updates))


# ── resume, ranks, Trainer ──


def test_a_fit_with_a_rule_logs_the_share_and_resumes_bitwise(tmp_path: Path) -> None:
    def callback() -> ThorCallback:
        return ThorCallback(update_every_n_steps=3, trace_rule=(0.4, 0.01), summary=False)

    each = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    unbroken = trainer(tmp_path, callback(), each, enable_checkpointing=True, max_epochs=3)
    unbroken.fit(Boring())
    curvature = callback_of(unbroken).curvature
    done, turns = curvature.refreshes
    assert 0 < done < turns
    resumed = trainer(tmp_path, callback(), max_epochs=3)
    resumed.fit(Boring(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert_bitwise(everything(resumed), everything(unbroken))


def test_a_training_with_a_rule_steps_with_the_kept_inverses() -> None:
    """A layer that is kept is preconditioned with its old inverse, not with its plain gradient."""
    model = net()
    curvature = Curvature(model, trace_rule=(1e9, 0.0), update_every_n_steps=2)
    optimizer = configure_thor(model, preconditioner=curvature)
    for step in range(5):
        optimizer.zero_grad()
        observe(model, batch(step))
        optimizer.step()
        if step == 0:
            first = curvature.factors.blocks(0, "A", "inverse").clone()
    assert_bitwise(curvature.factors.blocks(0, "A", "inverse"), first)
    assert not torch.equal(first[0, 0], torch.eye(6).double())
