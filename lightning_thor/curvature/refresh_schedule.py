"""Which layers are refreshed at which step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from lightning_thor.curvature.callables import IntStepFn
from lightning_thor.distributed.assignment import assign_greedily
from lightning_thor.factors.trace_rule import KEEP, STOP, UPDATE

Interval = int | IntStepFn


# Steps from a probe to the refresh that it asks for: the verdict reaches the host meanwhile, and nobody waits for it.
LAG = 2


NEVER = 2**62
"""The next step of a layer that is left out."""


class Verdicts(Protocol):
    """Where verdicts can be read once they have arrived (`trace_rule.HostCopy`)."""

    def read(self) -> list[int]:
        """One of ``KEEP``, ``UPDATE``, ``STOP`` for each probed layer."""


class _Probe(NamedTuple):
    """Layers that were probed and what was found, on its way."""

    step: int
    every: int
    layers: tuple[int, ...]
    verdicts: Verdicts


class RefreshSchedule:
    """Every layer at step 0, then each time ``every_n_steps`` applied steps have passed since its last turn.

    With a trace rule a layer's turn is a *probe*, which only looks at traces; ``LAG`` steps later the layer is
    refreshed, if the verdict was to update, or else waits for its next turn. A layer that stopped has no more turns.

    It reads nothing but applied steps, costs and verdicts, which are the same on every rank, so all ranks decide alike.

    Args:
        every_n_steps: a number, or a function of the step.
        n_layers: how many there are.
        stagger: spread the layers over the interval, so that each step refreshes about its share of them.
        probes: probe before each refresh but the first.

    >>> schedule = RefreshSchedule(10, n_layers=2)
    >>> schedule.due(0), schedule.refreshed(0), schedule.due(9), schedule.due(10)
    ((0, 1), None, (), (0, 1))
    """

    def __init__(self, every_n_steps: Interval, n_layers: int, stagger: bool = False, probes: bool = False) -> None:
        self.every_n_steps = every_n_steps
        self.stagger = stagger
        self.probes = probes
        self.next_steps = [0] * n_layers
        self.is_probe = [False] * n_layers
        """Whether a layer's next turn is a probe."""
        self.has_stopped = [False] * n_layers
        self.refreshes = 0
        """How many there were, counted by layer."""
        self._turns = 0
        self._probes_under_way: list[_Probe] = []

    def is_due(self, layer: int, step: int) -> bool:
        """True if the layer is probed or refreshed at ``step``."""
        return step >= self.next_steps[layer] and not self.has_stopped[layer]

    def due(self, step: int) -> tuple[int, ...]:
        """The layers to refresh at ``step``, in order."""
        return tuple(i for i, probe in enumerate(self.is_probe) if not probe and self.is_due(i, step))

    def probed(self, step: int) -> tuple[int, ...]:
        """The layers to probe at ``step``, in order."""
        return tuple(i for i, probe in enumerate(self.is_probe) if probe and self.is_due(i, step))

    def refreshed(self, step: int, costs: Sequence[float] | None = None, verdicts: Verdicts | None = None) -> None:
        """Note that the layers due at ``step`` were refreshed, and that those to be probed were probed.

        Args:
            step: of now.
            costs: of refreshing each layer, for the first staggered round; None takes them as equal.
            verdicts: on the probed layers.

        Raises:
            ValueError: the interval function gave something that is not a whole number of at least 1.
        """
        every = self._every(step)
        due, probed = self.due(step), self.probed(step)
        after_probes = self.probes and self._turns > 0
        offsets = [max(1, every - LAG) if after_probes else every] * len(due)
        if self.stagger and len(due) == sum(step < NEVER for step in self.next_steps):
            places = assign_greedily([1.0 if costs is None else costs[layer] for layer in due], every)
            offsets = [1 + place for place in places]
        for layer, offset in zip(due, offsets, strict=True):
            self.next_steps[layer] = step + offset
            self.is_probe[layer] = self.probes
        self.refreshes += len(due)
        self._turns += len(probed) if after_probes else len(due)
        if verdicts is not None:
            for layer in probed:
                self.next_steps[layer] = step + LAG
            self._probes_under_way.append(_Probe(step, every, probed, verdicts))

    def dismiss(self, layer: int) -> None:
        """Neither refresh nor probe a layer any more."""
        self.next_steps[layer], self.is_probe[layer], self.has_stopped[layer] = NEVER, False, False

    def dismissed(self) -> list[int]:
        """The layers that are neither refreshed nor probed any more."""
        return [layer for layer, step in enumerate(self.next_steps) if step >= NEVER]

    def settle(self, step: int | None = None) -> None:
        """Read the verdicts that count from ``step`` on; all of them without it."""
        while self._probes_under_way and (step is None or step >= self._probes_under_way[0].step + LAG):
            probe = self._probes_under_way.pop(0)
            for layer, verdict in zip(probe.layers, probe.verdicts.read(), strict=True):
                self.is_probe[layer] = verdict != UPDATE
                if verdict in (KEEP, STOP):
                    self.next_steps[layer] = probe.step + max(probe.every, LAG)
                self.has_stopped[layer] = verdict == STOP

    def turns(self, step: int) -> int:
        """How many refreshes, counted by layer, there would have been before ``step`` without a trace rule."""
        for layer, stopped in enumerate(self.has_stopped):
            while stopped and self.next_steps[layer] < step:
                self.next_steps[layer] += self._every(self.next_steps[layer])
                self._turns += 1
        return self._turns

    def restore(
        self, *, next_steps: list[int], is_probe: list[bool], has_stopped: list[bool], refreshes: int, turns: int
    ) -> None:
        """Go on from another schedule's state; probes of one that had a trace rule are refreshes without it."""
        self._probes_under_way.clear()
        self.next_steps = next_steps
        self.is_probe = [probe and self.probes for probe in is_probe]
        self.has_stopped = [stopped and self.probes for stopped in has_stopped]
        self.refreshes, self._turns = refreshes, turns

    def _every(self, step: int) -> int:
        every = self.every_n_steps(step) if callable(self.every_n_steps) else self.every_n_steps
        if not isinstance(every, int) or every < 1:
            raise ValueError(
                f"update_every_n_steps({step}) gave {every!r}; it must give an int, the number of steps until the next "
                "refresh, at least 1."
            )
        return every
