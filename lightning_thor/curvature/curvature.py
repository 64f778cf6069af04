"""The curvature of a model, layer by layer: observe -> average -> refresh -> precondition."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from numbers import Real
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_thor.curvature.accumulator import FactorAccumulator
from lightning_thor.curvature.agreement import Agreement
from lightning_thor.curvature.callables import NumberFn
from lightning_thor.curvature.export import export_factors, layer_figures
from lightning_thor.curvature.options import Schedule, check_options
from lightning_thor.curvature.part_timer import PartTimer
from lightning_thor.curvature.refresh_schedule import REJECTED, Interval, RefreshSchedule
from lightning_thor.curvature.silence import Call, why_silent
from lightning_thor.curvature.state_dict import (
    add_inverses,
    check_state,
    curvature_state,
    extended_state,
    load_curvature_state,
)
from lightning_thor.distributed.assignment import refresh_costs
from lightning_thor.distributed.communicator import Communicator, SingleProcess, TimedCommunicator, WorkerGrid
from lightning_thor.distributed.dtensor import reshard
from lightning_thor.distributed.factor_reducer import BucketFn, FactorReducer, one_bucket
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.distributed.shared_directions import SharedDirections
from lightning_thor.distributed.shared_inversions import SharedInversions
from lightning_thor.factors.damping import DampingRule
from lightning_thor.factors.state import ELEMENTS, ROWS, FactorState, Solve, factor_state_of
from lightning_thor.factors.trace_rule import STOP, UPDATE, decide, trace_rule_of
from lightning_thor.layers.base import fan_in, uses_by_caller, weight_of
from lightning_thor.layers.discovery import (
    NOT_TRAINED,
    coverage,
    discover_layers,
    matrix_layers,
    name_some,
    parameters_of,
    trained,
    unwrapped_name,
    warn_of_low_coverage,
    weights_of,
)
from lightning_thor.layers.hooks import Hooks
from lightning_thor.layers.pairs import PairChecks
from lightning_thor.layers.recurrent import together_in_time
from lightning_thor.layers.registry import STATISTICS, KfacApprox
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
            change. In the latter two the G of the output layer (see ``output_layer``) is its diagonal alone. Its g are
            prediction errors; inverting their covariance removes the component that they share, which is the signal.
            Under a Trainer `ThorCallback` chooses the mode.
        damping: greater than 0, or a function of the step. For ``damping_rule="trace"`` relative to the factors' mean
            eigenvalue, else in the units of the Fisher matrix. Where a factor has a row for each token (embeddings, and
            output layers that are tied to one), the mean is of at most a fifth as many as a batch has, so that with 0.2
            each token counts as if it had come once more.
        damping_rule: ``"trace"``, ``"pi"`` or ``"sqrt"``, see `lightning_thor.factors.damping.split_damping`.
        block_size: size of the largest diagonal block of a factor; None keeps factors whole. A measured choice:
            `lightning_thor.choose_block_size`.
        update_every_n_steps: steps from one refresh to the next; or a function of the step that returns them. None
            refreshes at every step at first, then more and more rarely, at every 10th from step 100 on, and at every
            100th from step 10,000 on: `lightning_thor.curvature.refresh_schedule.frequent_at_first`.
        averaging: weight of the past in the factors' exponential moving average (factor decay); 0 uses the last
            refresh's batch alone, as the paper does.
        precondition_bias: take biases of linear layers and convolutions into A, as its last coordinate; otherwise they
            take plain momentum.
        stagger: refresh each layer at a step of its own within the interval (all of them at the first steps), balanced
            by cost, so that no step takes much longer than another. The weights of one recurrent layer have one step.
        trace_rule: refresh a layer only if the trace of its curvature moved: ``"THOR"``, ``"THOR_stop"``,
            ``"THOR_NT"`` (the paper's thresholds) or ``(update_above, stop_below)``, see
            `lightning_thor.factors.trace_rule`. At its turn a layer is observed; its average takes the statistics only
            if the trace moved, and it is inverted two steps later. None refreshes every layer at its turn.
        max_rows: take statistics from at most about so many rows of a batch, spread over it: positions of linear
            layers, of layer and RMS norms, and of convolutions (in whole lines); samples of linear layers and
            convolutions with ``statistics="reduce"``. Batch and group norms take whole samples, at most so many, of 16
            times as many positions (but at least a 32nd of ``max_rows``); a batch norm then uses the mean and variance
            of these samples. Embeddings always take all. Of several processes that train together each takes its share
            of ``max_rows`` of its own batch, but at least 256. None takes all everywhere.
        statistics: for layers that one sample uses at many positions (convolutions, sequences): ``"expand"``
            (K-FAC-expand) takes each position as a row, ``"reduce"`` (K-FAC-reduce) averages inputs and sums gradients
            over them first, which suits losses with one term per sample (Eschenhagen et al. 2023, arXiv:2311.00636).
            ``"masked"`` is ``"expand"`` with zeros for the inputs of rows whose gradient is 0: padding, or positions
            that the loss leaves out, then have no part in A. (Where tensor parallelism splits a layer's outputs, each
            rank goes by the gradients of its own.)
            ``"thor"`` takes each position as a row, the loss as a mean over the batch, and leaves norms to plain
            momentum, as MindSpore's nn.thor does on Ascend: for its published recipes, whose damping is in these units.
        loss_reduction: ``"mean"`` or ``"sum"`` over samples. A mean is taken to be over all positions of the output of
            a layer on the last dimension, and over the batch for a convolution; over the batch in any case with
            ``statistics="reduce"`` or ``"thor"``.
        loss_multiplier: returns a further factor of the loss that is differentiated: the loss scale over the number of
            accumulated micro-batches. Called once per observed pair; a 0-dimensional tensor avoids a sync.
        loss_terms: returns the number of terms in the mean loss, where the model does not show it: called once per
            observed pair; a number, or a 0-dimensional tensor. None counts the rows of the output whose gradient comes
            first in a backward pass: the layer's whose output goes into the loss, so that layers which see some of its
            tokens (experts, regions, masked ones) are part of the same loss. Needed where labels are left out of the
            mean (``ignore_index``) and their number differs between micro-batches or processes.
        fused: number of equal parts of linear layers whose outputs are a concatenation, such as queries, keys and
            values, by pattern of the layer's name (``{"*.qkv": 3}``). Their G is partitioned at the borders, so that no
            block mixes parts; None takes every linear layer as one. (Those of `nn.MultiheadAttention` are always
            three.)
        skip_layers: leave out the modules with these names, or of these patterns of names, and all that is inside of
            them (``["head", "blocks.*.mlp"]``): they take plain momentum. So does a weight that another module shares.
        parameters: leave out layers whose weight is not among these, and norms of which any parameter is not, and take
            no other biases into A; None for all.
        output_layer: name of the output layer, which ``mode="polar"`` and ``"adam"`` treat apart; None takes the
            model's last linear layer or convolution. Name it where the model holds several networks, or defines its
            output layer before others.

    Attributes:
        layers: the layers with curvature, by name.
        left_out: why the others have none, by name.
        coverage: the share of the trained weights that had curvature when it was built.
        has_low_coverage: whether it is below a half, apart from what ``skip_layers`` names.
        fan_in: the number of inputs of each output, by weight, where its shape does not tell; 1 for an embedding.
        weight_of: the weight that a bias within A, or a norm's shift, has its direction with.
        polar_layers: those with polar directions: in polar mode linear layers and convolutions but the output layer.
        step: applied steps so far.
        last_damping: the ``damping`` of the last inversion here, None before.
        n_changes: how often layers were left out or included.
        measures_change: whether the next refresh, the first one apart, measures by how much it changes the factors: it
            is False again then, and `factor_change` has the result.
        changed_at: ``step`` before the last refresh that measured this, None before one did.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: ModeName = "natural",
        damping: Schedule = 0.2,
        damping_rule: DampingRule = "trace",
        block_size: int | None = 64,
        update_every_n_steps: Interval | None = None,
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
        skip_layers: Sequence[str] = (),
        parameters: Iterable[nn.Parameter] | None = None,
        output_layer: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Curvature takes the model, Curvature(model, ...), got a {type(model).__name__}.")
        self._options = check_options(locals())
        self.model = model
        self.mode = mode
        self.damping = damping if callable(damping) else float(damping)
        self.damping_rule: DampingRule = damping_rule
        self.averaging = averaging
        self.max_rows = max_rows
        statistics = statistics if isinstance(statistics, KfacApprox) else STATISTICS[statistics]
        # The whole model's mode, not each layer's: a submodule kept in eval mode still trains.
        self.is_listening: Callable[[], bool] = partial(getattr, model, "training")
        self._paused = False
        self.n_changes = 0
        self.last_damping: float | None = None
        self.timer = None
        self.measures_change = False
        self.changed_at: int | None = None
        self._calls: dict[int, Call] = {}
        """What became of the last call of each layer that is due, by its number."""
        self._parameters = parameters = None if parameters is None else _as_parameters(parameters)
        if parameters and parameters.isdisjoint(model.parameters()):
            raise ValueError(
                "parameters must be the model's: none of those that were given (of the optimizer, under ThorCallback) "
                "belongs to it. Build the optimizer of the model that is trained. Where fully_shard puts others in "
                "their places in configure_model, make it after that, in configure_optimizers: LightningCLI makes that "
                "of a configuration file before it (the lightning-thor command mends this)."
            )
        chosen = MODES[mode]
        matrices = matrix_layers(model) if chosen.has_diagonal_head or chosen.uses_matrix_sign else []
        output_layers = matrices[-1:] if output_layer is None else [output_layer]
        self.layers, self.left_out = discover_layers(
            model,
            block_size=block_size,
            precondition_bias=precondition_bias,
            only=parameters,
            statistics=statistics,
            fused=fused,
            skip_layers=skip_layers,
            diagonal_G=output_layers if chosen.has_diagonal_head else [],
        )
        owners = {use.name: name for name, layer in self.layers.items() for use in layer.uses}
        matrices_here = [use.name for layer in self.layers.values() if layer.kind.is_matrix for use in layer.uses]
        if output_layer is not None and output_layer not in {*matrices_here, *self.left_out}:
            raise ValueError(
                "output_layer must be the name of a linear layer or convolution of the model "
                f"({name_some(matrices_here)}), got {output_layer!r}."
            )
        self.has_low_coverage = warn_of_low_coverage(model, self.layers, self.left_out, parameters, skip_layers)
        frozen = {name for name, why in self.left_out.items() if why == "frozen" and parameters is None}
        self._frozen = weights_of(model, frozen) if frozen else {}
        self.coverage = coverage(model, self.layers, parameters)
        self.fan_in, self.weight_of = fan_in(model, self.layers.values()), weight_of(self.layers.values())
        output_layers = [owners.get(name, name) for name in output_layers]  # of a tied weight the layer that has it
        self.polar_layers = self.layers.keys() & set(matrices) - {*output_layers} if chosen.uses_matrix_sign else set()
        self.factors = factor_state_of(self.layers, chosen.decomposition)
        self._trace_rule = trace_rule_of(trace_rule)
        has_rule = self._trace_rule is not None
        together = together_in_time(self.layers)
        self._schedule = RefreshSchedule(update_every_n_steps, len(self.layers), stagger, has_rule, together)
        own = ref(self)  # hooks of the model hold the accumulator, and are to end with this
        self._accumulator = FactorAccumulator(
            self.layers,
            self.factors,
            loss_reduction=loss_reduction,
            loss_multiplier=loss_multiplier,
            loss_terms=loss_terms,
            max_rows=max_rows,
            counts_elements=stagger,
            backward_pass=lambda: own()._hooks.backward_pass,  # type: ignore[union-attr]
        )
        self._checks = PairChecks(model, self.layers, self._accumulator.uses)
        self._agreement = Agreement(self.factors, self._checks, self._accumulator.misfits)
        self.connect(ProcessGroupCommunicator())
        self._hooks = self._listen()

    def _listen(self) -> Hooks:
        accumulator, schedule = self._accumulator, self._schedule
        uses = [use for layer in self.layers.values() for use in layer.uses]
        numbers = {name: number for name, (number, _) in accumulator.uses.items()}

        def is_due(name: str) -> bool:
            # The module that shows how many terms the loss has is asked whenever any layer is due.
            first = schedule.earliest if name == accumulator.loss_layer else schedule.turns_at[numbers[name]]
            return schedule.step >= first

        def is_of_loss(name: str) -> bool:
            # A pass that is not observed has terms of its own.
            return name == accumulator.loss_layer and not self._paused and self.is_listening()

        return Hooks(
            {use.name: use.module for use in uses if use.caller is None},
            self._is_open,
            self._observe_pair,
            uses_by_caller(uses),
            lambda name: accumulator.reducer.expect(numbers[name]),
            subsample_input=accumulator.subsample_input,
            is_due=is_due,
            weight_of=lambda name: accumulator.uses[name][1].weight,
            needs_returned={
                use.name for layer in self.layers.values() for use in layer.uses if layer.needs_returned(use)
            }.__contains__,
            is_of_loss=is_of_loss,
            note_gradient=accumulator.note_gradient,
            note_unreadable=lambda name: self._calls.update({numbers[name]: Call.UNREADABLE}),
            note_changed=lambda name: self._calls.update({numbers[name]: Call.CHANGED}),
            checks=self._checks,
            has_no_gradient=accumulator.has_no_gradient,
        )

    def connect(
        self,
        communicator: Communicator,
        *,
        bucket_fn: BucketFn = one_bucket,
        is_sync_step: Callable[[], bool] | None = None,
        worker_grid: WorkerGrid | None = None,
    ) -> None:
        """Choose how this process reaches the others; at first by the default process group.

        Args:
            communicator: of the processes.
            bucket_fn: which layers' factors are sent together, see `lightning_thor.distributed.factor_reducer`.
            is_sync_step: whether a backward is the last before the step, so that buckets may be sent from it; None
                sends all of them in `update`.
            worker_grid: which processes store the inverses of a layer and compute its direction; None: all do.

        Raises:
            RuntimeError: a step was made, and the inverses were to be stored elsewhere from now on.
            ValueError: with ``mode="adam"``, and whole weights, not every process would store all inverses.
        """
        self._connection: dict[str, Any] = {
            "communicator": communicator,
            "bucket_fn": bucket_fn,
            "is_sync_step": is_sync_step,
            "worker_grid": worker_grid,
        }
        grid = worker_grid or WorkerGrid(communicator, SingleProcess())
        communicator, inverters, receivers = map(self.timed, (communicator, *grid[:2]))
        self._columns, decomposition = grid.columns, self.factors.decomposition
        if MODES[self.mode].change_basis is not None and receivers.world_size > 1 and grid.columns is None:
            raise ValueError(
                f"inverse_workers must be None with mode={self.mode!r}: every rank needs the {decomposition.name} of "
                "all layers."
            )
        n_products = len(decomposition.products)
        shared = SharedDirections(receivers, self.layers, products=n_products, polar=self.polar_layers)
        if self.factors.has_inverse != set(shared.own):
            if self.step:
                raise RuntimeError(
                    f"Curvature.connect(worker_grid=...) came after {self.step} steps, and the inverses are kept by "
                    "other processes by now. Connect before the first step, and before load_state_dict."
                )
            self.factors.set_inverse_owner(shared.own)
            self.__dict__.pop("_groups", None)
        self._communicator, self._shared, layers = communicator, shared, list(self.layers.values())
        self._own_layers = [layers[index] for index in shared.own]
        self._reducer = FactorReducer(self.factors, communicator, self._schedule.due, bucket_fn, is_sync_step)
        self._accumulator.connect(self._reducer)
        self.solve: Solve = SharedInversions(inverters, decomposition)

    def send_in_update(self) -> None:
        """Send nothing from backward any more: one backward pass may reach layers of several curvatures, and processes
        must not send their factors in different orders."""
        if self._connection["is_sync_step"] is not None:
            self.connect(**self._connection | {"is_sync_step": None})

    @property
    def stacks(self) -> FactorState:
        """Former name of `factors`."""
        warnings.warn("Curvature.stacks is now Curvature.factors.", DeprecationWarning, stacklevel=2)
        return self.factors

    @property
    def step(self) -> int:
        """Applied steps so far."""
        return self._schedule.step

    def is_due(self) -> bool:
        """True if the coming step refreshes some layer; these layers' forward and backward passes are observed."""
        return self._schedule.is_any_due

    def due_parameters(self) -> set[nn.Parameter]:
        """The parameters of the layers that the coming `update` inverts."""
        layers = list(self.layers.values())
        return {p for number in self._schedule.due_inversions() for p in layers[number].parameters}

    @property
    def refreshes(self) -> tuple[int, int]:
        """Refreshes that were done, and that would have been without a trace rule, so far; counted by layer."""
        return self._schedule.refreshes, self._schedule.turns()

    @property
    def inverse_age(self) -> float:
        """Steps from the inversion of the inverses that the last step used to that step, on average over layers that
        are not left out; after `load_state_dict` counted from there."""
        return self._schedule.mean_age()

    @property
    def factor_change(self) -> Tensor:
        """``‖F - F_old‖ / ‖F_old‖`` (Frobenius) of each layer's A and G at its last refresh that measured it,
        ``[layers, 2]``; infinite if F_old was 0, NaN if none did, and for a layer without A. No device sync."""
        return self.factors.changes

    @property
    def timer(self) -> PartTimer | None:
        """Measures the parts of a step, from its ``begin_step()`` to its ``end_step()``; None, as at first, measures
        nothing."""
        return self._timer

    @timer.setter
    def timer(self, timer: PartTimer | None) -> None:
        self._timer = timer
        self.part: Callable[[str], AbstractContextManager[Any]] = nullcontext if timer is None else timer.part
        """Makes a context that `timer` measures as the part of this name."""

    def timed(self, communicator: Communicator) -> Communicator:
        """``communicator`` with calls and waits that are the part ``"communication"``; of one process it is the same
        one."""
        if communicator.world_size == 1:
            return communicator
        own = ref(self)
        return TimedCommunicator(communicator, lambda: own().part("communication"))  # type: ignore[union-attr]

    @property
    def gradient_unit(self) -> float | Tensor:
        """Power of two that output gradients are divided by to be rows of G, see `FactorState.gradient_unit`."""
        unit = self.factors.gradient_unit
        return 1.0 if unit is None else unit

    def close(self) -> None:
        """Remove the hooks. The curvature keeps its state and can still be saved."""
        self._hooks.remove()

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Remove the hooks in this context, for what takes no modules with hooks, such as `torch.jit.script`."""
        is_closed = self._hooks.are_removed
        self.close()
        try:
            yield
        finally:
            if not is_closed:
                self._hooks = self._listen()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Listen to no forward pass in this context: for passes whose gradients are not those of the training loss,
        such as an adversarial example's, or another optimizer's loss that flows through these layers."""
        before, self._paused = self._paused, True
        self._choose_graphs()
        try:
            yield
        finally:
            self._paused = before
            self._choose_graphs()

    def observe(self, name: str, a: Tensor, g: Tensor) -> None:
        """Add one call of a layer to the open window.

        Args:
            name: of the layer, or of another module that is tied to it.
            a: its input, ``[..., in]`` (an image ``[batch, channels, *space]``, tokens ``[...]``).
            g: the gradient of the loss, as it was differentiated, with respect to its output, ``[..., out]``.
        """
        with torch.no_grad():
            self._observe_pair(name, a, g)

    def _observe_pair(self, name: str, a: Tensor, g: Tensor) -> None:
        with self.part("statistics"):
            self._accumulator.observe(name, a, g)

    def discard(self) -> None:
        """Empty the open window: its step was skipped (a loss scale that overflowed), on all processes alike."""
        self._reset(finish=self.is_due())

    def forget(self) -> None:
        """Leave out what was observed since the last step, since its gradients were set to zero; on all processes
        alike. Forward passes that wait for their backward pass are observed all the same."""
        # Not by what was observed here: the others may have seen layers that this process did not use.
        finish = self.is_due() and self._reducer.forget()
        if finish or self._accumulator.has_pairs or self._hooks.has_waiting:
            self._reset(finish=finish, keeps_graphs=True)

    def _reset(self, *, finish: bool = False, keeps_graphs: bool = False) -> None:
        self._hooks.reset(keeps_graphs=keeps_graphs)
        self._checks.reset()
        self._reducer.reset(finish=finish, keeps_graphs=keeps_graphs)
        self._accumulator.reset()
        if not (self._agreement.is_reached or self._schedule.refreshes):
            self.factors.gradient_unit = None

    @torch.no_grad()
    def update(self) -> None:
        """Average and refresh what is due; once per applied step, between backward and `precondition`.

        Raises:
            RuntimeError: at the first refresh, if no layer was observed and no weight of theirs has a gradient.
        """
        if self._agreement.found is not None:
            self._leave_out_misfits(self._agreement.read())
        if self._schedule.has_work:
            self._refresh()
        else:
            self._schedule.step += 1
        # As in `_choose_graphs`, without a call in every step.
        self._hooks.graphs.hand_over = self._schedule.step >= self._schedule.earliest and not self._paused

    def _choose_graphs(self) -> None:
        """Choose whether the coming forward pass takes a compiled graph that hands pairs over."""
        self._hooks.graphs.hand_over = self._schedule.is_any_due and not self._paused

    def _refresh(self) -> None:
        schedule, factors, decisions, first_windows = self._schedule, self.factors, None, None
        if schedule.is_any_due:
            self._hooks.flush()
            if found := self._agreement.reach(self._communicator, schedule.due, schedule.dismissed()):
                self._leave_out_misfits(found)
            self._reducer.sum()
        # Fewer than before, if some were left out.
        due = schedule.due()
        if due:
            self._accumulator.check_that_layers_fire(due, self._why_silent)
            self._calls.clear()
            if self._frozen:
                self._warn_of_unfrozen()
            if schedule.stagger and not schedule.costs:
                # Waits for the device, once in a run: a layer's cost is known only when its rows have been seen.
                counts = factors.counts.T.tolist()
                schedule.costs = refresh_costs(factors.layout.shapes, counts[ROWS], counts[ELEMENTS])
        with self._full_precision():
            if due:
                with self.part("statistics"):
                    decisions = self._average(due)
                    if not schedule.have_windows.issuperset(due):
                        # Read in the next step, so that nothing waits.
                        has_window = (factors.updates > 0).to(torch.int8)
                        told = has_window.masked_fill_((has_window == 0) & factors.is_rejected, REJECTED)
                        first_windows = HostCopy(told[factors.layout.index(due).layers])
            inverted = schedule.due_inversions()
            if inverted:
                with self.part("inversion"):
                    failed = factors.failed_inversions.clone()
                    self.last_damping = self.damping_now()
                    factors.invert(factors.layout.index(inverted), self.damping_rule, self.last_damping, self.solve)
                    self._shared.add_up_(factors.failed_inversions, before=failed)
        schedule.advance(decisions, first_windows)
        self._accumulator.next_window()

    def _warn_of_unfrozen(self) -> None:
        """Warn once of layers that were frozen and train now; under a Trainer `ThorCallback` includes them."""
        # A layer that trained before it was frozen may keep its last gradient.
        training = [name for name, weight in self._frozen.items() if weight.requires_grad and weight.grad is not None]
        if training:
            self._frozen = {}
            warnings.warn(
                f"{name_some(training)}: frozen when Curvature was built, and trained since, with "
                f"{MODES[self.mode].fallback}. Call curvature.include() after layers are unfrozen.",
                stacklevel=5,
            )

    def _average(self, due: tuple[int, ...]) -> HostCopy | None:
        """Take the open window into the averages; with a trace rule those of layers whose traces moved."""
        index, wanted, decisions = self.factors.layout.index(due), None, None
        if self._trace_rule is not None and self._schedule.decides:
            old, new = self.factors.traces(index, self.averaging, self.damping_rule, self.damping_now())
            decided = decide(self._trace_rule, old, new)
            for layers, earlier in self._schedule.on_the_way:
                # Layers that are to stop have turns until the host learns of it.
                has_stopped = torch.zeros(len(self.layers), dtype=torch.bool, device=decided.device)
                has_stopped[self.factors.layout.index(layers).layers] = earlier.to(decided.device) == STOP
                decided.masked_fill_(has_stopped[index.layers], STOP)
            wanted = torch.zeros(len(self.layers), dtype=torch.bool, device=decided.device)
            wanted[index.layers] = decided == UPDATE
            decisions = HostCopy(decided)
        measures_change = self.measures_change and self._schedule.refreshes > 0
        self.factors.update_ema(index, self.averaging, wanted, measures_change=measures_change)
        if measures_change:
            self.measures_change, self.changed_at = False, self.step
        return decisions

    def _leave_out_misfits(self, found: Mapping[int, str]) -> None:
        """Leave out layers whose pairs are not their weight's, with a warning; ``found`` has the reasons, by number."""
        for index, reason in found.items():
            self._leave_out(index, reason)
        if found:
            names = [list(self.layers)[index] for index in found]
            warnings.warn(
                f"{name_some(names)}: without curvature from now on, with {MODES[self.mode].fallback}. "
                f"{names[0] or '(the model itself)'}: {self.left_out[names[0]]}.",
                stacklevel=5,
            )

    def _leave_out(self, index: int, reason: str) -> None:
        """Refresh a layer no more, and let its parameters take their plain gradient."""
        name = list(self.layers)[index]
        self.left_out[name] = reason
        self.layers[name] = replace(self.layers[name], is_left_out=True)
        self.polar_layers.discard(name)
        self._accumulator.misfits.setdefault(index, reason)
        self._schedule.dismiss(index)
        self._own_layers = [self.layers[layer.name] for layer in self._own_layers]
        self.n_changes += 1
        self.__dict__.pop("_groups", None)

    @torch.no_grad()
    def include(self, parameters: Iterable[nn.Parameter] = ()) -> list[str]:
        """Give curvature to layers that train by now, and were frozen or not among the parameters of this curvature.

        They are due at once. All others go on as they are; but with ``stagger`` they are due too, and all are spread
        anew. A layer whose blocks change, since its bias trains now, is a new one. Call it on all processes alike,
        between a step and the next forward pass.

        Args:
            parameters: of this curvature from now on, beside those that it was given. They are taken as trained.

        Returns:
            The names of the new layers.
        """
        reshard(self.model)  # layers are looked for by their parameters
        self._leave_out_misfits(self._agreement.read())
        parameters = _as_parameters(parameters)
        own = [p for layer in self.layers.values() for p in layer.parameters]
        only = None if self._parameters is None else self._parameters | parameters
        before, state, is_closed = copy.copy(self), self.state_dict(), self._hooks.are_removed
        self.gather_inverses(state)  # layers may come to other processes, which have not their inverses
        self.close()
        with trained([*own, *parameters]):  # those of our own that were frozen since too
            self.__init__(self.model, **self._options, parameters=only)  # type: ignore[misc]
        self.connect(**before._connection)
        self.damping, self.averaging = before.damping, before.averaging
        self.is_listening, self._paused = before.is_listening, before._paused
        self.n_changes, self.last_damping = before.n_changes + 1, before.last_damping
        self.timer, self.measures_change, self.changed_at = before.timer, before.measures_change, before.changed_at
        self.__dict__.pop("_groups", None)
        state, new = extended_state(state, self.state_dict(), spreads=before._schedule.stagger)
        load_curvature_state(state, list(self.layers), self.factors, self._schedule, mode=self.mode)
        self._accumulator.go_on_from(before._accumulator)
        for index in self._schedule.dismissed():
            self._leave_out(index, before.left_out[list(self.layers)[index]])
        self._choose_graphs()
        if is_closed:
            self.close()
        return new

    @torch.no_grad()
    def precondition(self, grads: Tensors, mode: str = "natural") -> Directions:
        """Compute the natural gradient G⁻¹ grad A⁻¹ of each layer, or the direction of another mode.

        Args:
            grads: dL/dW by parameter, unchanged; momenta in polar mode.
            mode: name of a mode that this curvature serves.

        Returns:
            New tensors by parameter, in at least float32; copies of the gradients of parameters without curvature.

        Raises:
            RuntimeError: this curvature does not serve the mode.
        """
        return {p: direction for part in self.directions(grads, mode) for p, direction in part.items()}

    def directions(self, tensors: Tensors, mode: str = "natural") -> Iterator[Directions]:
        """Yield what `precondition` returns, and raise what it raises, in parts, each of some parameters; in one part
        if other ranks compute some."""
        self.check_that_it_serves(mode)
        directions_of = MODES[mode].directions
        assert directions_of is not None, f"{mode} mode has a change of basis"
        own = directions_of(self.grouped(self._groups), self._shared.own_grads(tensors))
        parts = self._shared.all_gather_uneven(own, tensors)
        while True:
            # Not around the caller's use of a part.
            with self._full_precision(), self.part("directions"):
                part = next(parts, None)
            if part is None:
                return
            yield part

    @torch.no_grad()
    def change_basis(self, tensors: Tensors, mode: str = "adam", *, back: bool = False) -> Directions:
        """Take each layer's tensor to the coordinates in which the blocks of its A and G are diagonal.

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
        with self._full_precision(), self.part("directions"):
            return change(self.grouped(self._groups), tensors, back=back)

    def grouped(self, groups: Sequence[LayerGroup]) -> GroupedLayers:
        """Put ``groups`` of layers, or of rows of their parameters, beside what else their directions depend on, for
        `Mode.directions` and `Mode.change_basis`."""
        return GroupedLayers(groups, self.factors.decomposition, self.polar_layers, self.gradient_unit)

    def check_that_it_serves(self, mode: str) -> None:
        """Raise a RuntimeError unless directions of ``mode`` can be computed from what is stored here."""
        if mode != self.mode and mode not in MODES[self.mode].serves:
            raise RuntimeError(
                f'Thor(mode="{mode}") got a curvature of mode="{self.mode}", which stores another decomposition of '
                f'each block. Build it by Curvature(model, mode="{mode}"); under a Trainer leave it to ThorCallback.'
            )

    def state_dict(self) -> dict[str, Any]:
        """Steps, factors and the inverses that are stored here, by layer name: plain types and tensors only.

        The tensors are the curvature's own, not copies, as in a module's ``state_dict``.
        """
        state = curvature_state(list(self.layers), self.factors, self._schedule, mode=self.mode)
        return state | {"loss_layer": self._accumulator.loss_layer}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; a following step is bitwise the one that would have followed there.

        Layers of the state that are frozen here, or not among the parameters of this curvature, become layers of it
        again: they were unfrozen there. Layers of which former versions kept no curvature (recurrent ones, experts,
        embeddings with a forward of their own, normed and pruned weights) begin theirs.

        Inverses that the state lacks, since another process stored them, are computed again from the averages and the
        last damping: equal on all processes, and to the lost ones to rounding, which depends on the batch that a block
        is in and its place there. Older inverses cannot come back: of a block whose last inversion failed (a warning
        says so), or whose factor had become zero; and with a trace rule, of layers whose new averages were still to be
        inverted.

        Args:
            state: see `state_dict`.

        Raises:
            ValueError: the state is of another mode, other layers, or of other block sizes, or it is damaged; nothing
                was changed.
        """
        check_state(state)
        # Former versions took the name that checkpoint_wrapper gives to what it wraps.
        state = {**state, "layers": {unwrapped_name(name): own for name, own in state["layers"].items()}}
        further = {name for name in state["layers"] if self.left_out.get(name, "").startswith(NOT_TRAINED)}
        if further:
            self.include(set().union(*parameters_of(self.model, further).values()))
        lacking = self.layers.keys() - state["layers"].keys()
        if lacking and all(self.layers[name].had_none_before for name in lacking):
            extended, new = extended_state(state, self.state_dict(), spreads=self._schedule.stagger)
            state = extended if lacking == {*new} else state
        load_curvature_state(state, list(self.layers), self.factors, self._schedule, mode=self.mode)
        self._agreement.go_on(self._communicator)
        loss_layer = state.get("loss_layer")
        self._accumulator.loss_layer = None if loss_layer is None else unwrapped_name(loss_layer)
        for index in self._schedule.dismissed():
            self._leave_out(index, "found not to fit its weight's gradient in the run that was saved")
        self._reset()
        self._choose_graphs()

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
            shared = (self._options, *self._options.values(), self._connection, self._communicator)
            memo.update((id(one), one) for one in shared)
            twin.__dict__ = copy.deepcopy(self.__dict__, memo)
            return twin
        self._hooks.remove_from_copy(model)
        parameters = [copy.deepcopy(p, memo) for layer in self.layers.values() for p in layer.parameters]
        with trained(parameters):  # those that were frozen since too
            twin.__init__(model, **self._options, parameters=parameters)  # type: ignore[misc]
        twin.damping, twin.averaging = self.damping, self.averaging
        twin._parameters, twin.left_out = copy.deepcopy(self._parameters, memo), dict(self.left_out)
        twin.connect(**self._connection)
        twin.load_state_dict(self.state_dict())
        # Micro-batches since the last step.
        twin.factors.copy_window_(self.factors)
        twin._accumulator.copy_window_(self._accumulator)
        twin._paused, twin.is_listening = self._paused, copy.deepcopy(self.is_listening, memo)
        if self._hooks.are_removed:
            twin.close()
        return twin

    def export(self) -> dict[str, dict[str, Any]]:
        """The factors by layer name, as copies in float64; waits for the device.

        They are the empirical K-FAC approximation of the Fisher matrix of the per-sample loss, block-diagonal, averaged
        over the windows of the refreshes (see ``averaging``), without damping: for a weight ``[out, in]``, flattened
        row by row, E[∇W ∇Wᵀ] ≈ G ⊗ A. A is the mean over rows, G over samples of the sum over their positions. Where
        several processes train together each has the same.

        Returns:
            For each layer:

            * ``"A"``, ``"G"``: diagonal blocks ``[groups, n_blocks, size, size]``, the last one padded with zeros
              beyond ``"A_width"``, ``"G_width"``; size 1 is a diagonal. Without ``"A"`` (norms) G is the diagonal of
              the parameters' own Fisher matrix. Groups are those of a grouped convolution, or fused parts.
            * ``"A_eigenvalues"``, rising, ``[groups, n_blocks, size]``, and ``"A_eigenvectors"``, in columns; as of G.
            * ``"n_windows"``: refreshes whose statistics the average holds; 0: never observed, and all zeros.
            * ``"rows_per_sample"``: positions of a convolution or sequence, as last seen.
            * ``"with_bias"``: True if the bias is the last column of the weight here, and the last coordinate of A.
            * ``"tied_to"``: name of the layer that this one's factors are added to at inversion, or None.
        """
        return export_factors(self.layers, self.factors)

    def figures(self) -> dict[str, dict[str, Any]]:
        """How each layer's curvature looks now, as plain types; waits for the device.

        Returns:
            For each layer:

            * ``"step"``, that of this curvature; ``"inverted_at"``: what it was before the last inversion of the layer,
              -1 if there was none; ``"stopped"``: whether the trace rule refreshes it no more, None without one;
              ``"rows"``: those of its last window that measured `factor_change`.
            * ``"A"`` (but of norms) and ``"G"``: ``"width"``; ``"block_size"`` and ``"n_blocks"``;
              ``"is_partitioned"``: False if it is whole or diagonal; ``"trace"``; ``"damping"``, as was last added to
              the eigenvalues; ``"change"``, see `factor_change`; of the diagonal blocks together: ``"eigenvalues"``,
              falling, at some ``"ranks"`` from 1 on; ``"condition"`` number, damped; ``"effective_rank"``, see
              `lightning_thor.curvature.export.effective_rank`; and of a whole factor ``"outside"``: the share of ‖F‖²
              (Frobenius) that diagonal blocks of each size would lose. None stands for what is not known, or not
              finite.
        """
        return layer_figures(self.layers, self.factors, self._schedule)

    def n_bytes(self, name: str) -> int:
        """Memory of one layer's window sums, factors and, if they are stored here, inverses, in bytes."""
        return self.factors.n_bytes(self._accumulator.uses[name][0])

    def _is_open(self, name: str) -> bool:
        index, use = self._accumulator.uses[name]
        if not self._schedule.is_due(index):
            return False
        if self._paused:
            self._checks.skip(name)  # this pass may add to the weight's gradient
        call = Call.PAUSED if self._paused else Call.OBSERVED if self.is_listening() else Call.NOT_TRAINING
        self._calls[index] = call
        return call is Call.OBSERVED and use.trains

    def _why_silent(self, number: int) -> str:
        return why_silent(list(self.layers.values())[number], self._calls.get(number))

    def _full_precision(self) -> AbstractContextManager[None]:
        # A plain loop may call optimizer.step() within autocast.
        device = self.factors.device.type
        return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()

    def damping_now(self) -> float:
        """The damping of the coming step; a ValueError if a schedule gives one that is not above 0."""
        if not callable(self.damping):
            return self.damping
        given: Any = self.damping(self.step)
        is_number = given.numel() == 1 if isinstance(given, Tensor) else isinstance(given, Real)
        damping = float(given) if is_number else math.nan
        if not (math.isfinite(damping) and damping > 0):
            raise ValueError(f"The damping schedule gave {given!r} at step {self.step}; it must stay above 0.")
        return damping

    @cached_property
    def _groups(self) -> list[LayerGroup]:
        """The layers whose directions are computed on this rank."""
        pairs = [self.inverses_of(layer.name) for layer in self._own_layers]
        return list(group_layers(self._own_layers, pairs, self.polar_layers))

    def inverses_of(self, name: str) -> FactorPair:
        """Views of what is stored of a layer's A and G, their inverses, roots or eigenvectors: ``(A, G)``, each
        ``[groups, n_blocks, size, size]``; None for a layer without A."""
        number, _ = self._accumulator.uses[name]
        views = {side: self.factors.blocks(number, side, "inverse") for side, _ in self.factors.layout.factors(number)}
        return views.get("A"), views["G"]

    def workers_of(self, name: str) -> Mapping[int, int]:
        """Which process of its column stores the inverses of the layer ``name``, by number of a process, where weights
        are sharded and processes store the inverses of different layers (see `WorkerGrid`); otherwise empty: each
        stores all."""
        row = self._shared.group_of[self._accumulator.uses[name][0]]
        return {rank: column[row] for column in self._columns or () for rank in column}

    @torch.no_grad()
    def gather_inverses(self, state: dict[str, Any], *, keeps: bool = True) -> None:
        """Add to what `state_dict` returned the inverses that other processes store, on the host; all of them must call
        it. Nothing is sent where weights are whole, or each process stores all.

        Args:
            state: changed in place.
            keeps: whether this process is to have them; otherwise it only sends its own.
        """
        if self._columns is not None:
            add_inverses(state, list(self.layers), self.factors, self._shared.sum_, keeps=keeps)


def _as_parameters(given: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """The parameters that a user gave; a TypeError for what is none, such as names, of which there is no layer."""
    parameters = list(given)
    for one in parameters:
        if not isinstance(one, Tensor):
            got = repr(one)[:100]
            raise TypeError(f"parameters must be those of modules, such as model.head.parameters(), but holds {got}.")
    return set(parameters)
