"""Which layers are observed and which are inverted at which step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple

import torch

from lightning_thor.curvature.callables import IntStepFn
from lightning_thor.distributed.assignment import assign_greedily
from lightning_thor.factors.trace_rule import STOP, UPDATE
from lightning_thor.linalg.memory import HostCopy

Interval = int | IntStepFn

# Steps from a decision by traces to the inversions that follow it: it reaches the host meanwhile, and nobody waits.
DECISION_DELAY_STEPS = 2
NO_WINDOW, HAD_WINDOW, REJECTED = 0, 1, 3
"""What is known of a layer after a refresh: its average holds no window, holds one, or holds none because the last one
was not finite. Checkpoints list `REJECTED` among a trace rule's decisions, so it is another number than these."""
NEVER = 2**62
"""The next step of a layer that is left out."""


def frequent_at_first(step: int) -> int:
    """Steps until the next refresh by default: a tenth of the steps so far, from 1 to 10; from step 1000 on a
    hundredth, at most 100, which is nn.thor's interval.

    A network moves fast at first, and directions from stale curvature then lead astray: THOR's paper (AAAI 2021)
    refreshes often at first too.

    >>> [frequent_at_first(step) for step in (0, 19, 20, 55, 100, 1000, 2500, 20_000)]
    [1, 1, 2, 5, 10, 10, 25, 100]
    """
    return max(1, min(step // 10, 10), min(step // 100, 100))


class _Pending(NamedTuple):
    """Layers, and what was decided or found of each at a step, on its way to the host."""

    step: int
    layers: tuple[int, ...]
    decisions: HostCopy

    def layers_with(self, decision: int) -> list[int]:
        return [layer for layer, each in zip(self.layers, self.decisions.read(), strict=True) if each == decision]


class RefreshSchedule:
    """Every layer at step 0, then each time ``every_n_steps`` applied steps have passed since its last turn.

    At its turn a layer is observed, averaged and inverted. With a trace rule the traces of its statistics decide first:
    its average takes them only if they moved, and it is inverted `DECISION_DELAY_STEPS` later. A layer that stopped has
    no more turns.

    A layer that has no curvature yet, and whose statistics at its turn were not finite, has another turn two steps
    later: the host learns of it in the step between, so that nobody waits.

    Nothing is read here but applied steps, costs, decisions and rejections, which are equal on all ranks: all ranks
    decide alike.

    Args:
        every_n_steps: a number, or a function of the step; None is `frequent_at_first`.
        n_layers: how many there are.
        stagger: spread the layers over the interval, so that each step refreshes about its share of them.
        has_trace_rule: whether traces decide, at all turns but the first.
        together: of each layer a name; layers of one name are not spread. None: each has its own.

    >>> schedule = RefreshSchedule(10, n_layers=2)
    >>> schedule.due(), schedule.due_inversions()
    ((0, 1), (0, 1))
    >>> schedule.advance()
    >>> schedule.due()
    ()
    """

    def __init__(
        self,
        every_n_steps: Interval | None,
        n_layers: int,
        stagger: bool = False,
        has_trace_rule: bool = False,
        together: Sequence[str] | None = None,
    ) -> None:
        self.every_n_steps: Interval = frequent_at_first if every_n_steps is None else every_n_steps
        self.stagger, self.has_trace_rule = stagger, has_trace_rule
        self._together: Sequence[Any] = range(n_layers) if together is None else together
        self.costs: list[float] = []
        """Of refreshing each layer, to spread them evenly if `stagger`; empty until the first refresh."""
        self.step = 0
        """Applied steps so far."""
        self.next_steps = [0] * n_layers
        self.has_stopped = [False] * n_layers
        self.refreshes = 0
        """Inversions so far, counted by layer."""
        self.inverted_at = [-1] * n_layers
        """The step of each layer's last inversion, or the last one before this schedule was restored."""
        self._turns = 0
        self._pending: list[_Pending] = []
        self._first_windows: _Pending | None = None
        """What the step before found of the due layers, if not all of them are among `have_windows`."""
        self.have_windows: set[int] = set()
        """The layers of which the host knows that they have had a window."""
        self._find_turns()

    def is_due(self, layer: int) -> bool:
        """True if the coming step observes the layer."""
        return self.step >= self.turns_at[layer]

    @property
    def is_any_due(self) -> bool:
        """True if the coming step observes some layer."""
        return self.step >= self.earliest

    @property
    def has_work(self) -> bool:
        """True if the coming step observes or inverts some layer, or reads a decision."""
        return self.step >= self.earliest or bool(self._pending) or self._first_windows is not None

    @property
    def decides(self) -> bool:
        """True if traces decide at the coming step whether averages take what was observed."""
        return self.has_trace_rule and self._turns > 0

    @property
    def on_the_way(self) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        """Decisions that are not followed yet: the layers, and what was decided of each, on its device."""
        return [(one.layers, one.decisions.source) for one in self._pending]

    def due(self) -> tuple[int, ...]:
        """The layers that the coming step observes, in order."""
        if self.step < self.earliest:
            return ()
        step = self.step
        return tuple([layer for layer, turn in enumerate(self.turns_at) if step >= turn])

    def due_inversions(self) -> tuple[int, ...]:
        """The layers that the coming step inverts, in order."""
        return self._decided(UPDATE) if self.decides else self.due()

    def advance(self, decisions: HostCopy | None = None, first_windows: HostCopy | None = None) -> None:
        """Go on to the next step: the due layers were observed, and those of `due_inversions` inverted. Where there
        was no work, adding 1 to `step` does the same.

        Args:
            decisions: for the due layers, where traces decide: ``KEEP``, ``UPDATE`` or ``STOP``.
            first_windows: for the due layers, if not all of them are among `have_windows`: ``NO_WINDOW``,
                ``HAD_WINDOW`` or ``REJECTED``.

        Raises:
            ValueError: the interval function returned something that is not a whole number of at least 1.
        """
        due = self.due()
        inverted = self._decided(UPDATE) if self.decides else due
        self.refreshes += len(inverted)
        for layer in inverted:
            self.inverted_at[layer] = self.step
        if self._pending:
            for layer in self._decided(STOP):
                self.has_stopped[layer] = True
            self._pending = [one for one in self._pending if one.step + DECISION_DELAY_STEPS > self.step]
        if due:
            every = self._every(self.step)
            for layer, next_step in zip(due, self._spread(due, every), strict=True):
                self.next_steps[layer] = next_step
            self._turns += len(due)
            if decisions is not None:
                self._pending.append(_Pending(self.step, due, decisions))
        self.step += 1
        if self._first_windows is not None:
            self._repeat_rejected(self._first_windows, due)
        self._first_windows = None if first_windows is None else _Pending(self.step - 1, due, first_windows)
        self._find_turns()

    def dismiss(self, layer: int) -> None:
        """Have no more turns of a layer."""
        self.next_steps[layer], self.has_stopped[layer] = NEVER, False
        self._find_turns()

    def dismissed(self) -> list[int]:
        """The layers that have no more turns because they are left out."""
        return [layer for layer, step in enumerate(self.next_steps) if step >= NEVER]

    def mean_age(self) -> float:
        """Steps between the last step and the inversion of the inverses that it used, on average over the layers that
        are not left out; after `restore`, which does not know when that was, counted from there."""
        both = zip(self.inverted_at, self.next_steps, strict=True)
        ages = [self.step - 1 - at for at, next_step in both if next_step < NEVER]
        return sum(ages) / max(len(ages), 1)

    def turns(self) -> int:
        """How many refreshes, counted by layer, there would have been so far without a trace rule."""
        for layer, stopped in enumerate(self.has_stopped):
            while stopped and self.next_steps[layer] < self.step:
                self.next_steps[layer] += self._every(self.next_steps[layer])
                self._turns += 1
        return self._turns

    def pending(self) -> list[list[Any]]:
        """Decisions and rejections that are to be followed, each as ``[step, layers, decisions]`` (plain types); waits
        for them."""
        # Lists alone, which torch.distributed.checkpoint stores under one key, however many they are.
        decided = [[one.step, list(one.layers), [int(each) for each in one.decisions.read()]] for one in self._pending]
        first = self._first_windows
        rejected = [] if first is None else first.layers_with(REJECTED)
        return decided + ([[first.step, rejected, [REJECTED] * len(rejected)]] if first and rejected else [])

    def restore(
        self,
        *,
        step: int,
        next_steps: list[int],
        has_stopped: list[bool],
        refreshes: int,
        turns: int,
        pending: Sequence[Sequence[Any]] = (),
        costs: Sequence[float] = (),
    ) -> None:
        """Go on from another schedule's state; without a trace rule no layer has stopped."""
        self.inverted_at = [step - 1] * len(next_steps)
        self.step, self.next_steps = step, next_steps
        self.has_stopped = [stopped and self.has_trace_rule for stopped in has_stopped]
        self.refreshes, self._turns, self.costs = refreshes, turns, list(costs)
        found = [
            _Pending(at, tuple(layers), HostCopy(torch.tensor(decisions, dtype=torch.int64, device="cpu")))
            for at, layers, decisions in pending
        ]
        self._pending = [one for one in found if self.has_trace_rule and not one.layers_with(REJECTED)]
        self._first_windows = next((one for one in found if one.layers_with(REJECTED)), None)
        self.have_windows = set()
        self._find_turns()

    def _decided(self, decision: int) -> tuple[int, ...]:
        """The layers for which it was decided so, where the coming step follows it."""
        ripe = [one for one in self._pending if self.step >= one.step + DECISION_DELAY_STEPS]
        found = [layer for one in ripe for layer in one.layers_with(decision) if self.next_steps[layer] < NEVER]
        return tuple(sorted(found))

    def _repeat_rejected(self, first_windows: _Pending, due: tuple[int, ...]) -> None:
        """Read which layers have had a window, and have another turn, at the coming step, of those whose first one was
        rejected; not of ``due`` ones, which just had one."""
        self.have_windows.update(first_windows.layers_with(HAD_WINDOW))
        for layer in first_windows.layers_with(REJECTED):
            if layer not in due and self.next_steps[layer] < NEVER:
                self.next_steps[layer] = min(self.next_steps[layer], self.step)

    def _spread(self, due: tuple[int, ...], every: int) -> list[int]:
        """The next step of each of these layers, ``every`` steps from now; if staggered, some go to steps before it at
        which no other layer is due, as at the first refresh and after the interval has grown."""
        last = self.step + every
        if not self.stagger:
            return [last] * len(due)
        both = zip(self.next_steps, self.has_stopped, strict=True)
        taken = {step for layer, (step, stopped) in enumerate(both) if layer not in due and not stopped}
        steps = range(self.step + 1, last + 1)
        costs: dict[Any, float] = {}
        for layer in due:
            one = self._together[layer]
            costs[one] = costs.get(one, 0.0) + (self.costs[layer] if self.costs else 1.0)
        # Where others have turns, the whole interval first; one for each cost, since an interval may be any number.
        free = (step for step in (reversed(steps) if taken else steps) if step not in taken or step == last)
        chosen = list(islice(free, len(costs)))
        places = dict(zip(costs, assign_greedily(list(costs.values()), len(chosen)), strict=True))
        return [chosen[places[self._together[layer]]] for layer in due]

    def _find_turns(self) -> None:
        both = zip(self.next_steps, self.has_stopped, strict=True)
        self.turns_at = [NEVER if stopped else step for step, stopped in both]
        """The step from which on each layer is due."""
        self.earliest = min(self.turns_at, default=NEVER)
        """The step from which on some layer is due."""

    def _every(self, step: int) -> int:
        every = self.every_n_steps(step) if callable(self.every_n_steps) else self.every_n_steps
        if not isinstance(every, Integral) or every < 1:
            raise ValueError(
                f"update_every_n_steps({step}) gave {every!r}; it must give an int, the number of steps until the next "
                "refresh, at least 1."
            )
        return int(every)
