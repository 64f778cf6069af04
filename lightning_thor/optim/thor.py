"""Thor: momentum and preconditioning, in the order of its mode, with control of the update's scale."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from lightning_thor.distributed.dtensor import local_gradients, local_parts
from lightning_thor.linalg.dtypes import wide
from lightning_thor.linalg.memory import select, sent
from lightning_thor.optim.adam import FIRST, SECOND, make_moments, steps_in_other_coordinates
from lightning_thor.optim.fading import MEAN_SQUARE, fade_factors, gradient_rms, running_ratios
from lightning_thor.optim.norms import Numbers
from lightning_thor.optim.options import FOREIGN_OPTIONS, FORMER, OPTIONS, check_group, plain_numbers, unknown_options
from lightning_thor.optim.state_dict import MOMENTUM, check_momenta, check_state, numbered_as_in
from lightning_thor.optim.update_scaling import clip_kl_, scale_to_norms_
from lightning_thor.preconditioning.grouping import Directions, Tensors
from lightning_thor.preconditioning.modes import MODES, NATURAL, Mode, ModeName, common_mode

GRADIENT_RMS = "gradient_rms"
"""Key of each group, with one value for all: root mean square of the largest gradients of this training, see
`lightning_thor.optim.fading`. Saved with the options, but no option."""

NUMBERING = tuple(f"torch.distributed.{name}." for name in ("checkpoint", "fsdp", "optim"))
"""Modules of torch that rely on its own numbers of parameters in a state."""

STATE_OPTIONS = ("momentum", "match_rms", "rms_averaging")
"""Options of a group by which `Thor.make_state` decides what state its parameters have."""

MAKING_STATE = ("torch.distributed.checkpoint.state_dict",)
"""Its module that makes the state of an optimizer without one by a step with gradients of zeros and rates of 0."""

SPREAD = 3.0
"""How many times as large the running root mean square of a tensor's gradients may be as its gradient's own, before a
step becomes smaller: steps of one size train better where batches differ by chance alone."""


class Targets(NamedTuple):
    """The scales of ``n`` directions; of a parameter that is not among them its scale stays."""

    places: Mapping[nn.Parameter, int]
    """By parameter, its place among the norms, 0..n-1."""
    norms: Numbers = ()
    """L2 norm of the scaled direction."""


class Preconditioner(Protocol):
    """What `Thor` asks of its preconditioner; of sharded parameters (DTensors) all tensors are this rank's shards.

    These two methods suffice for ``mode="natural"``. For other modes, and for directions in parts, it has
    ``directions(tensors, mode)`` too; for a mode with a change of basis ``change_basis(tensors, mode, back=False)`` and
    ``due_parameters()``, all as of `Curvature`. ``fan_in``, if it has that, says of how many inputs each output of a
    weight is made where the weight's shape does not; ``weight_of``, which parameters have their direction together with
    a weight's: where the weight alone has a gradient, theirs are zeros, and they do not move.
    """

    def update(self) -> None:
        """Update curvature: called once per applied step, between backward and the directions."""

    def precondition(self, grads: Tensors) -> Directions:
        """Compute one direction of descent for each gradient.

        Args:
            grads: by parameter, to be left unchanged.

        Returns:
            New tensors by parameter, which the optimizer changes. For gradients in float16 or bfloat16 they are best in
            float32: a direction may leave the range of the weights' dtype until it is scaled.
        """


def _method_for(preconditioner: Preconditioner, mode: Mode) -> Callable[..., Any]:
    """Find the preconditioner's ``change_basis`` for a mode that has one, else its ``directions``, for this mode."""
    name = "directions" if mode.change_basis is None else "change_basis"
    method = getattr(preconditioner, name, None)
    if method is not None:
        return partial(method, mode=mode.name)
    if mode is NATURAL:
        return lambda tensors: [preconditioner.precondition(tensors)]
    raise RuntimeError(
        f'Thor(mode="{mode.name}") got a {type(preconditioner).__name__} without {name}. Pass '
        f'preconditioner=Curvature(model, mode="{mode.name}").'
    )


