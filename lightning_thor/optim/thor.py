"""Thor: momentum and preconditioning, in the order of its mode, with control of the update's scale."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from lightning_thor.distributed.dtensor import local
from lightning_thor.linalg.dtypes import wide
from lightning_thor.optim.adam import FIRST, SECOND, adam_directions, carry_to_other_coordinates
from lightning_thor.optim.fading import fade_factors
from lightning_thor.optim.update_scaling import Numbers, Updates, clip_kl_, clip_norm_, scale_to_rms_, times
from lightning_thor.preconditioning.modes import MODES, Mode

OPTIONS = (
    "mode",
    "lr",
    "momentum",
    "beta2",
    "nesterov",
    "weight_decay",
    "decoupled_weight_decay",
    "match_rms",
    "kl_clip",
    "clip_norm",
)


GRADIENT_RMS = "gradient_rms"
"""In each group, the same in all: root mean square of the largest gradients of this training, see
`lightning_thor.optim.fading`. It is no option, but saved with those."""


Fades = Mapping[nn.Parameter, float | Tensor]
"""By matched parameter, what the root mean square of its direction is multiplied by."""


Steps = Sequence[tuple[dict[str, Any], list[nn.Parameter]]]
"""Each group of parameters with those of its parameters that have a gradient."""


class Preconditioner(Protocol):
    """What `Thor` asks of a curvature."""

    def update(self) -> None:
        """Once per applied step, after backward."""

    def precondition(self, grads: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Directions of descent, one for each gradient: new tensors, the optimizer's to change; ``grads`` stay.

        Directions of gradients in float16 or bfloat16 are best given in float32: they are rounded to the dtype of the
        weights when they have been brought to scale, before that they may be beyond it.

        Of a sharded parameter (a DTensor) both are what lies in this process.
        """


class PreconditionerInParts(Preconditioner, Protocol):
    """What `Thor` takes in the place of ``precondition``, where it is there, all groups are natural and none has a
    ``kl_clip``: it needs less memory and, on a CPU, less time."""

    def precondition_in_parts(self, grads: Mapping[nn.Parameter, Tensor]) -> Iterator[dict[nn.Parameter, Tensor]]:
        """What ``precondition`` gives, some tensors at a time; each part is used before the next one is asked for."""


