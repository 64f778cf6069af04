"""Forward hooks that pair each layer's input with the gradient of its output, for a listener."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import FrameType, MethodType
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from lightning_thor.layers.attention import Note, RecordProducts
from lightning_thor.layers.calls import Calls
from lightning_thor.layers.compiled import (
    TRACES_MODES,
    Receiver,
    can_pass_on,
    guard_hooks,
    not_alone,
    number_of,
    pass_on,
)
from lightning_thor.layers.functional import RecordFunctions
from lightning_thor.layers.matrices import RecordMatrices
from lightning_thor.layers.pairs import Arrange, Pair, PairChecks, as_plain_tensor, is_readable
from lightning_thor.layers.recurrent import (
    Recurrent,
    StepGradients,
    Steps,
    WithoutLibraries,
    is_transformed,
    products_in,
    saves_tensors_elsewhere,
)
from lightning_thor.layers.weight_product import (
    accumulates,
    accumulator_of,
    backward_pass,
    before_backward_of,
    before_product,
    find_product,
    graph_is_kept,
    outermost_pass,
)

NamePredicate = Callable[[str], bool]


class CompiledGraphs:
    """Which graphs a compiled model takes."""

    def __init__(self) -> None:
        self.hand_over = True
        """Whether they hand pairs over; must be true whenever a module is open."""


class _Unpickled:
    """What hooks are bound to: a pickled module has methods of this class in their place, and its copy is silent."""

    def on_forward(self, *args: Any) -> None:
        """Do nothing."""

    before = after = on_forward


class Hooks:
    """Forward hooks that pair each layer's input with the gradient of its output.

    The output is that of the operation that multiplied by the weight, which autograd's graph shows: whatever is done to
    it afterwards, within the module, in other hooks, in place or through views, the gradient belongs to the input.
    Where the graph does not show the operation (a compiled region), the output is what the module returned.

    Compiled graphs hand pairs over from within, see `lightning_thor.layers.compiled`; a model has a second graph that
    does not, which is taken unless ``graphs.hand_over``.

    A pair is handed over when its gradient arrives in a backward pass that adds to the weight's gradient: so activation
    checkpointing, unused outputs, passes without gradients and `torch.autograd.grad` give exactly the pairs that made
    the weight's gradient. Where a graph is kept (``retain_graph=True``) more backward passes may come, whose gradients
    add up: such a pair waits for a pass that does not keep the graph, or for `flush`. The hooks change nothing and do
    nothing unless ``is_open``.

    Args:
        modules: the modules to observe, by name.
        is_open: whether the named module is to be observed in the present forward pass.
        listener: called in backward, without autograd, with the name, the input and the output's gradient.
        callers: names of the weights inside modules that multiply by them without calling a module, by role (see
            `ModuleUse.role`): attentions, recurrent layers, others.
            Pairs of an attention are batch first, ``[batch, positions, width]``; those of a recurrent layer are of one
            step, ``[batch, width]``, or of all steps.
        expect: called in forward with the name, for each pair that backward is to hand over; what it returns is held
            until then, or until the pair's graph is freed: such a pair never comes.
        subsample_input: returns the rows of the named module's input that must be kept; called under autocast, where
            autograd may save a copy in lower precision instead of the input.
        is_due: a cheap first test, run in every forward pass; True whenever ``is_open`` is. A plain function that calls
            no other.
        weight_of: the weight that the named module multiplies by; by default its ``weight``.
        needs_returned: whether the gradient is wanted of the named module's output, whatever it did after its product
            with the weight.
        is_of_loss: whether the gradient of the named module's output is to be noted in this forward pass (of a compiled
            one asked in backward), where ``is_due`` is true and ``is_open`` is not.
        note_gradient: called in backward with the name of such a module, this gradient and the number of the pass.
        note_unreadable: called in forward with the name of a module that is open, whose input is no tensor of rows.
        note_changed: called in backward with the name of a module whose input was changed in place since.
        checks: compares pairs with the weight's gradient.
        has_no_gradient: whether the gradient of the named module's weight was set to None since the last backward pass
            that added to it, or there was none; asked where pairs wait.

    Modules do not hold this object: where nothing else does, it goes, and takes their hooks with it.

    Attributes:
        graphs: which graphs a compiled model takes.
        are_removed: whether `remove` was called.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        is_open: NamePredicate,
        listener: Callable[[str, Tensor, Tensor], None],
        callers: Mapping[nn.Module, Mapping[str, str]] | None = None,
        expect: Callable[[str], object] = lambda name: None,
        subsample_input: Callable[[str, Tensor], Tensor] = lambda name, a: a,
        is_due: NamePredicate = lambda name: True,
        weight_of: Callable[[str], Tensor | None] | None = None,
        needs_returned: NamePredicate = lambda name: False,
        is_of_loss: NamePredicate = lambda name: False,
        note_gradient: Callable[[str, Tensor, int], None] = lambda name, g, backward: None,
        note_unreadable: Callable[[str], None] = lambda name: None,
        note_changed: Callable[[str], None] = lambda name: None,
        checks: PairChecks | None = None,
        has_no_gradient: NamePredicate = lambda name: False,
    ) -> None:
        from torch._dynamo import decorators  # takes a second, like all of dynamo

        guard_hooks()
        # Where hooks cannot be part of a graph they run beside it: they read Python counters, which would recompile at
        # every step. A function that dynamo skips runs as it is, while a disabled one (with all that it calls) costs a
        # wrapper, which is most of an idle hook. `skip` is not public: where it is missing, `disable` does the same at
        # its cost.
        skip = getattr(decorators, "skip", torch.compiler.disable)
        self.graphs, self.are_removed = CompiledGraphs(), False
        self._receivers: list[Receiver] = []
        self._listener, self._expect, self._subsample_input = listener, expect, subsample_input
        self._is_open, self._is_due = is_open, skip(is_due)
        self._is_of_loss, self._note_gradient = is_of_loss, note_gradient
        self._note_unreadable, self._note_changed = note_unreadable, note_changed
        self._weight_of = weight_of or (lambda name: getattr(modules.get(name), "weight", None))
        self._needs_returned, self._checks, self._has_no_gradient = needs_returned, checks, has_no_gradient
        self._waiting: dict[Pair, None] = {}
        """Pairs that have a gradient, of a graph that is kept."""
        self._handed_over: Pair | None = None
        """The pair that the listener is called with."""
        self._calls: list[Calls] = []
        """Of each caller."""
        owner = _Unpickled()
        # Before a user's hooks, which may change the output: a compiled graph does not show what it was.
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(
                MethodType(self._forward_hook(name, module), owner), with_kwargs=True, prepend=True
            )
            for name, module in modules.items()
        ]
        for caller, names in (callers or {}).items():
            before, after = self._caller_hooks(names, caller)
            self._handles.append(caller.register_forward_pre_hook(MethodType(before, owner)))
            # Always called: a forward pass that fails must not leave its recording open.
            self._handles.append(
                caller.register_forward_hook(MethodType(after, owner), with_kwargs=True, prepend=True, always_call=True)
            )
        # Not `__del__`: the handles find their modules by weak references, which a garbage collection clears before.
        finalize(self, _remove_all, self._handles, self._calls).atexit = False

    @property
    def backward_pass(self) -> int:
        """The number of the backward pass that the pair at hand came in; below 0 outside of one. A segment that
        reentrant checkpointing runs backward belongs to the outermost pass around it."""
        return outermost_pass() if self._handed_over is None else self._handed_over.backward_pass

    def flush(self) -> None:
        """Hand over the pairs that wait for more backward passes through a kept graph: no more will come."""
        with torch.no_grad():
            for pair in list(self._waiting):
                self._hand_over(pair)

    @property
    def has_waiting(self) -> bool:
        """True if a pair waits for more backward passes through a kept graph."""
        return bool(self._waiting)

    def reset(self, *, keeps_graphs: bool = False) -> None:
        """Forget the pairs that wait: their step is skipped.

        Args:
            keeps_graphs: forget their gradients alone, since more backward passes may come.
        """
        for pair in self._waiting:
            pair.g, pair.backward_pass = None, -1
            pair.a = pair.a if keeps_graphs else None
        self._waiting.clear()

    def remove(self) -> None:
        """Remove all hooks of modules; hooks of graphs go with their graph."""
        _remove_all(self._handles, self._calls)
        self._receivers.clear()
        self.are_removed = True

    def remove_from_copy(self, model: nn.Module) -> None:
        """Remove the copies of these hooks, which do nothing, from a copy of the model."""
        ids = {handle.id for handle in self._handles}
        for module in model.modules():
            for dead in ids & (module._forward_hooks.keys() | module._forward_pre_hooks.keys()):
                for hooks in (
                    module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called,
                    module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs,
                ):  # fmt: skip
                    hooks.pop(dead, None)

    # Hooks are closures: copy.deepcopy of the model (SWA, EMA) copies hooks, and shares functions, but would copy this
    # object. They are bound to an `_Unpickled`, which copies of them may have.

    def _forward_hook(self, name: str, owner: nn.Module) -> Callable[..., Any]:
        own = ref(self)

        def pair(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hooks = own()
            if hooks is None or torch._C._is_tracing():
                return  # what is asked of tensors here would be in the graph
            if hooks._is_open(name):
                hooks._pair(name, args[0] if args else next(iter(kwargs.values()), None), output)
            elif isinstance(output, Tensor) and output.requires_grad and hooks._is_of_loss(name):
                note, within = hooks._note_gradient, outermost_pass()
                before_backward_of(output, lambda g: note(name, g, outermost_pass(within)))

        number, graphs = number_of(self._receiver(name)), self.graphs
        is_due, pair_unseen = self._is_due, torch.compiler.disable(pair)

        def on_forward(_: _Unpickled, module: nn.Module, args: Any, *others: Any) -> Tensor | None:
            if len(others) != 2:
                return None  # without kwargs: the hooks were removed while the module is calling them
            kwargs, output = others
            if not torch.compiler.is_dynamo_compiling():
                if is_due(name) and module is owner:
                    if torch.is_grad_enabled():
                        pair_unseen(args, kwargs, output)
                    else:
                        outermost_pass()  # one in which a checkpoint is run again may run others within it
            elif graphs.hand_over and torch.is_grad_enabled() and module is owner:
                a: Any = args[0] if args else next(iter(kwargs.values()), None)
                if can_pass_on(a, output):
                    return pass_on(output, a, number) if output.requires_grad else None
                pair_unseen(args, kwargs, output)
            return None

        return not_alone(on_forward)

    def _note_product(self, names: Mapping[str, str]) -> Note:
        """What records the products of such a module, whose weights have these ``names`` by role."""
        numbers = {name: number_of(self._receiver(name)) for name in names.values()}
        own = ref(self)

        def note(role: str, a: Tensor, output: Tensor, arrange: Arrange | None) -> Tensor:
            name = names.get(role)
            if name is None:
                return output
            if not torch.compiler.is_dynamo_compiling():
                hooks = own()
                if hooks is not None and hooks._is_open(name):
                    hooks._pair(name, a, output, arrange)
            elif can_pass_on(a, output) and output.requires_grad:
                if arrange is None:
                    return pass_on(output, a, numbers[name])
                return pass_on(arrange(output), a, numbers[name]).transpose(0, 1).reshape(output.shape)
            return output

        return note

    def _caller_hooks(
        self, names: Mapping[str, str], owner: nn.Module
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks before and after a call: products are recorded in it, but those of a recurrent layer are found in its
        graph afterwards."""
        note = self._note_product(names)
        traced: RecordProducts | RecordFunctions | None = None  # these are part of compiled graphs
        children = {role: child for role, child in owner.named_children() if role in names}
        if isinstance(owner, nn.MultiheadAttention):
            traced = RecordProducts(note)
        elif children or isinstance(owner, nn.Embedding | nn.Linear | nn.modules.conv._ConvNd):
            traced = RecordFunctions(note, children or {"weight": owner})
        record = traced or (None if isinstance(owner, Recurrent) else RecordMatrices(note, owner))
        traced = traced if TRACES_MODES else None
        own, graphs, is_due = ref(self), self.graphs, self._is_due
        calls = Calls()
        self._calls.append(calls)
        under_way = calls.under_way

        def enter(frame: FrameType) -> None:
            if calls.is_within_another():
                calls.begin(frame, [])  # the outer call records this one too
                return
            hooks = own()
            if hooks is None or torch._C._is_tracing() or not torch.is_grad_enabled():
                return
            opened = [name for name in names.values() if hooks._is_open(name)]
            if record is None and saves_tensors_elsewhere():
                for name in opened:
                    hooks._note_unreadable(name)
            elif opened and (record is not None or not is_transformed()):
                calls.begin(frame, opened).enter_context(WithoutLibraries() if record is None else record)

        def leave(inputs: Any, output: Any) -> None:
            opened, hooks = calls.end(), own()
            if record is None and opened and hooks is not None:
                hooks._pair_steps(opened, inputs, output)

        enter_unseen, leave_unseen = torch.compiler.disable(enter), torch.compiler.disable(leave)

        def before(_: _Unpickled, module: nn.Module, args: Any) -> None:
            if torch.compiler.is_dynamo_compiling():
                if traced is not None and graphs.hand_over and torch.is_grad_enabled() and module is owner:
                    traced.__enter__()  # type: ignore[no-untyped-call]
                return
            for name in names.values():
                if (under_way or (is_due(name) and torch.is_grad_enabled())) and module is owner:
                    enter_unseen(sys._getframe(1))
                    return

        def after(_: _Unpickled, module: nn.Module, *others: Any) -> None:
            if torch.compiler.is_dynamo_compiling():
                if traced is not None and graphs.hand_over and torch.is_grad_enabled() and module is owner:
                    traced.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            elif under_way and module is owner:
                *inputs, output = others
                leave_unseen(inputs, output)

        return not_alone(before), not_alone(after)

    def _pair_steps(self, names: Iterable[str], inputs: Any, outputs: Any) -> None:
        """Hand over each product of a recurrent layer's forward pass with one of the named weights."""
        weights = {name: weight for name in names if (weight := self._weight_of(name)) is not None}
        with torch._C.DisableTorchFunctionSubclass():
            for name, steps in products_in(outputs, inputs, weights).items():
                self._pair_together(name, steps)

    def _pair_together(self, name: str, steps: Steps) -> None:
        """Hand over the products of all steps as one pair."""
        accumulator, inputs = steps.accumulator, dict(enumerate(steps.inputs))
        forward_in, forward_within = backward_pass(), outermost_pass()
        promises = [self._expect(name)]
        pairs: dict[tuple[int, ...], Pair] = {}
        """By the steps whose outputs were used: their gradients of several passes through a kept graph add up."""

        def on_gradients(used: tuple[int, ...], g: Tensor) -> None:
            if used not in pairs:
                pairs[used] = Pair(name, torch.cat([inputs[step] for step in used]), None, None)
                pairs[used].forward_in, pairs[used].forward_within = forward_in, forward_within
                pairs[used].promise = promises.pop() if promises else None
            self._on_gradient(pairs[used], accumulator)(g)
            if not graph_is_kept():
                for step in used:  # autograd frees them now, but no hooks
                    inputs.pop(step, None)

        StepGradients(steps, on_gradients)

    def _pair(self, name: str, a: Any, output: Any, arrange: Arrange | None = None) -> None:
        """Hand ``(name, a, g)`` over when the gradient of ``output`` arrives, which ``arrange`` brings to the rows of
        ``a``."""
        if not is_readable(a):
            self._note_unreadable(name)
            return
        weight = self._weight_of(name)
        with torch._C.DisableTorchFunctionSubclass():
            use = None if weight is None else find_product(output, weight)
            if use is None and not (isinstance(output, Tensor) and output.requires_grad):
                return
            given, a = a, as_plain_tensor(a)
            rows, device = a.shape[:-1], a.device.type
            accumulator = None if use is None else use.accumulator
            if self._checks is not None and forward_ad._current_level >= 0 and _has_tangent(output):
                # The loss may depend on the tangent (forward-mode derivatives), and the weight's gradient on both.
                self._checks.skip(name)
            projected = self._projected(name, a, accumulator)
            if torch.is_autocast_enabled(device) and a.dtype != torch.get_autocast_dtype(device):
                a = self._subsample_input(name, a)
            pair = Pair(name, a, projected, arrange)
            if use is not None and isinstance(output, Tensor) and self._checks is not None and self._checks.wants(name):
                pair.is_watched = self._checks.watch(name, use, output, given, pair)
            del a
            pair.promise = self._expect(name)
            # Not with the node of the use, which would hold on to the graph that holds this.
            on_gradient = self._on_gradient(pair, accumulator)
            if use is not None and arrange is None and not self._needs_returned(name):
                before_product(use, rows, on_gradient)
            else:
                before_backward_of(output, on_gradient)

    def _receiver(self, name: str) -> Receiver:
        """What compiled graphs hand the named module's pairs to; it lives until the hooks are removed."""

        def receive(a: Tensor, g: Tensor) -> None:
            if self._is_due(name) and backward_pass() >= 0:
                self._receive(name, a, g)

        self._receivers.append(torch.compiler.disable(receive))
        return self._receivers[-1]

    def _receive(self, name: str, a: Tensor, g: Tensor) -> None:
        if not self._is_open(name):
            if self._is_of_loss(name):
                self._note_gradient(name, g, outermost_pass())
            return
        weight = self._weight_of(name)
        accumulator = None if weight is None else accumulator_of(weight)
        waiting = (pair for pair in self._waiting if pair.is_of(name, a))
        pair = next(waiting, None) or Pair(name, a, self._projected(name, a, accumulator), None)
        self._on_gradient(pair, accumulator)(g)

    def _projected(self, name: str, a: Tensor, accumulator: Any) -> Tensor | None:
        """What a check needs of an input, if not all, and if there is to be one."""
        if self._checks is None or accumulator is None or not self._checks.wants(name):
            return None
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            return self._checks.project(name, a)

    def _on_gradient(self, pair: Pair, accumulator: Any) -> Callable[[Tensor], None]:
        def on_gradient(g: Tensor) -> None:
            if pair.a is None or not self._is_due(pair.name):
                pair.a = None
                return
            if not self._adds(pair, accumulator):
                return
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                self._add(pair, as_plain_tensor(g.detach()), accumulator)

        return on_gradient

    def _adds(self, pair: Pair, accumulator: Any) -> bool:
        """Whether the backward pass under way adds to the gradient of the weight of ``pair``."""
        if accumulator is None:
            # A create_graph pass is taken for one that is no training, such as a gradient penalty's.
            return not torch.is_grad_enabled()
        is_recomputed = -1 < pair.forward_in != backward_pass()
        if not accumulates(accumulator, is_recomputed=is_recomputed):
            if self._checks is not None and torch.is_grad_enabled():
                # The loss may depend on this gradient, and the weight's gradient then on more than the pair.
                self._checks.skip(pair.name)
            return False
        if is_recomputed and torch.is_grad_enabled() and not accumulates(accumulator):
            pair.a = None  # torch.autograd.grad, whose derivatives come next (Hessian-vector products)
            return False
        return True

    def _add(self, pair: Pair, g: Tensor, accumulator: Any) -> None:
        if pair.input_was_changed:
            self._warn_of_change(pair)
            return
        if self._waiting and accumulator is not None and self._has_no_gradient(pair.name):
            self._forget_dropped(pair)
        if self._checks is not None and accumulator is not None and self._checks.wants(pair.name):
            a = pair.a if pair.projected is None else pair.projected
            assert a is not None
            with torch.autocast(g.device.type, enabled=False):
                self._checks.add(pair.name, a, g, None if pair.is_watched else accumulator)
        pair.add(g if pair.arrange is None else pair.arrange(g))
        if graph_is_kept():
            self._waiting[pair] = None
        else:
            self._hand_over(pair)

    def _forget_dropped(self, new: Pair) -> None:
        """Forget the gradients of earlier backward passes that pairs of the weight of ``new`` wait with: the weight's
        own was set to None since."""
        weight, under_way = self._weight_of(new.name), outermost_pass(new.forward_within)
        for pair in [pair for pair in self._waiting if pair.backward_pass != under_way]:
            if self._weight_of(pair.name) is weight:
                self._waiting.pop(pair)
                pair.g, pair.backward_pass = None, -1

    def _hand_over(self, pair: Pair) -> None:
        self._waiting.pop(pair, None)
        if pair.input_was_changed:
            self._warn_of_change(pair)
            return
        a, g = pair.a, pair.g
        pair.a = pair.g = pair.promise = None
        assert a is not None
        assert g is not None
        self._handed_over = pair
        try:
            if not torch.is_autocast_enabled(g.device.type):
                self._listener(pair.name, a, g)
                return
            with torch.autocast(g.device.type, enabled=False):
                self._listener(pair.name, a, g)
        finally:
            self._handed_over = None

    def _warn_of_change(self, pair: Pair) -> None:
        pair.a = pair.g = pair.promise = None
        self._note_changed(pair.name)
        # Autograd notices the change itself, unless autocast let it save a copy in lower precision.
        warnings.warn(
            f"The input of layer {pair.name!r} was changed in place after the layer used it; its statistics are "
            "left out. Write x = x + layer(x) instead of x += layer(x).",
            stacklevel=2,
        )


def _has_tangent(output: Any) -> bool:
    return isinstance(output, Tensor) and forward_ad.unpack_dual(output).tangent is not None


def _remove_all(handles: list[RemovableHandle], calls: list[Calls]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
    for each in calls:
        each.end_all()
