"""The way of a pair (a, g) from the hooks into the sums of the open window."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.curvature.silence import silent_layers
from lightning_thor.distributed.dtensor import is_sharded
from lightning_thor.distributed.factor_reducer import FactorReducer
from lightning_thor.distributed.tensor_parallel import local_pair
from lightning_thor.factors.state import ROWS, FactorState
from lightning_thor.layers.base import Layer, ModuleUse
from lightning_thor.layers.discovery import name_some

EXPONENT_STEP, LARGEST_EXPONENT = 32, 96
"""The unit of gradients is 2 to a multiple of the former, up to the latter: 1, but for very small or large losses."""

MIN_ROWS_PER_RANK = 256
"""Lower bound on the rows that each rank samples: batch norm needs a mean and a variance of them."""

NumberOrTensor = Callable[[], float | Tensor]


class FactorAccumulator:
    """Adds the covariances of pairs to the open window.

    Args:
        layers: with curvature, by name; numbered in this order.
        factors: holds the open window's sums.
        loss_reduction: ``"mean"`` or ``"sum"``.
        loss_multiplier: see `lightning_thor.Curvature`.
        loss_terms: see `lightning_thor.Curvature`.
        max_rows: rows to take of a pair, of all processes together; None for all.
        counts_elements: whether to count the numbers of inputs and gradients, for the cost of a layer.
        backward_pass: returns the number of the backward pass that a pair comes in, below 0 outside of one.

    Attributes:
        uses: the number of the layer and its use, by the name of the module.
        reducer: sums the open window over processes, see `connect`.
        loss_layer: the name of the module whose output's gradient came first in the first backward pass: the loss is
            taken to be a mean over the rows of its output.
        misfits: why pairs of a layer are not rows of its weight, by number of the layer.
    """

    reducer: FactorReducer

    def __init__(
        self,
        layers: Mapping[str, Layer],
        factors: FactorState,
        *,
        loss_reduction: str,
        loss_multiplier: NumberOrTensor | None,
        loss_terms: NumberOrTensor | None,
        max_rows: int | None,
        counts_elements: bool,
        backward_pass: Callable[[], int],
    ) -> None:
        self._layers, self._factors = list(layers.values()), factors
        self._loss_reduction, self._loss_multiplier, self._loss_terms = loss_reduction, loss_multiplier, loss_terms
        self._max_rows, self._counts_elements, self._backward_pass = max_rows, counts_elements, backward_pass
        self.uses = {use.name: (number, use) for number, layer in enumerate(self._layers) for use in layer.uses}
        self._may_be_sharded = any(is_sharded(use.weight) for _, use in self.uses.values())
        """Whether inputs and gradients may be DTensors (tensor parallelism)."""
        self.loss_layer: str | None = None
        self.misfits: dict[int, str] = {}
        self._observed: set[int] = set()
        """The layers that had a pair in the open window."""
        self._samples: dict[int, dict[int, tuple[float, float, float]]] = {}
        """By layer and backward pass of the open window: of its first use there, the samples taken, and all samples;
        and the most samples of any use there."""
        self._terms: dict[int, tuple[int, float]] = {}
        """By backward pass of the open window: the layer whose output goes into its loss (-1 if that is not due), and
        the number of terms in the mean loss."""
        self._warned_of_late_pair = False
        self._warned_of_silence: set[int] = set()
        self._known_stacks: set[nn.Parameter] = set()
        """Parameters with a layer for each expert, of which one was observed."""
        self._checked = False

    def connect(self, reducer: FactorReducer) -> None:
        """Use ``reducer`` from now on; its processes share out ``max_rows``."""
        self.reducer = reducer
        self.__dict__.pop("max_rows", None)

    @cached_property
    def max_rows(self) -> int | None:
        """Rows that this process takes of a pair; None for all."""
        if self._max_rows is None:
            return None
        return max(-(-self._max_rows // self.reducer.world_size), min(self._max_rows, MIN_ROWS_PER_RANK))

    def observe(self, name: str, a: Tensor, g: Tensor) -> None:
        """Add one call of a layer to the open window; leave a late pair out, with a warning.

        Args:
            name: of the layer, or of another module that is tied to it.
            a: its input.
            g: the gradient of the loss, as it was differentiated, with respect to its output.
        """
        number, use = self.uses[name]
        was_observed = number in self._observed
        self._observed.add(number)
        layer, factors = self._layers[number], self._factors
        is_elsewhere = g.device.type != factors.device.type
        if is_elsewhere and not self._may_be_sharded:
            raise RuntimeError(
                f"Layer {layer.name!r} was used on {g.device}, but Curvature found its weight on {factors.device}. "
                "Build it when the model is on its device."
            )
        if number in self.misfits or self._is_misfit(number, use, a, g):
            return
        if self.reducer.is_late(number):
            self._warn_of_late_pair(layer.name)
            return
        if was_observed and self._gradient_was_dropped(number, use):
            factors.clear_layer(number)
            del self._samples[number]
        if not a.numel():
            # Nothing to add. Torch's batch norm of an empty batch has a product of another shape than its output.
            self.reducer.mark_ready(number)
            return
        n_seen = layer.loss_terms(use.module, g)
        scale, part, max_rows = self._scale(number, name, n_seen), None, self.max_rows
        if self._may_be_sharded and (is_sharded(a) or is_sharded(g)):
            a, g, layer, part, n_same = local_pair(layer, a, g)
            factors.note_copies(number, n_same)
            max_rows = None if max_rows is None else max_rows * n_same
        rows = layer.observe(a, self._in_its_unit(g, scale), factors.dtype, max_rows, use.module)
        weight, n_samples = self._use_weight(number, rows.n_samples, n_seen)
        if weight != 1.0:
            scale = scale * weight
        if is_elsewhere:  # The weight is kept on the host (CPUOffloadPolicy).
            rows, scale = rows.to(factors.device), scale.to(factors.device) if isinstance(scale, Tensor) else scale
        factors.add(number, rows, scale, n_samples, a.numel() + g.numel() if self._counts_elements else 0.0, part)
        self.reducer.mark_ready(number)

    def _gradient_was_dropped(self, number: int, use: ModuleUse) -> bool:
        """Whether the gradients of earlier backward passes were set to None since, other than by `Thor.zero_grad`."""
        backward, earlier = self._backward_pass(), self._samples.get(number, {})
        return bool(earlier) and -1 < backward not in earlier and self.has_no_gradient(use.name)

    def has_no_gradient(self, name: str) -> bool:
        """Whether the weight's gradient is None; False of sharded weights, whose gradient is elsewhere between passes.

        Args:
            name: of the module.
        """
        return not self._may_be_sharded and self.uses[name][1].weight.grad is None

    def note_gradient(self, name: str, g: Tensor, backward: int) -> None:
        """Note how many terms the loss has, where `loss_layer` is not due and others are; the first output counts.

        Args:
            name: `loss_layer`.
            g: the gradient of its output.
            backward: the number of the backward pass.
        """
        number, use = self.uses[name]
        if backward not in self._terms:
            self._terms[backward] = -1, self._layers[number].loss_terms(use.module, g)

    def _scale(self, number: int, name: str, n_seen: float) -> float | Tensor:
        """Factor from the gradient of the loss as it was differentiated to that of the per-sample loss."""
        per_sample: float | Tensor = 1.0
        if self._loss_terms is not None:
            per_sample = _number(self._loss_terms(), "loss_terms", "the number of terms in the mean of the loss")
        elif self._loss_reduction == "mean":
            per_sample = self._terms_of_the_loss(number, name, n_seen)
        if self._loss_multiplier is None:
            return per_sample
        multiplier = _number(self._loss_multiplier(), "loss_multiplier", "what the loss was multiplied by, above 0")
        if not isinstance(multiplier, Tensor) and not multiplier:
            raise ValueError("loss_multiplier returned 0: such a loss has no gradients.")
        return per_sample / multiplier

    def _terms_of_the_loss(self, number: int, name: str, n_seen: float) -> float:
        """The number of terms in the mean loss: the rows of the output whose gradient comes first in a backward pass,
        for that output goes into the loss. A layer that saw some of these rows (an expert, a region, masked tokens) is
        part of the same loss. Each output of the layer that comes first is taken to go into a mean of its own.

        Args:
            number: of the layer.
            name: of the module that the pair came from.
            n_seen: the number of terms, if this module saw all of them.

        Returns:
            The number of terms.
        """
        backward = self._backward_pass()
        if backward < 0 or not n_seen:
            return n_seen
        loss_layer, n_terms = self._terms.setdefault(backward, (number, n_seen))
        self.loss_layer = self.loss_layer or name
        return n_seen if number == loss_layer else n_terms

    def _in_its_unit(self, g: Tensor, scale: float | Tensor) -> Tensor:
        """``g`` over the unit of gradients, which the first pair decides; no device sync."""
        factors = self._factors
        if factors.gradient_unit is None and g.numel():
            largest = torch.log2(g.detach().abs().amax().double() * scale)
            steps = (largest / EXPONENT_STEP).nan_to_num(0.0, 0.0, 0.0).round()
            exponent = (EXPONENT_STEP * steps).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
            factors.gradient_unit = torch.exp2(exponent).to(factors.dtype)
        unit = factors.gradient_unit
        return g if unit is None or (not isinstance(unit, Tensor) and unit == 1.0) else g.to(factors.dtype) / unit

    def _is_misfit(self, number: int, use: ModuleUse, a: Tensor, g: Tensor) -> bool:
        """Whether the pair cannot be rows of the layer's weight; this is noted in `misfits`."""
        layer = self._layers[number]
        may_be_subsampled = a.dim() == 2 and len(a) == self.max_rows
        if layer.kind.fits(use.module, a, g, is_whole=not may_be_subsampled):
            return False
        self.misfits[number] = (
            f"its input {list(a.shape)} and its output's gradient {list(g.shape)} are not rows of its weight "
            f"{list(use.weight.shape)}"
        )
        return True

    def subsample_input(self, name: str, a: Tensor) -> Tensor:
        """What has to be stored of an input until its gradient comes: only the rows that are taken, if that is known.

        Args:
            name: of the module.
            a: its input.

        Returns:
            Some rows ``[n, in]``, or the input.
        """
        number, _ = self.uses[name]
        return a if self._may_be_sharded and is_sharded(a) else self._layers[number].subsample_input(a, self.max_rows)

    def _use_weight(self, number: int, n_taken: float, n_seen: float) -> tuple[float, float]:
        """Weight of the gradients of one use of a layer, and the samples that it adds.

        G is an expectation over samples of a sum over uses, as it is of a sum over positions in a convolution: the
        uses of one backward pass share their samples, which count once, as those of the use that saw the most, whatever
        their order. So A ⊗ G has the scale of E[Σ_uses gᵤgᵤᵀ ⊗ aᵤaᵤᵀ], whatever the number of uses. A use is weighted
        by the samples that it saw, but for the layer whose outputs the loss is a mean over: there each has its own
        expectation.

        Args:
            number: of the layer.
            n_taken: samples that the rows taken belong to.
            n_seen: samples in all.

        Returns:
            ``(weight, samples)``.
        """
        backward = self._backward_pass()
        if backward < 0:
            return 1.0, n_taken
        samples = self._samples.setdefault(number, {})
        first_taken, first_seen, most_seen = samples.get(backward, (0.0, 0.0, 0.0))
        if not first_taken:
            samples[backward] = n_taken, n_seen, n_seen
            return 1.0, n_taken
        share, more = 1.0, 0.0
        if self._terms.get(backward, (-1, 0))[0] != number:
            share, more = n_seen / first_seen, max(n_seen - most_seen, 0.0) * first_taken / first_seen
            samples[backward] = first_taken, first_seen, max(n_seen, most_seen)
        # Of a convolution of which few rows are taken they may be fewer than one; none: no rows, whatever their weight.
        return math.sqrt(first_taken / n_taken * share) if n_taken else 1.0, more

    # ── windows ──

    @property
    def has_pairs(self) -> bool:
        """True if a layer had a pair in the open window."""
        return bool(self._observed)

    def copy_window_(self, other: FactorAccumulator) -> None:
        """Go on with what another accumulator of the same layers has noted.

        Args:
            other: of a copied model.
        """
        self._observed, self._terms, self.loss_layer = set(other._observed), dict(other._terms), other.loss_layer
        self._samples = {number: dict(samples) for number, samples in other._samples.items()}
        self._warned_of_late_pair, self._checked = other._warned_of_late_pair, other._checked
        self._warned_of_silence = set(other._warned_of_silence)
        self.misfits |= other.misfits

    def go_on_from(self, other: FactorAccumulator) -> None:
        """Keep what another accumulator, of some of the layers, has learnt of them, but no window.

        Args:
            other: its layers have the names that they have here.
        """
        self.loss_layer, self._warned_of_late_pair = other.loss_layer, other._warned_of_late_pair
        known = {other._layers[number].name for number in other._warned_of_silence}
        self._warned_of_silence = {number for number, layer in enumerate(self._layers) if layer.name in known}

    def next_window(self) -> None:
        """Start the next window: the sums of the open one were taken."""
        self._observed.clear()
        self._terms.clear()
        self._samples.clear()

    def reset(self) -> None:
        """Empty the open window."""
        if self._observed:
            self._factors.clear_window()
        self.next_window()

    # ── layers that are silent ──

    def check_that_layers_fire(self, due: tuple[int, ...], cause_of: Callable[[int], str]) -> None:
        """Warn of layers that are due and had no pair: at the first refresh of all such, later once of each that had
        one before. Called after the sum over processes.

        Args:
            due: numbers of the layers.
            cause_of: says why a layer had none, see `lightning_thor.curvature.silence`.

        Raises:
            RuntimeError: at the first refresh no layer had one, on any process, and no weight has a gradient.
        """
        known = self._observed | self._warned_of_silence
        silent = [number for number in due if number not in known]
        if silent:
            silent = self._without_idle_experts(silent)
        if self._checked:
            self._check_that_layers_still_fire(silent, cause_of)
            return
        if silent:
            self._check_that_layers_fire_at_first(silent, len(due), cause_of)
        self._warned_of_silence.update(silent)
        self._checked = True

    def _without_idle_experts(self, silent: list[int]) -> list[int]:
        """Leave out experts to which nothing was routed: others of their parameter were observed, now or before."""
        if self._stacks_of(silent) - self._known_stacks:
            # This waits for the device.
            observed = {*self._observed, *self._factors.updates.nonzero().flatten().tolist()}
            self._known_stacks |= self._stacks_of(observed)
        return [number for number in silent if self._layers[number].parameters[0] not in self._known_stacks]

    def _stacks_of(self, numbers: Iterable[int]) -> set[nn.Parameter]:
        layers = [self._layers[number] for number in numbers]
        return {layer.parameters[0] for layer in layers if layer.param_slice and layer.is_within_its_module}

    def _check_that_layers_fire_at_first(self, silent: list[int], n_due: int, cause_of: Callable[[int], str]) -> None:
        names = [layer.name for layer in self._layers]
        have_gradients = any(p.grad is not None for layer in self._layers for p in layer.parameters)
        # After the sum over ranks, so that all of them raise, or none: a rank alone would leave the others waiting.
        train = any(use.trains for layer in self._layers for use in layer.uses)  # not frozen since
        if len(silent) == n_due and train and not have_gradients and not self._factors.counts.any():
            raise RuntimeError(
                f"None of the {len(names)} layers with curvature ({name_some(names)}) was observed, and none has a "
                "gradient: the optimizer steps on parameters of another model. Build Curvature and Thor of one model."
            )
        warnings.warn(
            f"{len(silent)} of {n_due} layers with curvature were not observed before the first step (in this process) "
            f"and take their plain gradient until they are. {silent_layers(silent, names, cause_of)}",
            stacklevel=5,
        )

    def _check_that_layers_still_fire(self, silent: list[int], cause_of: Callable[[int], str]) -> None:
        # Frozen layers are silent by intent.
        new = [number for number in silent if any(use.trains for use in self._layers[number].uses)]
        if not new:
            return
        self._warned_of_silence.update(new)
        # Read once for each layer: it waits for the device.
        n_rows = self._factors.counts[new, ROWS].tolist()
        told = [number for number, rows in zip(new, n_rows, strict=True) if not rows]
        if told:
            names = [layer.name for layer in self._layers]
            warnings.warn(
                f"{name_some([names[number] for number in told])}: observed before, but not at this refresh, and goes "
                f"on with the curvature that it has. {silent_layers(told, names, cause_of)} This is told once for each "
                "layer.",
                stacklevel=5,
            )

    def _warn_of_late_pair(self, name: str) -> None:
        if not self._warned_of_late_pair:
            self._warned_of_late_pair = True
            warnings.warn(
                f"Layer {name!r} was used again after its factors were on their way to the other processes: what came "
                "late is left out of this refresh, and from now on they wait for optimizer.step(). It has several "
                'backward passes in one step, or more of them than before; strategy="ddp" never sends before the step, '
                "and no backward pass inside of `with trainer.strategy.block_backward_sync():` does.",
                stacklevel=2,
            )


def _number(given: Any, option: str, meaning: str) -> float | Tensor:
    """What a user's function returned, as a number or a 0-dimensional tensor.

    Args:
        given: what it returned.
        option: its name.
        meaning: of the number.

    Raises:
        TypeError: it is no number.
        ValueError: it is a negative number, or not finite; a tensor is not looked at.
    """
    if isinstance(given, Tensor) and given.numel() == 1:
        return given.reshape(())
    if isinstance(given, Tensor) or not isinstance(given, Real):
        got = f"a tensor of shape {list(given.shape)}" if isinstance(given, Tensor) else repr(given)[:200]
        raise TypeError(f"{option} must return {meaning}, as a number or a 0-dimensional tensor, but returned {got}.")
    number = float(given)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{option} must return {meaning}, but returned {given!r}.")
    return number
