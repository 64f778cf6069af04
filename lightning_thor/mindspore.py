"""For users of MindSpore: ``thor(...)`` with the signature, the defaults and the numbers of ``mindspore.nn.thor``.

A thin room over `Curvature` and `Thor`: it names the statistics, the cut, the damping rule and the order of a step that
MindSpore 2.7 has. New programs are better served by `configure_thor` and `ThorCallback`.

Its known defects are kept only where its numbers need them: the GPU version divides A of a dense layer by the number of
inputs, and averages a convolution's patches over the batch before their covariance. Not kept: the wrong inverse of an
embedding's G, patches that ignore padding, dilation and groups, and the averaging of inverses over devices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.blocks import cut_with_remainder
from lightning_thor.curvature import Curvature
from lightning_thor.layers import EXPAND, Statistics
from lightning_thor.optimizer import Thor
from lightning_thor.thor_rows import embedding_rows_of, gpu_conv_rows, gpu_linear_rows

BLOCK_SIZE = 128
CLIP_NORM = 1.0
PerStep = int | float | Sequence[float] | Tensor


@dataclass(frozen=True)
class Named:
    """What ``decay_filter`` is called with: as of a MindSpore parameter, its ``.name``."""

    name: str


def thor(
    net: nn.Module,
    learning_rate: PerStep,
    damping: PerStep,
    momentum: float,
    weight_decay: float = 0.0,
    loss_scale: float = 1.0,
    batch_size: int = 32,
    use_nesterov: bool = False,
    decay_filter: Callable[[Named], bool] = lambda parameter: True,
    split_indices: Sequence[int] | None = None,
    enable_clip_grad: bool = False,
    frequency: int = 100,
    variant: str = "gpu",
) -> MindSporeThor:
    """What ``mindspore.nn.thor`` computes, as a torch optimizer that carries its curvature.

    In a plain loop: ``(loss * loss_scale).backward(); optimizer.step(); optimizer.zero_grad()``. Under a Trainer return
    it from ``configure_optimizers``, without ThorCallback; its state, curvature included, is in the optimizer's
    ``state_dict``.

    Args:
        net: the network, on its device; hooks listen to its layers from now on.
        learning_rate: a number, or one per step (past the end the last one holds, with one warning).
        damping: likewise; greater than 0.
        momentum: 0 or greater.
        weight_decay: 0 or greater; added to the preconditioned gradient where ``decay_filter`` allows.
        loss_scale: what the loss is multiplied by before ``backward``; greater than 0.
        batch_size: samples per batch: nn.thor does not measure it.
        use_nesterov: Nesterov's momentum.
        decay_filter: called with an object whose ``.name`` is a parameter's name; whether it decays.
        split_indices: there, the layers after which a new all-reduce begins. It is checked; here all factors travel in
            one, and the numbers do not depend on it.
        enable_clip_grad: clip each tensor's update, before momentum, to an L2 norm of 1.
        frequency: steps from one update of the curvature to the next; at least 2.
        variant: ``"gpu"`` or ``"ascend"``, whose statistics differ.

    Raises:
        TypeError: an argument of a type that nn.thor refuses.
        ValueError: an argument out of its range.
    """
    _check_types(learning_rate, damping, momentum, weight_decay, loss_scale, batch_size, use_nesterov, frequency)
    _check_ranges(damping, momentum, weight_decay, loss_scale, batch_size, frequency, variant)
    _check_split(split_indices)
    rows = {"convolution": EXPAND.rows["convolution"], "linear": EXPAND.rows["linear"]}
    if variant == "gpu":
        rows = {"convolution": gpu_conv_rows, "linear": gpu_linear_rows}
    curvature = Curvature(
        net,
        damping=_PerStep("damping", damping),
        damping_rule="sqrt",
        block_size=BLOCK_SIZE,
        update_every_n_steps=frequency,
        averaging=0.0,
        max_rows=None,
        statistics=Statistics(
            {**rows, "embedding": embedding_rows_of(batch_size)}, cut=cut_with_remainder, split_embedding_G=False
        ),
        # G there is that of the mean loss, times batch_size² / loss_scale².
        loss_reduction="sum",
        loss_multiplier=lambda: loss_scale / batch_size,
    )
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in net.named_parameters():
        if p.requires_grad:
            (decayed if decay_filter(Named(name)) else others).append(p)
    groups = [{"params": decayed, "weight_decay": float(weight_decay)}, {"params": others, "weight_decay": 0.0}]
    return MindSporeThor(
        [group for group in groups if group["params"]],
        _PerStep("learning_rate", learning_rate),
        _Preconditioner(curvature, net, loss_scale, batch_size),
        momentum=momentum,
        nesterov=use_nesterov,
        clip_norm=CLIP_NORM if enable_clip_grad else None,
    )


class MindSporeThor(Thor):
    """The optimizer that `thor` makes: `Thor` without control of the scale, with a learning rate of its own per step.

    A torch scheduler would be overwritten at the next step: give ``learning_rate`` as a sequence instead.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        learning_rate: Callable[[int], float],
        preconditioner: _Preconditioner,
        **options: Any,
    ) -> None:
        plain: dict[str, Any] = {"match_rms": None, "decoupled_weight_decay": False}
        super().__init__(groups, lr=learning_rate(0), preconditioner=preconditioner, **plain, **options)
        self.learning_rate = learning_rate
        self.curvature = preconditioner.curvature

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As `Thor.step`, at the learning rate of this step."""
        for group in self.param_groups:
            group["lr"] = self.learning_rate(self.curvature.step)
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, with the curvature under ``"curvature"``."""
        return {**super().state_dict(), "curvature": self.curvature.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; a ValueError if its curvature is of another network."""
        self.curvature.load_state_dict(state_dict["curvature"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "curvature"})


class _Preconditioner:
    """nn.thor's first steps: unscale the gradient, precondition it; layer norms by their own gradient's square."""

    def __init__(self, curvature: Curvature, net: nn.Module, loss_scale: float, batch_size: int) -> None:
        self.curvature, self.loss_scale, self.batch_size = curvature, loss_scale, batch_size
        self.norms = {p for module in net.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
        self.damping = 0.0

    def update(self) -> None:
        self.damping = self.curvature.damping_now()
        self.curvature.update()

    def precondition(self, grads: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        directions = self.curvature.precondition({p: grad / self.loss_scale for p, grad in grads.items()})
        for p in self.norms & directions.keys():
            directions[p].div_(directions[p].square() / self.batch_size + self.damping**0.5)
        return directions


class _PerStep:
    """A number per step as a function of the step; past the end the last value holds, with one warning."""

    def __init__(self, name: str, values: PerStep) -> None:
        self.name, self.told = name, False
        listed = values.tolist() if isinstance(values, Tensor) else values
        self.values = [float(value) for value in listed] if isinstance(listed, Sequence) else [float(listed)]
        self.constant = not isinstance(listed, Sequence)

    def __call__(self, step: int) -> float:
        if step >= len(self.values) and not self.constant and not self.told:
            self.told = True
            warnings.warn(
                f"{self.name} has {len(self.values)} values, and this is step {step}: the last one holds from here on "
                "(MindSpore would fail). Give as many values as there are steps.",
                stacklevel=2,
            )
        return self.values[min(step, len(self.values) - 1)]


def _check_types(
    learning_rate: Any, damping: Any, momentum: Any, weight_decay: Any, loss_scale: Any, batch_size: Any, nesterov: Any,
    frequency: Any,
) -> None:  # fmt: skip
    for name, value in (("learning_rate", learning_rate), ("damping", damping)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (not number and not isinstance(value, Tensor | Sequence | range)) or isinstance(value, str):
            raise TypeError(f"{name} must be a number, a sequence or a Tensor of one per step, got {value!r}.")
    for name, value, types, words in (
        ("momentum", momentum, float, "a float"),
        ("loss_scale", loss_scale, float, "a float"),
        ("weight_decay", weight_decay, int | float, "a float or an int"),
        ("batch_size", batch_size, int, "an int"),
        ("frequency", frequency, int, "an int"),
    ):
        if not isinstance(value, types) or isinstance(value, bool):
            raise TypeError(f"{name} must be {words}, got {value!r}.")
    if not isinstance(nesterov, bool):
        raise TypeError(f"use_nesterov must be a bool, got {nesterov!r}.")


def _check_ranges(
    damping: PerStep, momentum: float, weight_decay: float, loss_scale: float, batch_size: int, frequency: int,
    variant: str,
) -> None:  # fmt: skip
    dampings = _PerStep("damping", damping).values
    if not dampings or not all(math.isfinite(value) and value > 0 for value in dampings):
        raise ValueError(f"damping must be greater than 0 at every step, got {damping!r}.")
    if loss_scale <= 0:
        raise ValueError(f"loss_scale must be greater than 0, got {loss_scale!r}.")
    for name, value in (("weight_decay", weight_decay), ("momentum", momentum)):
        if value < 0:
            raise ValueError(f"{name} must be 0 or greater, got {value!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}.")
    if frequency < 2:
        raise ValueError(f"frequency must be at least 2, as in nn.thor, got {frequency!r}.")
    if variant not in ("gpu", "ascend"):
        raise ValueError(f"variant must be 'gpu' or 'ascend', got {variant!r}.")


def _check_split(split_indices: Any) -> None:
    if split_indices is None:
        return
    if not isinstance(split_indices, list | tuple) or not all(type(index) is int for index in split_indices):
        raise TypeError(f"split_indices must be a list of ints (the last layer of each group), got {split_indices!r}.")
    if list(split_indices) != sorted(set(split_indices)) or any(index < 0 for index in split_indices):
        raise ValueError(f"split_indices must increase from 0 on, got {split_indices!r}.")
