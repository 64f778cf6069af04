"""What all processes agree on at first: the unit of gradients, and of each layer whether its pairs fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from lightning_thor.distributed.communicator import Communicator
from lightning_thor.factors.state import ROWS, FactorState
from lightning_thor.layers.pairs import NOT_A_PAIR, PairChecks
from lightning_thor.linalg import memory
from lightning_thor.linalg.memory import HostCopy


class Agreement:
    """One unit of gradients for all processes, and the layers whose pairs one of them found not to be their weight's.

    Several processes agree before the all-reduce of their first window, and again at refreshes of layers that none of
    them had used by then. A process that is alone looks for such layers before every refresh.

    Args:
        factors: of all layers; what was observed of a layer that does not fit is taken out.
        checks: of the layers' pairs.
        misfits: why pairs of a layer are not rows of its weight, by number of the layer, as this process found so far.

    Attributes:
        is_reached: whether there was one, or a checkpoint brought its result.
        found: its result on its way to the host, until `read`.
    """

    def __init__(self, factors: FactorState, checks: PairChecks, misfits: Mapping[int, str]) -> None:
        self._factors, self._checks, self._misfits = factors, checks, misfits
        self.is_reached = False
        self.found: HostCopy | None = None
        self._is_alone = True
        self._unused = checks.numbers
        """Layers to check that no process had used when several agreed; equal on all of them."""

    def reach(
        self, communicator: Communicator, due: Callable[[], Iterable[int]], dismissed: Iterable[int]
    ) -> dict[int, str]:
        """Agree, if it is time: one small all-gather, and no device sync.

        Args:
            communicator: of all processes.
            due: returns the numbers of the layers of this refresh.
            dismissed: numbers of the layers that are refreshed no more.

        Returns:
            As `read`, if that waits for no device; else nothing.
        """
        factors, unit = self._factors, self._factors.gradient_unit
        is_first, self.is_reached = not self.is_reached, True
        is_alone = self._is_alone = communicator.world_size == 1
        if not (is_alone or is_first) and self._unused.isdisjoint(due()):
            return {}
        verdicts, known = self._checks.collect(), self._misfits.keys() - dismissed
        if is_alone and not (is_first or verdicts or known):
            return {}
        counts = factors.counts
        no, yes = counts.new_zeros(()), counts.new_ones(())
        flags = [yes if i in known else verdicts.get(i, no).to(factors.dtype) for i in range(len(counts))]
        own_unit = torch.as_tensor(1.0 if unit is None else unit, dtype=no.dtype, device=no.device)
        told = torch.stack([own_unit.log2(), *flags])
        if not is_alone:
            used = (counts[:, ROWS] > 0).to(told) / 2
            told[1:] = told[1:].maximum(used)
            all_told = communicator.all_gather(told).view(communicator.world_size, -1)
            most, least = all_told.amax(0), all_told.amin(0)
            # The one farthest from 1: a process that has seen nothing, or zeros, says 1.
            told = torch.cat([torch.where(most[:1] >= -least[:1], most[:1], least[:1]), most[1:]])
            if is_first:
                factors.change_unit_(told[0].exp2())
        # A layer that does not fit was not observed, as long as the host does not know of it.
        counts.mul_((told[1:] < 1)[:, None])
        self.found = HostCopy(told)
        return self.read() if told.device.type in memory.HOST else {}

    def go_on(self, communicator: Communicator) -> None:
        """Take what a checkpoint brought for the result of earlier agreements of all processes."""
        self.is_reached = self._factors.gradient_unit is not None
        if communicator.world_size > 1:
            self._unused = {i for i in self._unused if not self._factors.updates[i]}
            self._checks.keep(self._unused)

    def read(self) -> dict[int, str]:
        """Take the unit over; returns why layers do not fit, by number."""
        if self.found is None:
            return {}
        (exponent, *flags), self.found = self.found.read(), None
        self._factors.gradient_unit = 2.0**exponent
        if not self._is_alone:
            self._unused = {i for i in self._unused if not flags[i]}
            self._checks.keep(self._unused)
        return {i: self._misfits.get(i, NOT_A_PAIR) for i, flag in enumerate(flags) if flag == 1}
