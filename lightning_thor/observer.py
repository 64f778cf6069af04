"""What happens to a pair (a, g) on its way into the open window."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_thor.blocks import add_covariance_
from lightning_thor.kinds import Statistics
from lightning_thor.layer import Layer
from lightning_thor.layers import some_of
from lightning_thor.refresh import RefreshSchedule
from lightning_thor.rows import linear_rows, thin_linear
from lightning_thor.stacks import FactorStacks
from lightning_thor.window import Window


class Observer:
    """Adds pairs to the open window, as covariances or, where a layer is only probed, as their traces.

    Args:
        layers: with curvature, by name; in the order of ``stacks`` and ``schedule``.
        stacks: where the sums of the open window lie.
        schedule: says which layers are only probed.

    Attributes:
        uses: the index of the layer and the use of it, by the name of the module.
    """

    def __init__(self, layers: Mapping[str, Layer], stacks: FactorStacks, schedule: RefreshSchedule) -> None:
        self._layers, self._stacks, self._schedule = list(layers.values()), stacks, schedule
        self.uses = {use.name: (index, use) for index, layer in enumerate(self._layers) for use in layer.uses}
        self._observed: set[int] = set()
        """The layers that had a pair in the open window."""
        self._backward: dict[int, tuple[int, float]] = {}
        """The last backward pass that used a layer, and how many samples its first use in it had."""
        self._told_late = False
        self._checked = False

    def observe(
        self,
        name: str,
        a: Tensor,
        g: Tensor,
        window: Window,
        *,
        statistics: Statistics,
        max_rows: int | None,
        loss_reduction: str,
        loss_multiplier: Callable[[], float | Tensor] | None,
    ) -> None:
        """Add one call of a layer to the open window; a pair that comes too late for it is left out, with a warning.

        Args:
            name: of the layer, or of another module that is tied to it.
            a: its input.
            g: the gradient of the loss, as it was differentiated, with respect to its output.
            window: the open window's way over processes, which is told.
            statistics, max_rows, loss_reduction, loss_multiplier: see `lightning_thor.Curvature`.
        """
        index, use = self.uses[name]
        self._observed.add(index)
        layer, stacks = self._layers[index], self._stacks
        if window.is_late(index):
            self._warn_of_late_pair(layer.name)
            return
        sums_A, sums_G = stacks.sums[2 * index : 2 * index + 2]
        # To the gradient of the per-sample loss. Rows are converted first: a float16 gradient would overflow.
        per_sample = statistics.loss_terms(use.module, g) if loss_reduction == "mean" else 1
        scale = per_sample / (1.0 if loss_multiplier is None else loss_multiplier())
        if self._schedule.is_probe[index]:
            squares = layer.squares(a, g, stacks.dtype, max_rows, use.module)
            weight, n_samples = self._share_of(index, squares.n_samples)
            trace_A = 0.0 if squares.a is None else squares.a
            stacks.count(index, squares.n_rows, n_samples, trace_A, squares.g * (scale * weight) ** 2)
            window.given(index)
            return
        seen = layer.observe(a, g, stacks.dtype, max_rows, use.module)
        if layer.A is not None and seen.a is not None:
            assert sums_A is not None
            add_covariance_(sums_A, seen.a, layer.A)
        if seen.token_counts is not None:
            assert sums_A is not None
            sums_A.add_(seen.token_counts)
        weight, n_samples = self._share_of(index, seen.n_samples)
        if weight != 1.0:
            scale = scale * weight
        assert sums_G is not None
        add_covariance_(sums_G, seen.g, layer.G, scale)
        stacks.count(index, seen.n_rows, n_samples, a.numel() + g.numel() if self._schedule.stagger else 0.0)
        window.given(index)

    def thin(self, name: str, a: Tensor, max_rows: int | None) -> Tensor:
        """What of an input has to wait for its gradient: where rows are taken of it anyway, these alone."""
        index, _ = self.uses[name]
        return thin_linear(a, max_rows) if self._layers[index].rows_of is linear_rows else a

    def _share_of(self, index: int, n_samples: float) -> tuple[float, float]:
        """What to multiply the gradients of one use of a layer by, and how many samples it adds.

        G is an expectation over samples of a sum over uses, as it is of a sum over positions in a convolution: the
        uses of one backward pass share their samples, which count once (a first use's; another that has more or less
        is brought to as many). So A ⊗ G has the scale of E[Σ_uses gᵤgᵤᵀ ⊗ aᵤaᵤᵀ], whatever the number of uses.
        """
        # Reentrant checkpoints are backward passes of their own: uses in several of them count as other samples.
        backward, first = torch._C._current_graph_task_id(), self._backward.get(index)
        if backward < 0 or first is None or first[0] != backward or not first[1]:
            self._backward[index] = backward, n_samples
            return 1.0, n_samples
        # Of a convolution of which few rows are taken they may be fewer than one; none: no rows, whatever their weight.
        return math.sqrt(first[1] / n_samples) if n_samples else 1.0, 0.0

    def take_window(self, other: Observer) -> None:
        """Go on with what another one of the same layers has noted."""
        self._observed, self._backward = set(other._observed), dict(other._backward)
        self._told_late, self._checked = other._told_late, other._checked

    def next_window(self) -> None:
        """The sums of the open window were taken out of it: from now on pairs are of the next."""
        self._observed.clear()

    def forget(self) -> None:
        """Clear what was observed in the open window."""
        if self._observed:
            self._stacks.clear_window()
            self._observed.clear()

    def check_that_layers_fire(self, due: tuple[int, ...]) -> None:
        """At the first refresh: warn of layers that are due and had no pair. After the sum over processes.

        Raises:
            RuntimeError: no layer had one, on any process.
        """
        silent = [self._layers[index].name for index in due if index not in self._observed]
        if self._checked or not silent:
            self._checked = True
            return
        self._checked = True
        advice = (
            "Their modules were not called, were called without gradients, or were compiled before the hooks were "
            "there: call modules (not F.linear with their weight), build Curvature before torch.compile first runs the "
            "model (or call torch._dynamo.reset()), and call optimizer.step() after a backward pass in training mode."
        )
        # After the sum over ranks, so that all of them raise, or none: a rank alone would leave the others waiting.
        if len(silent) == len(due) and not self._stacks.counts.any():
            raise RuntimeError(f"No layer was observed before the first step ({some_of(silent)}). {advice}")
        warnings.warn(
            f"{len(silent)} of {len(due)} layers with curvature were not observed before the first step (in "
            f"this process) and take their plain gradient until they are: {some_of(silent)}. {advice}",
            stacklevel=4,
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
