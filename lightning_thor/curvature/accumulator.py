"""What happens to a pair (a, g) on its way into the open window."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_thor.curvature.refresh_schedule import RefreshSchedule
from lightning_thor.distributed.factor_reducer import FactorReducer
from lightning_thor.factors.state import FactorState
from lightning_thor.layers.base import Layer, ModuleUse
from lightning_thor.layers.discovery import name_some
from lightning_thor.layers.weight_product import backward_pass
from lightning_thor.linalg.block_diagonal import add_covariance_

EXPONENT_STEP, LARGEST_EXPONENT = 32, 96
"""The unit of gradients is 2 to a multiple of the former, up to the latter: 1, but for very small or large losses."""


class FactorAccumulator:
    """Adds pairs to the open window, as covariances or, where a layer is only probed, as their traces.

    Args:
        layers: with curvature, by name; in the order of ``stacks`` and ``schedule``.
        stacks: where the sums of the open window lie.
        schedule: says which layers are only probed.
        backward_pass: gives the number of the backward pass that a pair comes in, below 0 outside of one.

    Attributes:
        uses: the index of the layer and the use of it, by the name of the module.
        loss_layer: the name of the module whose output's gradient came first in the first backward pass: its output is
            taken to be what the loss is a mean over.
        misfits: why layers cannot have the curvature that they were thought to have, by index.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        stacks: FactorState,
        schedule: RefreshSchedule,
        backward_pass: Callable[[], int] = backward_pass,
    ) -> None:
        self._layers, self._stacks, self._schedule = list(layers.values()), stacks, schedule
        self.uses = {use.name: (index, use) for index, layer in enumerate(self._layers) for use in layer.uses}
        self.loss_layer: str | None = None
        self.misfits: dict[int, str] = {}
        self._backward_pass = backward_pass
        self._observed: set[int] = set()
        """The layers that had a pair in the open window."""
        self._backward: dict[int, tuple[int, float, float]] = {}
        """The last backward pass that used a layer, how many samples were taken of its first use in it, and of how
        many."""
        self._terms: tuple[int, int, float] = -1, -1, 0
        """A backward pass, the layer whose output goes into its loss, and how many terms the mean of that has."""
        self._noted: float | None = None
        """The same of the coming backward pass, from the output of `loss_layer` where that is not observed."""
        self._told_late = False
        self._told_silent: set[int] = set()
        self._checked = False

    def observe(
        self,
        name: str,
        a: Tensor,
        g: Tensor,
        window: FactorReducer,
        *,
        max_rows: int | None,
        loss_reduction: str,
        loss_multiplier: Callable[[], float | Tensor] | None,
        loss_terms: Callable[[], float | Tensor] | None = None,
    ) -> None:
        """Add one call of a layer to the open window; a pair that comes too late for it is left out, with a warning.

        Args:
            name: of the layer, or of another module that is tied to it.
            a: its input.
            g: the gradient of the loss, as it was differentiated, with respect to its output.
            window: the open window's way over processes, which is told.
            max_rows, loss_reduction, loss_multiplier, loss_terms: see `lightning_thor.Curvature`.
        """
        index, use = self.uses[name]
        self._observed.add(index)
        layer, stacks = self._layers[index], self._stacks
        if index in self.misfits or self._is_misfit(index, use, a, g, max_rows):
            return
        if window.is_late(index):
            self._warn_of_late_pair(layer.name)
            return
        sums_A, sums_G = stacks.sums[2 * index : 2 * index + 2]
        # To the gradient of the per-sample loss. Rows are converted first: a float16 gradient would overflow.
        n_seen, per_sample = layer.loss_terms(use.module, g), 1.0 if loss_terms is None else loss_terms()
        if loss_reduction == "mean" and loss_terms is None:
            per_sample = self._terms_of_the_loss(index, name, n_seen)
        scale = per_sample / (1.0 if loss_multiplier is None else loss_multiplier())
        g = self._in_its_unit(g, scale)
        if self._schedule.is_probe[index]:
            squares = layer.squares(a, g, stacks.dtype, max_rows, use.module)
            weight, n_samples = self._use_weight(index, squares.n_samples, n_seen)
            trace_A = 0.0 if squares.a is None else squares.a
            stacks.count(index, squares.n_rows, n_samples, trace_A, squares.g * (scale * weight) ** 2)
            window.mark_ready(index)
            return
        seen = layer.observe(a, g, stacks.dtype, max_rows, use.module)
        if layer.A is not None and seen.a is not None:
            assert sums_A is not None
            add_covariance_(sums_A, seen.a, layer.A)
        if seen.token_counts is not None:
            assert sums_A is not None
            sums_A.add_(seen.token_counts)
        weight, n_samples = self._use_weight(index, seen.n_samples, n_seen)
        if weight != 1.0:
            scale = scale * weight
        assert sums_G is not None
        add_covariance_(sums_G, seen.g, layer.G, scale)
        stacks.count(index, seen.n_rows, n_samples, a.numel() + g.numel() if self._schedule.stagger else 0.0)
        window.mark_ready(index)

    def note_output(self, name: str, output: Any) -> None:
        """The output of a module that is not observed in this step, while others are: of `loss_layer` it tells how many
        terms the loss has."""
        if name == self.loss_layer and isinstance(output, Tensor):
            index, use = self.uses[name]
            self._noted = self._layers[index].loss_terms(use.module, output)

    def _terms_of_the_loss(self, index: int, name: str, n_seen: float) -> float:
        """How many terms the mean of the loss has: as many as the output whose gradient comes first in a backward pass
        has rows, for that goes into the loss. A layer that saw some of them (an expert, a region, masked tokens) is one
        of the same loss. Each output of the layer that comes first is taken to go into a mean of its own.

        Args:
            index: of the layer.
            name: of the module that a pair came from.
            n_seen: the number of terms, if what this module saw is all.
        """
        number = self._backward_pass()
        if number < 0 or not n_seen:
            return n_seen
        if self._terms[0] != number:
            self._terms = number, index, n_seen if self._noted is None else self._noted
            self.loss_layer = self.loss_layer or name
        return n_seen if index == self._terms[1] and self._noted is None else self._terms[2]

    def _in_its_unit(self, g: Tensor, scale: float | Tensor) -> Tensor:
        """``g`` over the unit of gradients, which the first pair decides; no device sync."""
        stacks = self._stacks
        if stacks.gradient_unit is None and g.numel():
            largest = torch.log2(g.detach().abs().amax().double() * scale)
            steps = (largest / EXPONENT_STEP).nan_to_num(0.0, 0.0, 0.0).round()
            exponent = (EXPONENT_STEP * steps).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
            stacks.gradient_unit = torch.exp2(exponent).to(stacks.dtype)
        unit = stacks.gradient_unit
        return g if unit is None or (not isinstance(unit, Tensor) and unit == 1.0) else g.to(stacks.dtype) / unit

    def _is_misfit(self, index: int, use: ModuleUse, a: Tensor, g: Tensor, max_rows: int | None) -> bool:
        """Whether a pair is none of rows of the layer's weight, which is then noted."""
        layer = self._layers[index]
        may_be_subsampled = a.dim() == 2 and len(a) == max_rows
        if layer.kind.fits(use.module, a, g, is_whole=not may_be_subsampled):
            return False
        self.misfits[index] = (
            f"its input {list(a.shape)} and its output's gradient {list(g.shape)} are not rows of its weight "
            f"{list(use.weight.shape)}"
        )
        return True

    def subsample_input(self, name: str, a: Tensor, max_rows: int | None) -> Tensor:
        """What of an input has to wait for its gradient: where rows are taken of it anyway, these alone."""
        index, _ = self.uses[name]
        return self._layers[index].subsample_input(a, max_rows)

    def _use_weight(self, index: int, n_taken: float, n_seen: float) -> tuple[float, float]:
        """What to multiply the gradients of one use of a layer by, and how many samples it adds.

        G is an expectation over samples of a sum over uses, as it is of a sum over positions in a convolution: the
        uses of one backward pass share their samples, which count once, as those of the first use. So A ⊗ G has the
        scale of E[Σ_uses gᵤgᵤᵀ ⊗ aᵤaᵤᵀ], whatever the number of uses. A use that saw fewer samples than the first is
        one of fewer, but for the layer that the loss is a mean over the outputs of: there each has its own expectation.

        Args:
            index: of the layer.
            n_taken: how many samples the rows that were taken belong to.
            n_seen: how many there were.
        """
        backward, first = self._backward_pass(), self._backward.get(index)
        if backward < 0 or first is None or first[0] != backward or not first[1]:
            self._backward[index] = backward, n_taken, n_seen
            return 1.0, n_taken
        # Of a convolution of which few rows are taken they may be fewer than one; none: no rows, whatever their weight.
        share = 1.0 if self._terms[:2] == (backward, index) else n_seen / first[2]
        return math.sqrt(first[1] / n_taken * share) if n_taken else 1.0, 0.0

    def take_window(self, other: FactorAccumulator) -> None:
        """Go on with what another one of the same layers has noted."""
        self._observed, self._backward = set(other._observed), dict(other._backward)
        self._terms, self._noted, self.loss_layer = other._terms, other._noted, other.loss_layer
        self._told_late, self._checked = other._told_late, other._checked
        self._told_silent, self.misfits = set(other._told_silent), dict(other.misfits)

    def next_window(self) -> None:
        """The sums of the open window were taken out of it: from now on pairs are of the next."""
        self._observed.clear()
        self._noted = None

    def forget(self) -> None:
        """Clear what was observed in the open window."""
        if self._observed:
            self._stacks.clear_window()
        self.next_window()

    def check_that_layers_fire(self, due: tuple[int, ...]) -> None:
        """Warn of layers that are due and had no pair: at the first refresh of all such, later once of each that had
        one before. After the sum over processes.

        Raises:
            RuntimeError: at the first refresh no layer had one, on any process.
        """
        silent = [index for index in due if index not in self._observed]
        if self._checked:
            self._check_that_layers_still_fire(silent)
        elif silent:
            self._check_that_layers_fire_at_first([self._layers[index].name for index in silent], len(due))
        if not self._checked:
            self._told_silent.update(silent)
        self._checked = True

    def _check_that_layers_fire_at_first(self, silent: list[str], n_due: int) -> None:
        advice = (
            "Their modules were not called, were called without gradients, or were compiled before the hooks were "
            "there: call modules (not F.linear with their weight), build Curvature before torch.compile first runs the "
            "model (or call torch._dynamo.reset()), and call optimizer.step() after a backward pass in training mode."
        )
        # After the sum over ranks, so that all of them raise, or none: a rank alone would leave the others waiting.
        if len(silent) == n_due and not self._stacks.counts.any():
            raise RuntimeError(f"No layer was observed before the first step ({name_some(silent)}). {advice}")
        warnings.warn(
            f"{len(silent)} of {n_due} layers with curvature were not observed before the first step (in "
            f"this process) and take their plain gradient until they are: {name_some(silent)}. {advice}",
            stacklevel=5,
        )

    def _check_that_layers_still_fire(self, silent: list[int]) -> None:
        # Frozen layers are silent by intent.
        new = [
            index
            for index in silent
            if index not in self._told_silent and any(use.trains for use in self._layers[index].uses)
        ]
        if not new:
            return
        self._told_silent.update(new)
        # Looked at once for each layer: it waits for the device.
        n_rows = self._stacks.counts[new, 0].tolist()
        names = [self._layers[index].name for index, rows in zip(new, n_rows, strict=True) if not rows]
        if names:
            warnings.warn(
                f"{name_some(names)}: observed before, but not at this refresh, and goes on with the curvature that it "
                "has. Its module was not called since the last step, was called without gradients or in another way "
                "(F.linear with its weight), or was compiled anew without hooks. This is told once for each layer.",
                stacklevel=5,
            )

    def _warn_of_late_pair(self, name: str) -> None:
        if not self._told_late:
            self._told_late = True
            warnings.warn(
                f"Layer {name!r} was used again after its factors were on their way to the other processes: what came "
                "late is left out of this refresh, and from now on they wait for optimizer.step(). It has several "
                'backward passes in one step, or more of them than before; strategy="ddp" never sends before the step, '
                "and no backward pass inside of `with trainer.strategy.block_backward_sync():` does.",
                stacklevel=2,
            )
