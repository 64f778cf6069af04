"""The settings of ``ablations``: the same options with one of them changed, as contenders with one rate each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.contenders import Contender, Stepper, thor
from benchmarks.time_to_target.tasks import Task, cross_entropy, squared_error
from benchmarks.time_to_target.training import WARM_UP_SHARE, lr_share
from lightning_thor import Curvature

DEFAULT = "default"
BASE: Mapping[str, Mapping[str, Any]] = {
    "curvature": {"block_size": 128, "update_every_n_steps": 10},
    "optimizer": {"nesterov": False},
}
"""Options of all settings that do not change them: the defaults before this study, which changed them."""
NOISE = "lr 1 % higher"
"""Next to no change: its effect is the chaos of a training."""

# By workload and mode: the rates that won the race.
RATES: Mapping[str, Mapping[str, float]] = {
    "autoencoder": {"natural": 3e-3, "polar": 1e-2},
    "gpt": {"natural": 3e-3, "polar": 3e-2},
}


@dataclass(frozen=True)
class Falling:
    """Damping that falls with the learning rate, once that has risen, from ``start`` to ``floor`` at the least.

    >>> damping = Falling(0.2, floor=0.02, steps=100)
    >>> damping(0), damping(4), damping(99)
    (0.2, 0.2, 0.02)
    """

    start: float
    floor: float
    steps: int

    def __call__(self, step: int) -> float:
        rises = step < round(WARM_UP_SHARE * self.steps)
        return max(self.floor, self.start * (1.0 if rises else lr_share(step, self.steps)))


@dataclass(frozen=True)
class Setting:
    """Changes from the defaults."""

    curvature: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `Curvature`."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `Thor`."""
    rate: float = 1.0
    """Factor of the learning rate."""
    averaged: float = 0.0
    """The last share of the training whose mean of weights is evaluated; 0 evaluates the last weights."""
    sampled: bool = False
    """Whether factors are estimated with targets drawn from the model's prediction."""


def settings(steps: int, rows: int) -> dict[str, Setting]:
    """All settings by name, the most telling ones first, for trainings of ``steps`` on batches of ``rows``, positions
    included; these are at most the default ``max_rows``, which then leaves out none."""
    return {
        DEFAULT: Setting(),
        NOISE: Setting(rate=1.01),
        **{f"update_every_n_steps={n}": Setting({"update_every_n_steps": n}) for n in (1, 3, 30, 100)},
        **{f"block_size={n}": Setting({"block_size": n}) for n in (16, 32, 64, 256, None)},
        **{f"damping={damping:g}": Setting({"damping": damping}) for damping in (0.02, 0.05, 0.6, 2.0)},
        **{f"averaging={weight:g}": Setting({"averaging": weight}) for weight in (0.0, 0.5, 0.9, 0.95)},
        **{
            f"damping falls from {start:g} to {floor:g}": Setting({"damping": Falling(start, floor, steps)})
            for start, floor in ((0.2, 0.02), (2.0, 0.2))
        },
        "precondition_bias=True": Setting({"precondition_bias": True}),
        "momentum=0.95": Setting(optimizer={"momentum": 0.95}),
        "nesterov=True": Setting(optimizer={"nesterov": True}),
        "stagger=True": Setting({"stagger": True}),
        "max_rows: a quarter of the batch": Setting({"max_rows": rows // 4}),
        "mean of the last half's weights": Setting(averaged=0.5),
        "mean of the last quarter's weights": Setting(averaged=0.25),
        "sampled targets": Setting(sampled=True),
    }


def contender_of(name: str, setting: Setting, mode: str, lr: float, steps: int) -> Contender:
    """`Thor` in a mode with a setting, as a contender for ``steps`` steps; its only peak rate is ``lr``, or what the
    setting makes of it."""
    options = {
        "curvature": {"mode": mode, **BASE["curvature"], **setting.curvature},
        "optimizer": {"mode": mode, **BASE["optimizer"], **setting.optimizer},
    }

    def build(model: nn.Module, lr: float, options: Mapping[str, Any], per_position: bool) -> Stepper:
        optimizer = thor(model, lr, options, per_position)
        if isinstance(model, WithSampledTargets):
            model.curvature = optimizer.preconditioner  # type: ignore[attr-defined]
        if not setting.averaged:
            return optimizer
        return AveragedWeights(optimizer, model.parameters(), round((1 - setting.averaged) * steps), steps)

    return Contender(f"{mode}, {name}", build, (lr * setting.rate,), "tab:red", options)


class AveragedWeights:
    """An optimizer whose last step sets the weights to their mean over the last steps.

    Args:
        optimizer: takes the steps.
        parameters: to average.
        begin: number of steps before the mean begins; the weights after the next one are the first in it.
        end: number of steps after which the mean replaces the weights.
    """

    def __init__(self, optimizer: Stepper, parameters: Iterable[nn.Parameter], begin: int, end: int) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.parameters: list[Tensor] = list(parameters)
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.begin, self.end, self.done = begin, end, 0

    @torch.no_grad()
    def step(self) -> None:
        """Take a step of the optimizer, and add the weights to the mean."""
        self.optimizer.step()
        self.done += 1
        if self.done > self.begin:
            torch._foreach_lerp_(self.means, self.parameters, 1 / (self.done - self.begin))
        if self.done == self.end:
            torch._foreach_copy_(self.parameters, self.means)

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad()


SAMPLE: Mapping[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]] = {
    cross_entropy: lambda logits: torch.distributions.Categorical(logits=logits).sample(),
    # Half the squared distance is the negative log-likelihood of a normal distribution with variance 1.
    squared_error: lambda outputs: outputs + torch.randn_like(outputs),
}


class WithSampledTargets(nn.Module):
    """A network whose curvature sees targets drawn from the prediction alone: G is the Fisher matrix's, not the
    empirical one's. A refresh costs a further forward and backward pass.

    Args:
        net: the network.
        loss: of its outputs and targets, a key of ``SAMPLE``.
    """

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.curvature: Curvature | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the network's outputs; before, if a refresh is due, run a backward pass and drop its gradients."""
        if not self.training or self.curvature is None or not self.curvature.is_due():
            out: Tensor = self.net(inputs)
            return out
        outputs = self.net(inputs)
        self.loss(outputs, SAMPLE[self.loss](outputs.detach())).backward()
        for p in self.net.parameters():
            p.grad = None
        with self.curvature.paused():
            out = self.net(inputs)
        return out


def model_of(task: Task, setting: Setting) -> Callable[[], nn.Module]:
    """A function that builds the task's network for a setting."""
    return (lambda: WithSampledTargets(task.model(), task.loss)) if setting.sampled else task.model