class Thor(Optimizer):
    """Momentum on G⁻¹ grad A⁻¹ (THOR: Chen et al., AAAI 2021); parameters without curvature take plain momentum.

    A step, per tensor: precondition, scale, add weight decay (unless decoupled), then momentum as in `torch.optim.SGD`.
    With an identity preconditioner and no scaling it is bitwise SGD (the fused one where weights are float32 and
    contiguous). In polar mode momentum comes first; with an identity preconditioner a matrix then takes the steps of
    `torch.optim.Muon`. Adam mode takes the steps of `torch.optim.AdamW` in other coordinates; ``nesterov`` then takes
    the first moment ahead, as NAdam does (Dozat 2016, "Incorporating Nesterov momentum into Adam"). Parameters may be
    sharded by ``fully_shard`` (FSDP2): momentum is sharded alike, and scales are computed of whole tensors.

    Args:
        params: parameters or parameter groups. Groups and schedulers can set all options below but ``preconditioner``.
        lr: learning rate, a number. With ``match_rms`` AdamW's usual ones carry over; polar mode, which applies it
            after momentum, takes three to ten times as much.
        mode: ``"natural"``, ``"polar"``, ``"adam"``, or the name of a registered mode. ``"polar"`` computes
            G^-½ msign(G^-½ M A^-½) A^-½ of the momentum M of linear layers and convolutions, with msign(U S Vᵀ) = U Vᵀ:
            Muon's step in whitened coordinates, of up to 64 rows at a time. Embeddings, norms and the output layer (the
            last linear layer or convolution, with the diagonal of G alone) take the natural direction of their
            momentum, other parameters plain momentum. ``"adam"``, for all groups, is Adam in the coordinates in which
            the blocks of A and G are diagonal (as SOAP has it with Shampoo's factors: Vyas et al. 2024,
            arXiv:2409.11321), for the output layer the blocks of A, and plain Adam for parameters without curvature.
            Its learning rates are AdamW's; ``match_rms`` does not apply.
        momentum: in [0, 1); Adam's β₁.
        beta2: in [0, 1); Adam's β₂, for ``mode="adam"`` alone.
        nesterov: Nesterov's momentum, as in `torch.optim.SGD` (in adam mode as above); no effect if ``momentum`` is 0.
        weight_decay: multiplied with the weights, and subtracted from them.
        decoupled_weight_decay: multiply weights by ``1 - lr * weight_decay``, as AdamW does; otherwise add
            ``weight_decay * weight`` to the preconditioned gradient, as THOR does.
        match_rms: scale each tensor's direction to this root mean square (0.2 is about AdamW's: Liu et al. 2025,
            arXiv:2502.16982), or less where its gradient is below 8 roundings of the largest gradients of this
            training (`lightning_thor.optim.fading`); None leaves the scale to the curvature.
        rms_averaging: in [0, 1); with ``match_rms``, the direction of a gradient whose root mean square is less than a
            third of the running one of its tensor's gradients, in which the past has this weight, becomes smaller in
            proportion. So batches with little to say, such as those without a rare class, take smaller steps than
            those that have it; with 0 the directions of all have one size. One number of state per tensor. No effect
            in polar mode, whose directions are of a momentum, and in adam mode.
        max_relative_step: with ``match_rms``, limit ``lr`` times the direction's root mean square, of weights with two
            or more dimensions, to this share of 1/√(3 fan_in), the root mean square of `nn.Linear`'s initial weights
            (momentum adds up to ``1 / (1 - momentum)`` such steps; polar mode, whose directions are of the momentum,
            takes a limit as many times as large). Wider layers begin with smaller weights, which a rate that suits
            narrow layers would ruin. None does not.
        kl_clip: shrink all updates by one factor, ``min(1, sqrt(kl_clip / sum lr² directionᵀ grad))`` over all groups
            that set it, so that the squared length of ``lr`` times them, in the metric of the curvature, is at most
            this (Ba, Grosse & Martens 2017, "Distributed second-order optimization using Kronecker-factored
            approximations", section 5); None does not. For natural mode, without ``match_rms``.
        clip_norm: shrink each tensor's update to at most this L2 norm, after weight decay and before natural mode's
            momentum (MindSpore's ``enable_clip_grad`` is 1); None does not.
        preconditioner: a `Curvature`; under a Trainer `ThorCallback` sets it when fit starts.
        **others: none; the error of another optimizer's option says what to write.

    Raises:
        TypeError: an unknown option.
        ValueError: an option is out of its range or does not go with another one, or no curvature serves the modes of
            all groups.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 6e-3,
        *,
        mode: ModeName = "natural",
        momentum: float = 0.9,
        beta2: float = 0.99,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        match_rms: float | None = 0.2,
        rms_averaging: float = 0.9,
        max_relative_step: float | None = 0.01,
        kl_clip: float | None = None,
        clip_norm: float | None = None,
        preconditioner: Preconditioner | None = None,
        **others: Any,
    ) -> None:
        arguments = locals()
        if others:
            raise TypeError(f"Thor does not know {unknown_options(others, OPTIONS)}. {FOREIGN_OPTIONS}")
        if isinstance(params, nn.Module):
            raise TypeError(
                f"Thor takes parameters, got a {type(params).__name__}: write configure_thor(model, lr=...), which "
                "leaves biases and norms without weight decay, or Thor(model.parameters(), lr=...)."
            )
        if preconditioner is not None and not callable(getattr(preconditioner, "update", None)):
            raise TypeError(
                f"preconditioner must be a Curvature(model), got a {type(preconditioner).__name__}. Under a Trainer "
                "leave it out: ThorCallback sets it."
            )
        self.preconditioner = preconditioner
        self.numbered: tuple[nn.Parameter, ...] | None = None
        """All parameters of the model, in its order, if known; see `state_dict`."""
        super().__init__(params, {option: arguments[option] for option in OPTIONS})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as `torch.optim.Optimizer.add_param_group`; raises as `Thor`."""
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # torch's own error
        unknown = param_group.keys() - {*OPTIONS, GRADIENT_RMS, "params", "name", "param_names", "initial_lr"}
        group = {**self.defaults, **param_group}
        check_group(group, unknown)
        common_mode([group["mode"], *(other["mode"] for other in self.param_groups)])
        super().add_param_group(param_group)
        self.param_groups[-1].update(plain_numbers(self.param_groups[-1]))
        self.param_groups[-1][GRADIENT_RMS] = self.param_groups[0].get(GRADIENT_RMS, 0.0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # After unpickling or copying, for which torch drops extra attributes and adds no options of later versions.
        super().__setstate__(state)
        self.__dict__.setdefault("preconditioner", None)
        self.__dict__.setdefault("numbered", None)
        for group in self.param_groups:
            for option in OPTIONS:
                group.setdefault(option, FORMER.get(option, self.defaults.get(option)))
            group.setdefault(GRADIENT_RMS, 0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Thor:
        """Copy the optimizer, and a preconditioner that is a `Curvature` with its model.

        Copy model and optimizer at once, ``copy.deepcopy((model, optimizer))``, so that the copies belong together.
        Any other preconditioner is left out, as in a pickle.
        """
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = getattr(self.preconditioner, "model", None)
        # Not if the model holds this optimizer: then the copy of the model is not complete yet.
        if isinstance(model, nn.Module) and "_modules" in vars(memo.get(id(model), model)):
            twin.preconditioner = copy.deepcopy(self.preconditioner, memo)
        if all(id(p) in memo for p in self.numbered or ()):
            twin.numbered = self.numbered and tuple(memo[id(p)] for p in self.numbered)
        return twin

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: forward and backward passes; run once, before anything else. If it leaves no gradients (a
                ``training_step`` that returned None), nothing happens.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError: there is no preconditioner, it cannot serve the mode, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return loss
        if not self.state and not self.param_groups[0]["lr"] and _is_asked_by(MAKING_STATE):
            self.make_state()
            return loss
        if self.preconditioner is None:
            raise RuntimeError(
                "Thor has no curvature to precondition with. Add ThorCallback() to Trainer(callbacks=[...]), or, "
                "outside Lightning, pass preconditioner=Curvature(model)."
            )
        grads = dict(zip(params, local_gradients(params), strict=True))
        if [grad for grad in grads.values() if grad.is_sparse]:
            raise RuntimeError("Thor got a sparse gradient; build embeddings with sparse=False.")
        # A part of a layer may be frozen, or not part of this loss: the weight goes on with its curvature.
        weight_of: Mapping[nn.Parameter, nn.Parameter] = getattr(self.preconditioner, "weight_of", {})
        if weight_of and not self.state:
            self._warn_of_parts([p for p, weight in weight_of.items() if weight in grads])
        still = [p for p, weight in weight_of.items() if p.grad is None and weight in grads] if weight_of else []
        zeros = self._zeros(still) if still else {}
        parts, targets = self._update_parts(self.preconditioner, grads, zeros)
        for updates in parts:
            for p in zeros:
                updates.pop(p, None)
            self._apply(grads, updates, targets)
            # Frees the memory for the next part.
            updates.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of torch; the preconditioner forgets what it observed of these gradients, such as those of another
        optimizer's loss."""
        super().zero_grad(set_to_none)
        # Custom preconditioners need not have it.
        forget = getattr(self.preconditioner, "forget", None)
        if forget is not None:
            forget()

    @torch.no_grad()
    def make_state(self) -> None:
        """Set momentum and running means, or the moments in adam mode, to zeros where there were none.

        `torch.distributed.checkpoint` takes a step to save or restore an optimizer without state; that step calls this.
        """
        for group in self.param_groups:
            mode = MODES[group["mode"]]
            if mode.change_basis is not None:
                for p in group["params"]:
                    make_moments(self.state[p], p, wide(p.dtype))
                continue
            if group["momentum"]:
                self._momentum_buffers(group["params"])
            if group["match_rms"] is not None and group["rms_averaging"] and not mode.momentum_first:
                for p in group["params"]:
                    self.state[p].setdefault(MEAN_SQUARE, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as `torch.optim.Optimizer.state_dict` does, but number parameters as the model does.

        Torch numbers parameters group by group, without frozen ones, and `load_state_dict` goes by their places in the
        groups, not by numbers. But Lightning takes the numbers for the model's when it restores a checkpoint into a
        sharded model. Functions of torch.distributed rely on torch's numbers and get them.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            if isinstance(group.get(GRADIENT_RMS), Tensor):  # on a GPU
                group[GRADIENT_RMS] = float(group[GRADIENT_RMS])
        state["state"] = {
            key: {**own, MEAN_SQUARE: float(own[MEAN_SQUARE])} if isinstance(own, dict) and MEAN_SQUARE in own else own
            for key, own in state["state"].items()
        }
        model, numbered = getattr(self.preconditioner, "model", None), self.numbered
        if numbered is None and isinstance(model, nn.Module):
            numbered = tuple(model.parameters())
        if numbered is None or _is_asked_by(NUMBERING):
            return state
        return numbered_as_in(numbered, self.param_groups, state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as `torch.optim.Optimizer.load_state_dict` does, but Adam's moments in at least float32: torch
        casts them to the dtype of the weights, and in float16 squares of small gradients would become 0.

        Raises:
            ValueError: the state is of another optimizer, a group's of another mode, or a momentum has not the shape of
                its parameter; nothing was changed.
        """
        check_state(state_dict, self.param_groups)

        def look(_: Optimizer, state: dict[str, Any]) -> None:
            nonlocal state_dict
            check_momenta(state, self.param_groups)
            state_dict = state

        last = self.register_load_state_dict_pre_hook(look)  # other hooks may have replaced the state
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            saved = state_dict["state"].get(number, {})
            if SECOND in saved:
                moments = {key: saved[key].to(p.device, wide(p.dtype), copy=True) for key in (FIRST, SECOND)}
                self.state[p].update(moments)

    def _update_parts(
        self, preconditioner: Preconditioner, grads: Tensors, zeros: Tensors
    ) -> tuple[Iterable[Directions], Targets]:
        """Update the preconditioner; returns parts of directions, each to be used before the next, and their scale.
        ``zeros`` are gradients of parameters that do not move, but have directions together with others."""
        groups = self.param_groups
        mode = MODES[groups[0]["mode"]]
        if mode.change_basis is not None:  # so have all groups
            change_basis = _method_for(preconditioner, mode)
            grads = {**grads, **zeros}
            return [steps_in_other_coordinates(groups, self.state, preconditioner, change_basis, grads)], Targets({})
        preconditioner.update()
        momenta: dict[nn.Parameter, Tensor] = {}
        for group in groups:
            if MODES[group["mode"]].momentum_first:
                momenta.update(self._momenta(group, grads))
        sources = {**grads, **momenta} if momenta else grads
        targets = self._targets(sources)
        sources = {**sources, **zeros} if zeros else sources
        by_mode: dict[str, Tensors] = {mode.name: sources}
        if len(names := dict.fromkeys([group["mode"] for group in groups])) > 1:
            members = [(group["mode"], p) for group in groups for p in group["params"] if p in sources]
            by_mode = {name: {p: sources[p] for own, p in members if own == name} for name in names}
        parts = [_method_for(preconditioner, MODES[name])(tensors) for name, tensors in by_mode.items() if tensors]
        if len(parts) == 1 and not [group for group in groups if group["kl_clip"] is not None]:
            return parts[0], targets
        return [{p: one for each in parts for part in each for p, one in part.items()}], targets

    def _momenta(self, group: Mapping[str, Any], grads: Tensors) -> Tensors:
        """Add gradients to the momentum of a group; return the momenta by parameter, not to be changed."""
        params = [p for p in group["params"] if p in grads]
        momenta, momentum = [grads[p] for p in params], group["momentum"]
        if momentum and params:
            buffers = self._momentum_buffers(params)
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, momenta)
            momenta = list(torch._foreach_add(momenta, buffers, alpha=momentum)) if group["nesterov"] else buffers
        return dict(zip(params, momenta, strict=True))

    def _targets(self, sources: Tensors) -> Targets:
        """Count this step; returns the scale of the directions of these gradients and momenta, where it is matched."""
        fan_in = getattr(self.preconditioner, "fan_in", {})
        sizes, limits, averaging = list[float](), list[float](), list[float]()
        shares: dict[nn.Parameter, float] = {}
        for group in self.param_groups:
            mode, match_rms, lr = MODES[group["mode"]], group["match_rms"], group["lr"]
            if match_rms is None or not mode.matches_rms:
                continue
            # A momentum adds up 1 / (1 - momentum) gradients, so its norm is a running one already.
            share = 1.0 - group["momentum"] if mode.momentum_first else 1.0
            past = 0.0 if mode.momentum_first else group["rms_averaging"]
            # A schedule may end at rates whose product with a share is 0.
            is_limited = group["max_relative_step"] is not None and share * lr > 0
            limit = group["max_relative_step"] / (share * lr) if is_limited else math.inf
            for p in group["params"]:
                if p in sources:
                    inputs = (fan_in.get(p) or p.shape[1:].numel() or 1) if p.dim() > 1 else 0
                    root, rms = math.sqrt(p.numel()), limit / math.sqrt(3 * inputs) if inputs else math.inf
                    sizes.append(SPREAD * match_rms * root)
                    limits.append(min(match_rms, rms) * root)
                    averaging.append(past)
                    shares[p] = share
        places = dict(zip(shares, range(len(shares)), strict=True))
        if not places:
            return Targets(places)
        params = list(shares)
        r = gradient_rms([sources[p] for p in params], params, list(shares.values()))
        factors, largest = fade_factors(r, params, self.param_groups[0][GRADIENT_RMS])
        for group in self.param_groups:
            group[GRADIENT_RMS] = largest
        ratios = running_ratios(r, [self.state[p] for p in params], averaging) if any(averaging) else None
        if isinstance(factors, Tensor):
            norms, most = sent([limits, sizes], factors).unbind()
            if isinstance(ratios, Tensor):
                norms = torch.fmin(norms, most * ratios)  # where a ratio is NaN, the limit
            return Targets(places, norms.mul_(factors))
        if ratios is not None:
            # In this order: beside NaN the limit is the least.
            limits = [min(limit, size * ratio) for limit, size, ratio in zip(limits, sizes, ratios, strict=True)]
        return Targets(places, [limit * factor for limit, factor in zip(limits, factors, strict=True)])

    def _apply(self, grads: Tensors, updates: Directions, targets: Targets) -> None:
        """Scale updates, decay weights, and move the parameters of ``updates``, whose tensors are lost."""
        steps: list[tuple[dict[str, Any], list[nn.Parameter], list[Tensor], list[Tensor]]] = []
        for group in self.param_groups:
            if params := [p for p in group["params"] if p in updates]:
                steps.append((group, params, local_parts(params), [updates[p] for p in params]))
        matched = [p for _, params, *_ in steps for p in params if p in targets.places]
        if matched:
            places, directions = [targets.places[p] for p in matched], [updates[p] for p in matched]
            scale_to_norms_(directions, matched, select(targets.norms, places))
        clipped = [(p, group) for group, params, *_ in steps if group["kl_clip"] is not None for p in params]
        if clipped:
            clip_kl_(clipped, grads, updates)
        for group, _, weights, own in steps:
            weight_decay = group["weight_decay"]
            if weight_decay and group["decoupled_weight_decay"]:
                torch._foreach_mul_(weights, 1.0 - group["lr"] * weight_decay)
            elif weight_decay:
                torch._foreach_add_(own, weights, alpha=weight_decay)
        limits = {
            p: group["clip_norm"] for group, params, *_ in steps if group["clip_norm"] is not None for p in params
        }
        if limits:
            scale_to_norms_([updates[p] for p in limits], list(limits), list(limits.values()), at_most=True)
        for group, params, weights, own in steps:
            mode = MODES[group["mode"]]
            if mode.momentum_first or mode.change_basis is not None:
                torch._foreach_add_(weights, own, alpha=-group["lr"])
                continue
            # Cast last: see `Preconditioner.precondition`.
            own = [u if u.dtype == w.dtype else u.to(w.dtype) for u, w in zip(own, weights, strict=True)]
            sgd_step(weights, own, self._momentum_buffers(params) if group["momentum"] else [], group)

    def _warn_of_parts(self, params: list[nn.Parameter]) -> None:
        """Warn if some of these parameters, whose weights this optimizer has, are not in it."""
        own = {p for group in self.param_groups for p in group["params"]}
        n_others = len(params) - len(own.intersection(params))
        if n_others:
            warnings.warn(
                f"{n_others} biases or shifts that the curvature takes together with their weights are not in Thor, "
                "which has the weights: these take their plain gradient. Give the curvature Thor's parameters alone, "
                "Curvature(model, parameters=[...]), or Thor those too.",
                stacklevel=3,
            )

    def _zeros(self, params: list[nn.Parameter]) -> Tensors:
        """Zeros like this rank's part of those of ``params`` that this optimizer has, by parameter."""
        own = {p for group in self.param_groups for p in group["params"]}
        params = [p for p in params if p in own]
        return dict(zip(params, map(torch.zeros_like, local_parts(params)), strict=True))

    def _momentum_buffers(self, params: list[nn.Parameter]) -> list[Tensor]:
        """Return this rank's shard of each momentum, of zeros where there was none."""
        buffers = []
        for p in params:
            state = self.state[p]
            if MOMENTUM not in state:
                state[MOMENTUM] = torch.zeros_like(p, memory_format=torch.preserve_format)
            momentum = state[MOMENTUM]
            # The fused kernel goes by the parameter alone, and would write beyond a smaller momentum.
            if momentum.shape != p.shape:
                raise RuntimeError(
                    f"A parameter is {list(p.shape)} now, and was {list(momentum.shape)} when its momentum began: set "
                    "its momentum too, optimizer.state[parameter]['momentum_buffer'], or begin it anew, "
                    "optimizer.state.pop(parameter)."
                )
            buffers.append(momentum)
        return local_parts(buffers)


def _is_asked_by(modules: tuple[str, ...]) -> bool:
    """Whether a function of one of these modules is under way, through whatever wrappers."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(modules):
            return True
        frame = frame.f_back
    return False


def sgd_step(weights: list[Tensor], updates: list[Tensor], momenta: list[Tensor], group: Mapping[str, Any]) -> None:
    """Take a step of SGD with the ``lr``, ``momentum`` and ``nesterov`` of a group; ``updates`` are lost.

    By torch's fused kernel, in one pass over memory instead of four, where it can be trusted: it takes all tensors as
    contiguous, and torch 2.13's for CPUs is wrong in half precision.
    """
    unfit = [
        x
        for x in (*weights, *updates, *momenta)
        if x.dtype != torch.float32 or not (x.is_cpu or x.is_cuda) or not x.is_contiguous()
    ]
    options: dict[str, Any] = {"lr": group["lr"], "momentum": group["momentum"], "nesterov": group["nesterov"]}
    options |= {"weight_decay": 0.0, "dampening": 0.0, "maximize": False, "fused": not unfit, "foreach": bool(unfit)}
    sgd(weights, updates, list[Tensor | None](momenta), **options)
