"""The curvature of a model, layer by layer: observe -> average -> refresh -> precondition."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.curvature.accumulator import FactorAccumulator
from lightning_thor.curvature.callables import NumberFn
from lightning_thor.curvature.options import Schedule, check_options
from lightning_thor.curvature.refresh_schedule import Interval, RefreshSchedule
from lightning_thor.curvature.state_dict import curvature_state, load_curvature_state
from lightning_thor.distributed import process_group
from lightning_thor.distributed.assignment import refresh_costs
from lightning_thor.distributed.communicator import Communicator, SingleProcess, WorkerGrid
from lightning_thor.distributed.factor_reducer import BucketFn, DueLayers, FactorReducer, one_bucket
from lightning_thor.distributed.shared_directions import SharedDirections
from lightning_thor.distributed.shared_inversions import SharedInversions
from lightning_thor.factors.damping import DampingRule
from lightning_thor.factors.layout import factors_of, stacks_of
from lightning_thor.factors.state import Solve
from lightning_thor.factors.trace_rule import trace_rule_of, verdicts
from lightning_thor.layers.base import Layer, attention_uses
from lightning_thor.layers.custom import registered_uses
from lightning_thor.layers.discovery import discover_layers, matrix_layers, name_some, trained, uncompiled_name
from lightning_thor.layers.hooks import Hooks
from lightning_thor.layers.pair_checks import NOT_A_PAIR, PairChecks
from lightning_thor.layers.registry import STATISTICS, KfacApprox
from lightning_thor.linalg import memory
from lightning_thor.linalg.memory import HostCopy
from lightning_thor.preconditioning.grouping import (
    Directions,
    FactorPair,
    GroupedLayers,
    LayerGroup,
    Tensors,
    group_layers,
)
from lightning_thor.preconditioning.modes import MODES, ModeName

MIN_ROWS_PER_RANK = 256
"""That each of several processes takes, however many there are: batch norms take a mean and a variance of some."""


class Curvature:
    """Kronecker-factored curvature of ``model``: what a `Thor` optimizer preconditions with.

    Per layer A = E[a aᵀ] of its input rows and G = E[g gᵀ] of the output gradients of the per-sample loss, so that
    A ⊗ G approximates the layer's (empirical) Fisher matrix (Martens & Grosse 2015, arXiv:1503.05671; convolutions:
    Grosse & Martens 2016, arXiv:1602.01407), cut into diagonal blocks (THOR: Chen et al., AAAI 2021). Hooks listen from
    construction to `close`, and only in steps where a refresh is due.

    Args:
        model: its parameters must be on their device already.
        mode: that of the `Thor` it serves; ``"polar"`` also serves natural groups beside polar ones. Natural mode
            stores inverses of the blocks, polar mode their roots, adam mode eigenvectors, which ``damping`` does not
            change. In the latter two the G of the output layer (the last linear layer or convolution) is its diagonal
            alone. Its g are prediction errors; inverting their covariance removes the component that they share, which
            is the signal. Under a Trainer `ThorCallback` chooses the mode.
        damping: greater than 0, or a function of the step. For ``damping_rule="trace"`` relative to the factors' mean
            eigenvalue, else in the units of the Fisher matrix.
        damping_rule: ``"trace"``, ``"pi"`` or ``"sqrt"``, see `lightning_thor.factors.damping.split_damping`.
        block_size: the largest diagonal block of a factor; None keeps factors whole. A measured choice:
            `lightning_thor.split.choose_block_size`.
        update_every_n_steps: statistics are gathered and inverted in every n-th step; or a function of the step that
            gives the steps until the next time.
        stagger: refresh each layer at a step of its own within the interval (all of them at the first step), balanced
            by cost, so that no step takes much longer than another.
        trace_rule: refresh a layer only when the trace of its curvature moved: ``"THOR"``, ``"THOR_stop"``,
            ``"THOR_NT"`` (the paper's thresholds) or ``(update_above, stop_below)``, see
            `lightning_thor.factors.trace_rule`.
            When a layer's turn comes its traces are looked at first, which costs a pass over its rows; it is observed
            and inverted two steps later, if at all. None refreshes every layer at its turn.
        averaging: weight of the past in the factors' moving average; 0 uses the last refresh's batch alone, as the
            paper does.
        precondition_bias: take biases of linear layers and convolutions into A, as its last coordinate; otherwise they
            take plain momentum.
        max_rows: take statistics from at most about that many rows of a batch, spread over it: positions of linear
            layers, of layer and RMS norms, and of convolutions (in whole lines). Batch and group norms take whole
            samples, at most so many, of 16 times as many positions (but at least a 32nd of ``max_rows``); a batch norm
            then uses the mean and variance of these samples. Embeddings always take all. Of several processes that
            train together each takes its share of ``max_rows`` of its own batch, but at least 256. None takes all
            everywhere.
        statistics: for layers that one sample uses at many positions (convolutions, sequences): ``"expand"`` takes
            each position as a row, ``"reduce"`` averages inputs and sums gradients over them first, which suits losses
            that have one term per sample (Eschenhagen et al. 2023, arXiv:2311.00636). ``"thor"`` takes each position
            as a row, the loss as a mean over the batch, and leaves norms to plain momentum, as MindSpore's nn.thor does
            on Ascend: for its published recipes, whose damping is in these units.
        loss_reduction: whether the loss is a ``"mean"`` or a ``"sum"`` over samples. A mean is taken to be one over
            all positions of the output if a layer on the last dimension gives it, and over the batch if a convolution
            does; over the batch in any case with ``statistics="reduce"`` or ``"thor"``.
        loss_multiplier: gives what the loss was multiplied by before backward besides that: the loss scale over the
            number of accumulated micro-batches. Called once per observed pair; a 0-dimensional tensor avoids a sync.
        loss_terms: gives how many terms the mean of the loss has, where the model does not tell: called once per
            observed pair; a number, or a 0-dimensional tensor. None takes as many as the output has rows whose gradient
            comes first in a backward pass: that of the layer whose output goes into the loss, so that layers which see
            some of its tokens (experts, regions, masked ones) are ones of the same loss. Give it where labels are left
            out of the mean (``ignore_index``) and their number differs between micro-batches or processes.
        fused: linear layers whose outputs are a concatenation, such as queries, keys and values: of how many equal
            parts, by pattern of the layer's name (``{"*.qkv": 3}``). Their G is cut at the borders, so that no block
            mixes parts; None takes every linear layer as one. (Those of `nn.MultiheadAttention` are always three.)
        parameters: leave out layers whose weight is not among these, and norms of which any parameter is not, and take
            no other biases into A; None for all.

    Attributes:
        layers: the layers with curvature, by name.
        left_out: why the others have none, by name.
        polar_layers: those that have polar directions: in polar mode linear layers and convolutions but for the last.
        step: applied steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: ModeName = "natural",
        damping: Schedule = 0.2,
        damping_rule: DampingRule = "trace",
        block_size: int | None = 64,
        update_every_n_steps: Interval = 10,
        averaging: float = 0.8,
        precondition_bias: bool = False,
        stagger: bool = False,
        trace_rule: str | tuple[float, float] | None = None,
        max_rows: int | None = 1024,
        statistics: str | KfacApprox = "expand",
        loss_reduction: str = "mean",
        loss_multiplier: NumberFn | None = None,
        loss_terms: NumberFn | None = None,
        fused: Mapping[str, int] | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "mode": mode,
            "damping": damping,
            "damping_rule": damping_rule,
            "block_size": block_size,
            "update_every_n_steps": update_every_n_steps,
            "trace_rule": trace_rule,
            "averaging": averaging,
            "max_rows": max_rows,
            "statistics": statistics,
            "loss_reduction": loss_reduction,
            "fused": fused,
        }
        check_options(**options)
        others = {"precondition_bias": precondition_bias, "stagger": stagger}
        self._options = options | others | {"loss_multiplier": loss_multiplier, "loss_terms": loss_terms}
        self.model = model
        self.mode = mode
        self.damping = damping
        self.damping_rule: DampingRule = damping_rule
        self.averaging = averaging
        self.max_rows = max_rows
        self.statistics = statistics if isinstance(statistics, KfacApprox) else STATISTICS[statistics]
        self.loss_reduction = loss_reduction
        self.loss_multiplier = loss_multiplier
        self.loss_terms = loss_terms
        # The whole model's mode, not each layer's: a submodule kept in eval mode still trains.
        self.is_listening: Callable[[], bool] = partial(getattr, model, "training")
        self._paused = False
        parameters = None if parameters is None else set(parameters)
        chosen = MODES[mode]
        matrices = matrix_layers(model) if chosen.has_diagonal_head or chosen.uses_matrix_sign else []
        self.layers, self.left_out = discover_layers(
            model,
            block_size=block_size,
            precondition_bias=precondition_bias,
            only=parameters,
            statistics=self.statistics,
            fused=fused,
            diagonal_G=matrices[-1:] if chosen.has_diagonal_head else [],
        )
        _warn_of_few_weights(model, self.layers, self.left_out, parameters)
        self.polar_layers = {name for name in matrices[:-1] if name in self.layers and chosen.uses_matrix_sign}
        self._factors = factors_of(self.layers)
        self.stacks = stacks_of(self.layers, decomposition=chosen.decomposition)
        self._trace_rule = trace_rule_of(trace_rule)
        self._schedule = RefreshSchedule(
            update_every_n_steps, len(self.layers), stagger, probes=self._trace_rule is not None
        )
        self._observer = FactorAccumulator(self.layers, self.stacks, self._schedule, lambda: self._hooks.backward_pass)
        self._checks = PairChecks(model, self.layers, self._observer.uses)
        self._found: HostCopy | None = None
        """What `_agree` found, on its way to the host."""
        self._has_agreed = False
        """Whether the processes have come to one unit of gradients, and told each other of layers that do not fit."""
        self.step = 0
        self.connect(process_group.ProcessGroupCommunicator())
        uses = [use for layer in self.layers.values() for use in layer.uses]
        called = {use.name: use.module for use in uses if use.attention is None}
        indices = {name: index for name, (index, _) in self._observer.uses.items()}

        def is_due(name: str) -> bool:
            steps = self._schedule.next_steps
            # What tells how many terms the loss has is asked whenever any layer is due.
            return self.step >= (steps[indices[name]] if name != self._observer.loss_layer else min(steps))

        self._hooks = Hooks(
            called,
            self._is_open,
            self.observe,
            attention_uses(uses),
            self._expect,
            subsample_input=lambda name, a: self._observer.subsample_input(name, a, self._rows_here()),
            is_due=is_due,
            weight_of=lambda name: self._observer.uses[name][1].weight,
            needs_returned=registered_uses(self.layers.values()).__contains__,
            note_output=lambda name, output: self._observer.note_output(name, output, self.statistics),
            checks=self._checks,
        )

    def connect(
        self,
        communicator: Communicator,
        *,
        bucket_fn: BucketFn = one_bucket,
        is_sync_step: Callable[[], bool] | None = None,
        worker_grid: WorkerGrid | None = None,
    ) -> None:
        """Say how processes that train together are to be reached; from the beginning all ranks of the default group.

        Args:
            exchange: what sums and gathers.
            bucket_fn: which layers' factors are sent together, see `lightning_thor.distributed.factor_reducer`.
            may_start: whether a backward is the last before the step, so that sums may start in it; None: in `update`.
            worker_grid: who keeps the inverses of which layers and makes their directions; None: everyone those of all.

        Raises:
            RuntimeError: a step was made, and the inverses were to be kept elsewhere from now on.
        """
        self._connection: dict[str, Any] = {
            "exchange": communicator,
            "bucket_fn": bucket_fn,
            "may_start": is_sync_step,
            "worker_grid": worker_grid,
        }
        decomposition, (inverters, receivers) = (
            self.stacks.decomposition,
            worker_grid or WorkerGrid(communicator, SingleProcess()),
        )
        if MODES[self.mode].change_basis is not None and receivers.world_size > 1:
            raise ValueError(
                f"inverse_workers must be None with mode={self.mode!r}: every rank needs the {decomposition.name} of "
                "all layers."
            )
        n_products = len(decomposition.products)
        shared = SharedDirections(receivers, self.layers, products=n_products, polar=self.polar_layers)
        if self.stacks.has_inverse != set(shared.own):
            if self.step:
                raise RuntimeError(
                    f"Curvature.connect(worker_grid=...) came after {self.step} steps, and the inverses are kept by "
                    "other processes by now. Connect before the first step, and before load_state_dict."
                )
            self.stacks.set_inverse_owner(shared.own)
            self.__dict__.pop("_groups", None)
        self._communicator, self._shared, layers = communicator, shared, list(self.layers.values())
        self._own_layers = [layers[index] for index in shared.own]
        self._window = FactorReducer(self.stacks, communicator, self._turn, bucket_fn, is_sync_step)
        self.solve: Solve = SharedInversions(inverters, decomposition.make, decomposition.form)

    def is_due(self) -> bool:
        """True if the coming step refreshes some layer; those layers' forward and backward passes are observed.

        With a trace rule also if the step only looks at traces.
        """
        return any(self._turn())

    def due_parameters(self) -> set[nn.Parameter]:
        """Returns the parameters of the layers that the coming `update` refreshes."""
        layers = list(self.layers.values())
        return {p for index in self._schedule.due(self.step) for p in layers[index].parameters}

    def _turn(self) -> DueLayers:
        """The layers to refresh and those to probe at this step."""
        return self._schedule.due(self.step), self._schedule.probed(self.step)

    @property
    def refreshes(self) -> tuple[int, int]:
        """Refreshes that were done, and that would have been without a trace rule, so far; counted by layer."""
        self._schedule.settle()
        return self._schedule.refreshes, self._schedule.turns(self.step)

    @property
    def gradient_unit(self) -> float | Tensor:
        """What output gradients are divided by to be rows of G, see `FactorState.gradient_unit`."""
        unit = self.stacks.gradient_unit
        return 1.0 if unit is None else unit

    def close(self) -> None:
        """Remove the hooks. The curvature keeps its state and can still be saved."""
        self._hooks.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Listen to no forward pass in this context: for passes whose gradients are not those of the training loss,
        such as an adversarial example's, or another optimizer's loss that flows through these layers."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def observe(self, name: str, a: Tensor, g: Tensor) -> None:
        """Add one call of a layer to the open window.

        Args:
            name: of the layer, or of another module that is tied to it.
            a: its input.
            g: the gradient of the loss, as it was differentiated, with respect to its output.
        """
        if torch.is_grad_enabled():
            # Not for each pair of a backward pass, in which gradients are off.
            with torch.no_grad():
                return Curvature.observe(self, name, a, g)
        self._observer.observe(
            name,
            a,
            g,
            self._window,
            statistics=self.statistics,
            max_rows=self._rows_here(),
            loss_reduction=self.loss_reduction,
            loss_multiplier=self.loss_multiplier,
            loss_terms=self.loss_terms,
        )

    def discard(self) -> None:
        """Forget the open window: its step was skipped (a loss scale that overflowed), on all processes alike."""
        if self.is_due():
            self._window.drop()
        self._forget()

    def _forget(self) -> None:
        self._hooks.drop()
        self._checks.forget()
        self._window.forget()
        self._observer.forget()
        if not self._has_agreed:
            self.stacks.gradient_unit = None

    @torch.no_grad()
    def update(self) -> None:
        """Once per applied step, between backward and `precondition`: average and refresh if that is due.

        Raises:
            RuntimeError: at the first refresh, if no layer at all was observed.
        """
        self._settle()
        due, probed = self._turn()
        if due or probed:
            self._hooks.flush()
            self._agree()
            due, probed = self._turn()
            self._window.sum()
            if due:
                self._observer.check_that_layers_fire(due)
            costs = self._refresh_costs() if self._schedule.stagger and self.step == 0 else None
            with self._full_precision():
                found = self._probe(probed) if probed else None
                if due:
                    selection = self.stacks.select(due)
                    self.stacks.update_ema(selection, self.averaging)
                    failed = self.stacks.failed_inversions.clone()
                    self.stacks.invert(selection, self.damping_rule, self.damping_now(), self.solve)
                    self._shared.add_up_(self.stacks.failed_inversions, before=failed)
            self._schedule.refreshed(self.step, costs, found)
            self._observer.next_window()
        self.step += 1
        self._schedule.settle(self.step)

    def _agree(self) -> None:
        """Before the sums of the first window: bring all processes to one unit of gradients, and leave out the layers
        of which one has found that they do not fit their weight's gradient. Alone, before all sums; no device sync."""
        communicator, stacks, unit = self._communicator, self.stacks, self.stacks.gradient_unit
        is_first, self._has_agreed = not self._has_agreed, True
        if communicator.world_size > 1 and not is_first:
            return
        verdicts, known = self._checks.collect(), self._observer.misfits.keys() - self._schedule.dismissed()
        if not (is_first or verdicts or known):
            return
        no, yes = stacks.counts.new_zeros(()), stacks.counts.new_ones(())
        flags = [yes if i in known else verdicts.get(i, no).to(stacks.dtype) for i in range(len(self.layers))]
        told = torch.stack([torch.as_tensor(1.0 if unit is None else unit).to(no).log2(), *flags])
        if communicator.world_size > 1:
            self._checks.stop()
            all_told = communicator.all_gather(told).view(communicator.world_size, -1)
            most, least = all_told.amax(0), all_told.amin(0)
            # The one farthest from 1: a process that has seen nothing, or zeros, says 1.
            told = torch.cat([torch.where(most[:1] >= -least[:1], most[:1], least[:1]), most[1:]])
            stacks.change_unit_(told[0].exp2())
        # A layer that does not fit was not observed, as long as the host does not know of it.
        stacks.counts.mul_((told[1:] == 0)[:, None])
        self._found = HostCopy(told)
        if told.device.type in memory.HOST:
            self._settle()

    def _settle(self) -> None:
        """Have the host know what `_agree` found."""
        if self._found is None:
            return
        (exponent, *flags), self._found = self._found.read(), None
        self.stacks.gradient_unit = 2.0**exponent
        new = [index for index, is_misfit in enumerate(flags) if is_misfit]
        for index in new:
            self._leave_out(index, self._observer.misfits.get(index, NOT_A_PAIR))
        if new:
            names = list(self.layers)
            warnings.warn(
                f"{name_some([names[index] for index in new])}: without curvature from now on, with "
                f"{MODES[self.mode].fallback}. "
                f"{names[new[0]] or '(the model itself)'}: {self.left_out[names[new[0]]]}.",
                stacklevel=5,
            )

    def _leave_out(self, index: int, reason: str) -> None:
        """A layer is not refreshed any more, and its parameters take their plain gradient."""
        name = list(self.layers)[index]
        self.left_out[name] = reason
        self.layers[name] = replace(self.layers[name], is_left_out=True)
        self.polar_layers.discard(name)
        self._observer.misfits.setdefault(index, reason)
        self._schedule.dismiss(index)
        self._own_layers = [self.layers[layer.name] for layer in self._own_layers]
        self.__dict__.pop("_groups", None)

    def _probe(self, probed: tuple[int, ...]) -> HostCopy:
        assert self._trace_rule is not None
        old, new = self.stacks.probe(probed, self.averaging, self.damping_rule, self.damping_now())
        return HostCopy(verdicts(self._trace_rule, old, new))

    @torch.no_grad()
    def precondition(self, grads: Tensors) -> Directions:
        """Computes the natural gradient G⁻¹ grad A⁻¹ of each layer.

        Args:
            grads: dL/dW by parameter, unchanged.

        Returns:
            New tensors by parameter, in at least float32; copies of the gradients of parameters without curvature.

        Raises:
            RuntimeError: this curvature stores neither inverses nor their roots.
        """
        return {p: direction for part in self.directions(grads) for p, direction in part.items()}

    def directions(self, tensors: Tensors, mode: str = "natural") -> Iterator[Directions]:
        """Yields the directions of a mode in parts, as its `Mode.directions` does.

        If directions come from other ranks, all are one part.

        Args:
            tensors: by parameter, unchanged: gradients, or momenta in polar mode.
            mode: name of a mode that this curvature serves.

        Yields:
            Directions of some parameters, as of `precondition`.

        Raises:
            RuntimeError: this curvature does not serve the mode.
        """
        self.check_that_it_serves(mode)
        directions_of = MODES[mode].directions
        assert directions_of is not None, f"{mode} mode has a change of basis"
        own = directions_of(self.grouped(self._groups), self._shared.own_grads(tensors))
        parts = self._shared.all_gather_uneven(own, tensors)
        while True:
            # Not around the caller's use of a part.
            with self._full_precision():
                part = next(parts, None)
            if part is None:
                return
            yield part

    @torch.no_grad()
    def change_basis(self, tensors: Tensors, mode: str = "adam", *, back: bool = False) -> Directions:
        """Takes each layer's tensor to the coordinates in which the blocks of its A and G are diagonal.

        Args:
            tensors: gradients or moments by parameter, unchanged.
            mode: name of a mode that this curvature serves.
            back: take tensors from these coordinates instead.

        Returns:
            New tensors by parameter; copies of those of parameters without curvature.

        Raises:
            RuntimeError: this curvature does not serve the mode.
        """
        self.check_that_it_serves(mode)
        change = MODES[mode].change_basis
        assert change is not None, f"{mode} mode has no change of basis"
        with self._full_precision():
            return change(self.grouped(self._groups), tensors, back=back)

    def grouped(self, groups: Sequence[LayerGroup]) -> GroupedLayers:
        """Returns groups with what their directions depend on beside them.

        Args:
            groups: of layers of this curvature, or of rows of these.
        """
        unit = self.stacks.gradient_unit
        return GroupedLayers(groups, self.stacks.decomposition, self.polar_layers, 1.0 if unit is None else unit)

    def check_that_it_serves(self, mode: str) -> None:
        """Checks that directions of a mode can be computed from what is stored here.

        Args:
            mode: name of a mode.

        Raises:
            RuntimeError: they cannot.
        """
        if mode != self.mode and mode not in MODES[self.mode].serves:
            raise RuntimeError(
                f'Thor(mode="{mode}") got a curvature of mode="{self.mode}", which stores another decomposition of '
                f'each block. Build it by Curvature(model, mode="{mode}"); under a Trainer leave it to ThorCallback.'
            )

    def state_dict(self) -> dict[str, Any]:
        """Steps, factors and the inverses that are kept here, by layer name: plain types and tensors only.

        The tensors are the curvature's own, not copies, as in a module's ``state_dict``.
        """
        state = curvature_state(self._factors, self.stacks, self._schedule, step=self.step, mode=self.mode)
        return state | {"loss_layer": self._observer.loss_layer}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; a following step is bitwise the one that would have followed there.

        Inverses that it lacks, since another process kept them, are computed again from the averages and from what was
        added to their eigenvalues then: the same on all processes, and the lost ones to rounding, which depends on the
        batch that a block is in and where it lies there. One thing cannot come back: the older inverse that was kept
        of a block whose last inversion failed (a warning says so), or whose factor had become zero.

        Raises:
            ValueError: the state is of another mode, other layers, or of other block sizes, or it is damaged; nothing
                was changed.
        """
        self.step = load_curvature_state(
            state, self._factors, self.stacks, self._schedule, step=self.step, mode=self.mode
        )
        self._has_agreed, self._observer.loss_layer = self.stacks.gradient_unit is not None, state.get("loss_layer")
        for index in self._schedule.dismissed():
            self._leave_out(index, "found not to fit its weight's gradient in the run that was saved")
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Curvature:
        """A curvature of a copy of the model, with hooks of its own there, which goes on as this one does.

        Functions that were given (schedules, ``loss_multiplier``) and what reaches other processes are shared. Copy a
        model, its optimizer and its curvature at once, as one tuple, so that the copies belong together.
        """
        model = copy.deepcopy(self.model, memo)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        if "_modules" not in vars(model):
            # The model holds this curvature, and is only being copied itself: hooks of its copy stay silent.
            shared = (self._options, self.loss_multiplier, self.loss_terms, self._connection, self._communicator)
            memo.update((id(one), one) for one in shared)
            twin.__dict__ = copy.deepcopy(self.__dict__, memo)
            return twin
        self._hooks.remove_from_copy(model)
        parameters = [copy.deepcopy(p, memo) for layer in self.layers.values() for p in layer.parameters]
        with trained(parameters):  # those that were frozen since too
            twin.__init__(model, **self._options, parameters=parameters)  # type: ignore[misc]
        twin.left_out = dict(self.left_out)
        twin.connect(**self._connection)
        twin.load_state_dict(self.state_dict())
        # Micro-batches since the last step.
        twin.stacks.take_window(self.stacks)
        twin._observer.take_window(self._observer)
        twin._paused, twin.is_listening = self._paused, copy.deepcopy(self.is_listening, memo)
        if self._hooks.are_removed:
            twin.close()
        return twin

    def n_bytes(self, name: str) -> int:
        """Memory that one layer's window sums, factors and, if they are kept here, inverses take, in bytes."""
        return self.stacks.n_bytes(self._factors[name]["G"] // 2)

    def _rows_here(self) -> int | None:
        """This process's share of ``max_rows``."""
        if self.max_rows is None:
            return None
        return max(-(-self.max_rows // self._communicator.world_size), min(self.max_rows, MIN_ROWS_PER_RANK))

    def _expect(self, name: str) -> None:
        self._window.expect(self._observer.uses[name][0])

    def _is_open(self, name: str) -> bool:
        index, use = self._observer.uses[name]
        if not self._schedule.is_due(index, self.step) or self._paused or not self.is_listening():
            return False
        return use.trains

    def _refresh_costs(self) -> list[float]:
        # Waits for the device, once in a run: what a layer costs is known only when its rows have been seen.
        n_rows, _, n_numbers, _ = self.stacks.counts.T.tolist()
        return refresh_costs([(layer.A, layer.G) for layer in self.layers.values()], n_rows, n_numbers)

    def _full_precision(self) -> torch.autocast:
        # A plain loop may call optimizer.step() within autocast.
        return torch.autocast(self.stacks.flat_sums.device.type, enabled=False)

    def damping_now(self) -> float:
        """The damping of the coming step; a ValueError if a schedule gives one that is not above 0."""
        if not callable(self.damping):
            return self.damping
        damping = float(self.damping(self.step))
        if not (math.isfinite(damping) and damping > 0):
            raise ValueError(f"The damping schedule gave {damping!r} at step {self.step}; it must stay above 0.")
        return damping

    @cached_property
    def _groups(self) -> list[LayerGroup]:
        """The layers whose directions are computed on this rank."""
        pairs = [self.inverses_of(layer.name) for layer in self._own_layers]
        return list(group_layers(self._own_layers, pairs, self.polar_layers))

    def inverses_of(self, name: str) -> FactorPair:
        """Returns views of what is stored of a layer's A and G: their inverses, roots or eigenvectors by block.

        Args:
            name: of the layer.

        Returns:
            ``(A, G)``, each ``[groups, n_blocks, size, size]``; None for a layer without A.
        """
        views = {side: self.stacks.blocks_of(factor, "inverse") for side, factor in self._factors[name].items()}
        return views.get("A"), views["G"]


def _warn_of_few_weights(
    model: nn.Module, layers: Mapping[str, Layer], left_out: Mapping[str, str], only: set[nn.Parameter] | None
) -> None:
    """Say so where less than half of the weights that are trained have curvature, and which have not."""
    of_training = {p for p in model.parameters() if p.requires_grad and (only is None or p in only)}
    own = {p for layer in layers.values() for p in layer.parameters}
    n_trained, n_own = (sum(p.numel() for p in some if not _is_lazy(p)) for some in (of_training, own))
    if not layers or 2 * n_own >= n_trained:
        return
    sizes = {
        name: sum(p.numel() for p in module.parameters(recurse=False) if p in of_training - own and not _is_lazy(p))
        for name, module in ((uncompiled_name(name), module) for name, module in model.named_modules())
    }
    largest = [name for name in sorted(sizes, key=lambda name: -sizes[name]) if sizes[name] > 0]
    reasons = dict.fromkeys(left_out[name] for name in largest if name in left_out)
    warnings.warn(
        f"Curvature preconditions {n_own / n_trained:.0%} of the weights that are trained. The largest of the others "
        f"are those of {name_some(largest, 3)} ({'; '.join(list(reasons)[:3]) or 'plain parameters'}). Give modules of "
        "your own curvature with lightning_thor.register_layer; write experts that lie in one stacked parameter as a "
        "list of nn.Linear, one for each expert.",
        stacklevel=3,
    )


def _is_lazy(p: nn.Parameter) -> bool:
    return isinstance(p, nn.UninitializedParameter)
