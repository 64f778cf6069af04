"""The settings that ``ablations`` compares: the same options with one thing changed, as contenders of one rate each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.contenders import Contender, Stepper, thor
from benchmarks.time_to_target.tasks import Task, cross_entropy, squared_error
from benchmarks.time_to_target.training import WARM_UP_SHARE, shape
from lightning_thor import Curvature

DEFAULT = "default"
BASE: Mapping[str, Mapping[str, Any]] = {"curvature": {"block_size": 128}, "optimizer": {"nesterov": False}}
"""What all of them have unless it is what they change: the defaults of the day. What these figures say became them."""
NOISE = "lr 1 % higher"
"""Next to no change: what it makes is what the chaos of a training makes."""

# By workload and mode: the rates that won the race.
RATES: Mapping[str, Mapping[str, float]] = {
    "autoencoder": {"natural": 3e-3, "polar": 1e-2},
    "gpt": {"natural": 3e-3, "polar": 3e-2},
}


@dataclass(frozen=True)
class Falling:
    """A damping that falls as the learning rate does after its rise: ``start`` times its share of the peak, ``floor``
    at the least. (It does not rise with it: where the rate is small because training begins, damping is not.)

    >>> damping = Falling(0.2, floor=0.02, steps=100)
    >>> damping(0), damping(4), damping(99)
    (0.2, 0.2, 0.02)
    """

    start: float
    floor: float
    steps: int

    def __call__(self, step: int) -> float:
        rises = step < round(WARM_UP_SHARE * self.steps)
        return max(self.floor, self.start * (1.0 if rises else shape(step, self.steps)))


@dataclass(frozen=True)
class Setting:
    """What is changed from the defaults."""

    curvature: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `Curvature`."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `Thor`."""
    rate: float = 1.0
    """What the learning rate is multiplied by."""
    averaged: float = 0.0
    """The share of the training, its last, whose mean of weights is looked at in the end."""
    sampled: bool = False
    """Whether statistics are of targets that are drawn from what the model predicts."""


def settings(steps: int, rows: int) -> dict[str, Setting]:
    """All of them by name, those that tell most first.

    Args:
        steps: of a training.
        rows: of a batch, positions counted; at most the default ``max_rows``, which then leaves out none.
    """
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
    """`Thor` in a mode with a setting, for a training of so many steps at a peak rate near ``lr``."""
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
    """An optimizer that at its last step leaves the mean of the weights that it had after each of the last steps.

    Args:
        optimizer: what moves the weights.
        parameters: of which the mean is taken.
        begin: after how many steps the mean begins; the weights after the next one are the first in it.
        end: after how many steps the mean takes the place of the weights.
    """

    def __init__(self, optimizer: Stepper, parameters: Iterable[nn.Parameter], begin: int, end: int) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.parameters: list[Tensor] = list(parameters)
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.begin, self.end, self.done = begin, end, 0

    @torch.no_grad()
    def step(self) -> None:
        """A step of the optimizer, and its weights into the mean."""
        self.optimizer.step()
        self.done += 1
        if self.done > self.begin:
            torch._foreach_lerp_(self.means, self.parameters, 1 / (self.done - self.begin))
        if self.done == self.end:
            torch._foreach_copy_(self.parameters, self.means)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()


SAMPLE: Mapping[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]] = {
    cross_entropy: lambda logits: torch.distributions.Categorical(logits=logits).sample(),
    # Half the squared distance is the negative log-likelihood of a normal distribution with variance 1.
    squared_error: lambda outputs: outputs + torch.randn_like(outputs),
}


class WithSampledTargets(nn.Module):
    """A network whose curvature sees, where a refresh is due, targets drawn from the prediction, and no others.

    So G is that of the Fisher matrix, not of the empirical one. It costs a forward and a backward pass at a refresh.
    """

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.curvature: Curvature | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs; before, if a refresh is due, a backward pass whose gradients are thrown away."""
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
    """What makes the task's network, as the setting wants it."""
    return (lambda: WithSampledTargets(task.model(), task.loss)) if setting.sampled else task.model