@runtime_checkable
class PolarPreconditioner(Preconditioner, Protocol):
    """What `Thor` asks of a curvature besides, where a group has ``mode="polar"``."""

    def precondition_polar(self, momenta: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Polar directions of descent, one for each momentum: new tensors, as of ``precondition``."""


@runtime_checkable
class EigenbasisPreconditioner(Preconditioner, Protocol):
    """What `Thor` asks of a curvature besides, where its groups have ``mode="adam"``."""

    def about_to_change(self) -> set[nn.Parameter]:
        """The parameters whose basis the next ``update`` may change."""

    def to_eigenbasis(self, grads: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """New tensors in the shapes of the parameters; ``grads`` stay."""

    def from_eigenbasis(self, rotated: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The way back."""


class Thor(Optimizer):
    """Momentum on G⁻¹ grad A⁻¹ (THOR: Chen et al., AAAI 2021); parameters without curvature take plain momentum.

    A step, per tensor: precondition, control the scale, add weight decay (unless decoupled), then momentum as in
    `torch.optim.SGD`, to which it is bitwise equal with an identity preconditioner and no scale control (to the fused
    one where weights are of float32 and contiguous). In the polar mode momentum comes first; with an identity
    preconditioner a matrix then takes the steps of `torch.optim.Muon`. In the adam mode the step is that of
    `torch.optim.AdamW`, in other coordinates; with ``nesterov`` its first moment is taken ahead, as in NAdam (Dozat
    2016, "Incorporating Nesterov momentum into Adam"). Parameters may be sharded by ``fully_shard`` (FSDP2): momentum
    is sharded as they are, and the scale is that of the whole tensor.

    Args:
        params: parameters or parameter groups. All below but ``preconditioner`` can be set per group and by schedulers.
        mode: ``"natural"``, or ``"polar"`` for G^-½ msign(G^-½ M A^-½) A^-½ of the momentum M in linear layers and
            convolutions, msign(U S Vᵀ) being U Vᵀ: Muon's step in the coordinates that the curvature whitens.
            Embeddings, norms and the output layer (the last linear layer or convolution of the model) take the natural
            direction of the momentum (of the output layer with the diagonal of G alone), other parameters plain
            momentum. Or ``"adam"``, of all groups: Adam in the coordinates in which the blocks of A and G are diagonal
            (as SOAP has it in Shampoo's: Vyas et al. 2024, arXiv:2409.11321), for parameters without curvature plain
            Adam; its learning rates are AdamW's, and ``match_rms`` is not for it. Of the output layer it is A's alone.
        lr: learning rate, a number. With ``match_rms`` AdamW's usual ones carry over; in the polar mode, where it is
            applied after momentum, take three to ten times as much.
        momentum: in [0, 1); Adam's β₁.
        beta2: in [0, 1); Adam's β₂, for ``mode="adam"`` alone.
        nesterov: Nesterov's momentum, as in `torch.optim.SGD` (in the adam mode as above); changes nothing where
            ``momentum`` is 0.
        weight_decay: factor of the weights that is taken off them.
        decoupled_weight_decay: multiply weights by ``1 - lr * weight_decay`` (as AdamW does) instead of adding
            ``weight_decay * weight`` to the preconditioned gradient (as THOR does).
        match_rms: rescale each tensor's direction to this root mean square (0.2 is about AdamW's: Liu et al. 2025,
            arXiv:2502.16982), or less where its gradient is below 64 roundings of the largest gradients of this
            training (`lightning_thor.optim.fading`); None leaves its scale to the curvature.
        kl_clip: shrink all updates by one factor so that ``sum lr² directionᵀ grad`` is at most this (Ba, Grosse &
            Martens 2017, "Distributed second-order optimization using Kronecker-factored approximations", section
            5; the sum is over the parameters of all groups that set it); None does not. Natural mode only.
        clip_norm: shrink each tensor's update, after weight decay and before momentum (natural mode), to at most this
            L2 norm (MindSpore's ``enable_clip_grad`` is 1); None does not.
        preconditioner: a `Curvature`; under a Trainer `ThorCallback` puts it in place when fit starts.

    Raises:
        ValueError: an argument out of its range, both ``match_rms`` and ``kl_clip`` given, a ``kl_clip`` that is not
            natural, or ``mode="adam"`` in some groups only.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        *,
        mode: Mode = "natural",
        momentum: float = 0.9,
        beta2: float = 0.99,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        match_rms: float | None = 0.2,
        kl_clip: float | None = None,
        clip_norm: float | None = None,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        self.preconditioner = preconditioner
        self.numbered: tuple[nn.Parameter, ...] | None = None
        """All parameters of the model, in its order, if they are known; see `state_dict`."""
        defaults = {
            "mode": mode,
            "lr": lr,
            "momentum": momentum,
            "beta2": beta2,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "match_rms": match_rms,
            "kl_clip": kl_clip,
            "clip_norm": clip_norm,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; a ValueError if an option of the group is out of its range."""
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # torch's own error
        unknown = param_group.keys() - {*OPTIONS, GRADIENT_RMS, "params", "name", "param_names", "initial_lr"}
        group = {**self.defaults, **param_group}
        _check_group(group, unknown)
        modes = {group["mode"], *(other["mode"] for other in self.param_groups)}
        if "adam" in modes and len(modes) > 1:
            raise ValueError(f"mode='adam' must be that of all parameter groups, got {', '.join(sorted(modes))}.")
        super().add_param_group(param_group)
        self.param_groups[-1][GRADIENT_RMS] = self.param_groups[0].get(GRADIENT_RMS, 0.0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled or copied: torch keeps neither extra attributes nor options that an older version did not have.
        super().__setstate__(state)
        if "preconditioner" not in self.__dict__:
            self.preconditioner = None
        if "numbered" not in self.__dict__:
            self.numbered = None
        for group in self.param_groups:
            for option in OPTIONS:
                group.setdefault(option, self.defaults[option])
            group.setdefault(GRADIENT_RMS, 0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Thor:
        """A copy, and if this one preconditions with a `Curvature`, with a copy of that and of its model.

        Parameters are those of the model's copy where it is copied at once: ``copy.deepcopy((model, optimizer))``. Any
        other preconditioner is left out, as it is when an optimizer is pickled.
        """
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        model = getattr(self.preconditioner, "model", None)
        # Not where the model holds this optimizer, and is only being copied itself.
        if isinstance(model, nn.Module) and "_modules" in vars(memo.get(id(model), model)):
            twin.preconditioner = copy.deepcopy(self.preconditioner, memo)
        if all(id(p) in memo for p in self.numbered or ()):
            twin.numbered = self.numbered and tuple(memo[id(p)] for p in self.numbered)
        return twin

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update.

        Args:
            closure: forward and backward passes; run once, before anything else. If it leaves no gradients, nothing
                happens (a ``training_step`` that returned None).

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: there is no preconditioner, it cannot serve the mode, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = {p: local(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None}
        if not grads:
            return loss
        if self.preconditioner is None:
            raise RuntimeError(
                "Thor has no curvature to precondition with. Add ThorCallback() to Trainer(callbacks=[...]), or, "
                "outside Lightning, pass preconditioner=Curvature(model)."
            )
        if any(grad.is_sparse for grad in grads.values()):
            raise RuntimeError("Thor got a sparse gradient; use nn.Embedding(..., sparse=False).")
        parts, faded = self._update_parts(self.preconditioner, grads)
        for updates in parts:
            self._apply(grads, updates, faded)
            # Their memory is where the next ones are made.
            updates.clear()
        return loss

    @torch.no_grad()
    def make_state(self) -> None:
        """Momentum of zeros for the parameters that have none, as after a step with gradients of zero.

        What saves or restores an optimizer's state before its first step (torch.distributed.checkpoint) would
        otherwise take such a step, and the curvature would count it.
        """
        for group in self.param_groups:
            if group["mode"] != "adam" and group["momentum"]:
                self._momenta(group["params"])

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, but that a parameter has the number that it has among all parameters
        of its model, frozen ones included, where those are known.

        Torch numbers them group by group, and `load_state_dict` goes by their places in the groups: to it numbers mean
        nothing. But Lightning takes them for those of the module where a checkpoint goes on in a sharded model. What
        asks from within torch.distributed (checkpoints of sharded models) relies on torch's own numbers, and gets them.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            if isinstance(group.get(GRADIENT_RMS), Tensor):  # on a GPU
                group[GRADIENT_RMS] = float(group[GRADIENT_RMS])
        model, numbered = getattr(self.preconditioner, "model", None), self.numbered
        if numbered is None and isinstance(model, nn.Module):
            numbered = tuple(model.parameters())
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if numbered is None or asked_by.startswith("torch.distributed."):
            return state
        numbers = {p: number for number, p in enumerate(numbered)}
        params = [p for group in self.param_groups for p in group["params"]]
        own = [number for group in state["param_groups"] for number in group["params"]]
        # A hook of the user's may have put names there.
        if not all(p in numbers for p in params) or own != list(range(len(params))):
            return state
        number_of = {old: numbers[p] for old, p in zip(own, params, strict=True)}
        return {
            **state,
            "state": {number_of.get(key, key): value for key, value in state["state"].items()},
            "param_groups": [
                {**group, "params": [number_of[number] for number in group["params"]]}
                for group in state["param_groups"]
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but that Adam's moments are in at least float32: torch gives them
        the dtype of the weights, and squares of small gradients would be 0 in float16."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            saved = state_dict["state"].get(number, {})
            if SECOND in saved:
                moments = {key: saved[key].to(p.device, wide(p.dtype), copy=True) for key in (FIRST, SECOND)}
                self.state[p].update(moments)

    def _update_parts(
        self, preconditioner: Preconditioner, grads: Mapping[nn.Parameter, Tensor]
    ) -> tuple[Iterable[dict[nn.Parameter, Tensor]], Fades]:
        """Directions, after the curvature was brought up to date, and how far they fade; each part is to be used before
        the next one is made."""
        if any(group["mode"] == "adam" for group in self.param_groups):
            return [self._adam_directions(preconditioner, grads)], {}
        preconditioner.update()
        momenta = self._polar_momenta(grads)
        faded = self._fades({**grads, **momenta})
        apart = all(group["mode"] == "natural" and group["kl_clip"] is None for group in self.param_groups)
        # Not isinstance, which takes a tenth of a small network's step to look at a protocol.
        in_parts: Callable[..., Iterator[dict[nn.Parameter, Tensor]]] | None = (
            getattr(preconditioner, "precondition_in_parts", None) if apart else None
        )
        if in_parts is not None:
            return in_parts(grads), faded
        return [self._directions(preconditioner, grads, momenta)], faded

    def _fades(self, made_of: Mapping[nn.Parameter, Tensor]) -> Fades:
        """What the root mean square of each matched direction is multiplied by, from what it is made of; this step is
        counted."""
        groups = [group for group in self.param_groups if _is_matched(group)]
        of = {p: _share_of_gradient(group) for group in groups for p in group["params"] if p in made_of}
        if not of:
            return {}
        before = self.param_groups[0][GRADIENT_RMS]
        found, largest = fade_factors([made_of[p] for p in of], list(of), list(of.values()), before)
        for group in self.param_groups:
            group[GRADIENT_RMS] = largest
        if found and not isinstance(found[0], Tensor) and all(factor == 1.0 for factor in found):
            return {}
        return dict(zip(of, found, strict=True))

    def _apply(self, grads: Mapping[nn.Parameter, Tensor], updates: Updates, faded: Fades) -> None:
        """The rest of a step, for the parameters in ``updates``, whose tensors are lost."""
        steps = [(group, [p for p in group["params"] if p in updates]) for group in self.param_groups]
        self._bring_to_scale(steps, grads, updates, faded)
        self._decay(steps, updates)
        self._clip(steps, updates)
        for group, params in steps:
            weights, own = [local(p) for p in params], [updates[p] for p in params]
            if group["mode"] == "natural":
                # Last of all: see `Preconditioner.precondition`.
                own = [u if u.dtype == w.dtype else u.to(w.dtype) for u, w in zip(own, weights, strict=True)]
                sgd_step(weights, own, self._momenta(params) if group["momentum"] else [], group)
            elif params:
                torch._foreach_add_(weights, own, alpha=-group["lr"])

    def _polar_momenta(self, grads: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The momentum of what is to be polar, after ``grads``."""
        momenta: dict[nn.Parameter, Tensor] = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p in grads and group["mode"] == "polar"]
            momenta.update(zip(params, self._with_momentum(group, params, [grads[p] for p in params]), strict=True))
        return momenta

    def _directions(
        self,
        preconditioner: Preconditioner,
        grads: Mapping[nn.Parameter, Tensor],
        momenta: Mapping[nn.Parameter, Tensor],
    ) -> dict[nn.Parameter, Tensor]:
        """Natural ones of the gradients, polar ones of their momentum."""
        if not momenta:
            return preconditioner.precondition(grads)
        if not isinstance(preconditioner, PolarPreconditioner):
            raise RuntimeError(
                f'Thor(mode="polar") got a {type(preconditioner).__name__} without precondition_polar. Pass '
                'preconditioner=Curvature(model, mode="polar").'
            )
        directions = preconditioner.precondition_polar(momenta)
        rest = {p: grad for p, grad in grads.items() if p not in momenta}
        return directions | preconditioner.precondition(rest) if rest else directions

    def _adam_directions(
        self, preconditioner: Preconditioner, grads: Mapping[nn.Parameter, Tensor]
    ) -> dict[nn.Parameter, Tensor]:
        """Adam's in the eigenbasis; the curvature is brought up to date, and the first moments with it."""
        if not isinstance(preconditioner, EigenbasisPreconditioner):
            raise RuntimeError(
                f'Thor(mode="adam") got a {type(preconditioner).__name__} without to_eigenbasis. Pass '
                'preconditioner=Curvature(model, mode="adam").'
            )
        # Those without a gradient at this step too: their next one is in the new basis.
        changing = preconditioner.about_to_change()
        held = {p: self.state[p][FIRST] for p in changing if FIRST in self.state.get(p, {})}
        carried = preconditioner.from_eigenbasis(held)
        preconditioner.update()
        carried = preconditioner.to_eigenbasis(carried)
        for group in self.param_groups:
            params = [p for p in group["params"] if p in carried]
            states, own = [self.state[p] for p in params], [carried[p] for p in params]
            carry_to_other_coordinates(states, own, group["momentum"], group["beta2"])
        # Their squares and eps are in the same unit as the curvature.
        unit = getattr(preconditioner, "gradient_unit", 1.0)
        grads = {p: grad.to(wide(grad.dtype)) for p, grad in grads.items()}
        if isinstance(unit, Tensor) or unit != 1.0:
            grads = {p: grad / unit for p, grad in grads.items()}
        rotated, directions = preconditioner.to_eigenbasis(grads), dict[nn.Parameter, Tensor]()
        for group in self.param_groups:
            params = [p for p in group["params"] if p in rotated]
            states, own = [self.state[p] for p in params], [rotated[p] for p in params]
            found = adam_directions(states, own, group["momentum"], group["beta2"], nesterov=group["nesterov"])
            directions.update(zip(params, found, strict=True))
        return preconditioner.from_eigenbasis(directions)

    def _bring_to_scale(
        self, steps: Steps, grads: Mapping[nn.Parameter, Tensor], updates: Updates, faded: Fades
    ) -> None:
        """``match_rms`` and ``kl_clip``, in place."""
        matched = {p: group["match_rms"] for group, params in steps if _is_matched(group) for p in params}
        if matched:
            rms: Numbers = list(matched.values())
            if faded:
                rms = times([faded[p] for p in matched], list(matched.values()))
            scale_to_rms_([updates[p] for p in matched], list(matched), rms)
        clipped = [(p, group) for group, params in steps if group["kl_clip"] is not None for p in params]
        if clipped:
            clip_kl_(clipped, grads, updates)

    def _decay(self, steps: Steps, updates: Updates) -> None:
        """Weight decay, of the weights or added to the updates."""
        for group, params in steps:
            weights, weight_decay = [local(p) for p in params], group["weight_decay"]
            if weights and weight_decay and group["decoupled_weight_decay"]:
                torch._foreach_mul_(weights, 1.0 - group["lr"] * weight_decay)
            elif weights and weight_decay:
                torch._foreach_add_([updates[p] for p in params], weights, alpha=weight_decay)

    def _clip(self, steps: Steps, updates: Updates) -> None:
        """``clip_norm``, in place."""
        clipped = {p: group["clip_norm"] for group, params in steps if group["clip_norm"] is not None for p in params}
        if clipped:
            clip_norm_([updates[p] for p in clipped], list(clipped), list(clipped.values()))

    def _with_momentum(self, group: dict[str, Any], params: list[Any], grads: list[Tensor]) -> list[Tensor]:
        """The momentum of ``params`` after ``grads``; neither is to be changed."""
        momentum = group["momentum"]
        if not momentum or not params:
            return grads
        buffers = self._momenta(params)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        return list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers

    def _momenta(self, params: list[nn.Parameter]) -> list[Tensor]:
        """What of them lies in this process; zeros where there was none."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [local(self.state[p]["momentum_buffer"]) for p in params]


def sgd_step(weights: list[Tensor], updates: list[Tensor], momenta: list[Tensor], group: Mapping[str, Any]) -> None:
    """A step of momentum SGD; ``updates`` are lost.

    By torch's fused kernel, in one pass instead of four, where it can be trusted: it takes all tensors as contiguous,
    and that of torch 2.13 for a CPU gives wrong numbers in half precision.
    """
    fused = all(
        one.dtype == torch.float32 and one.device.type in ("cpu", "cuda") and one.is_contiguous()
        for one in (*weights, *updates, *momenta)
    )
    sgd(
        weights,
        updates,
        list[Tensor | None](momenta),
        fused=fused,
        foreach=not fused,
        weight_decay=0.0,
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
    )


def _share_of_gradient(group: Mapping[str, Any]) -> float:
    """How much of what a direction is made of is one gradient: a momentum adds up ``1 / (1 - momentum)`` of them."""
    return 1.0 - group["momentum"] if group["mode"] == "polar" else 1.0


def _is_matched(group: Mapping[str, Any]) -> bool:
    return group["match_rms"] is not None and group["mode"] != "adam"  # whose updates have their size


def _check_group(group: Mapping[str, Any], unknown: set[str]) -> None:
    if unknown:
        raise ValueError(f"Thor does not know the option {', '.join(sorted(unknown))} of a parameter group.")
    if group["mode"] not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {group['mode']!r}.")
    if isinstance(group["lr"], Tensor):
        raise ValueError("lr must be a number, got a Tensor: Thor's step would have to wait for it.")
    for option in ("lr", "momentum", "beta2", "weight_decay", "match_rms", "kl_clip", "clip_norm"):
        optional = option in ("match_rms", "kl_clip", "clip_norm") and group[option] is None
        if not optional and (isinstance(group[option], bool) or not isinstance(group[option], int | float)):
            raise ValueError(f"{option} must be a number, got {group[option]!r}.")
    if not (math.isfinite(group["lr"]) and group["lr"] >= 0):
        raise ValueError(f"lr must be 0 or greater, got {group['lr']!r}.")
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"momentum must lie in [0, 1), got {group['momentum']!r}.")
    if not 0.0 <= group["beta2"] < 1.0:
        raise ValueError(f"beta2 must lie in [0, 1), got {group['beta2']!r}.")
    if not (math.isfinite(group["weight_decay"]) and group["weight_decay"] >= 0):
        raise ValueError(f"weight_decay must be 0 or greater, got {group['weight_decay']!r}.")
    for option in ("match_rms", "kl_clip", "clip_norm"):
        if group[option] is not None and not (math.isfinite(group[option]) and group[option] > 0):
            raise ValueError(f"{option} must be greater than 0, or None to turn it off, got {group[option]!r}.")
    if group["mode"] != "natural" and group["kl_clip"] is not None:
        raise ValueError(
            f"kl_clip is for natural directions, got {group['kl_clip']!r} with mode={group['mode']!r}: set it to None."
        )
    if group["match_rms"] is not None and group["kl_clip"] is not None:
        raise ValueError(
            "match_rms and kl_clip both set the scale of the update: set one of them to None "
            f"(got match_rms={group['match_rms']!r}, kl_clip={group['kl_clip']!r})."
        )
