"""The development tasks: settings and the rule for the default may be chosen on their validation scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.models import mlp
from benchmarks.common.workloads import Batch
from benchmarks.default_mode.problem import Problem, ScoreFn, StudyTask
from benchmarks.time_to_target.tasks import CPU, Task, cross_entropy, draws, read_cifar10, shakespeare, squared_error
from examples.char_gpt import CharGPT

EVALUATION_CHUNK_ROWS = 500


def held_out(split: Batch, score: Callable[[Tensor, Tensor], Tensor]) -> ScoreFn:
    """Score a network by the mean of ``score`` over the rows of ``split``."""

    @torch.no_grad()
    def mean(model: nn.Module) -> float:
        chunks = list(zip(*(part.split(EVALUATION_CHUNK_ROWS) for part in split), strict=True))
        total = sum(float(score(model(inputs), targets)) * len(inputs) for inputs, targets in chunks)
        return total / sum(len(inputs) for inputs, _ in chunks)

    return mean


def race_task(task: Task, score: Callable[[Tensor, Tensor], Tensor], steps: int | None = None) -> StudyTask:
    """Make a task of the race to a target one of this study."""

    def make(folder: Path | None) -> Problem:
        data = task.data(folder, task.batch_size, torch.device("cpu"))

        def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
            inputs, targets = data.draw(generator)
            return task.loss(model(inputs), targets)

        return Problem(task.model, loss, held_out(data.validation, score), held_out(data.test, score))

    metric = "squared error" if score is squared_error else "cross-entropy"
    return StudyTask(task.words, metric, steps or task.steps, make, task.decay, task.per_position)


def relu_network(folder: Path | None) -> Problem:
    """10,000 images of CIFAR-10, a plain ReLU network; scores are training losses, since it is there to be fitted."""
    images, labels = read_cifar10(folder, 10_000, 1000).train
    inputs = images.float().flatten(1) / 127.5 - 1.0
    draw = draws(inputs, labels, 128)

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows, targets = draw(generator)
        return cross_entropy(model(rows), targets)

    validation, test = ((inputs[rows], labels[rows]) for rows in (slice(0, 2000), slice(2000, 4000)))
    return Problem(
        lambda: mlp((3072, 512, 512, 512, 10)), loss, held_out(validation, cross_entropy), held_out(test, cross_entropy)
    )


def laplacian(u: Tensor, x: Tensor) -> Tensor:
    """The sum of second derivatives of ``u [n, 1]`` by the columns of ``x [n, d]``, as ``[n]``."""
    first: Tensor = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    columns = [
        torch.autograd.grad(first[:, i].sum(), x, create_graph=True, retain_graph=True)[0][:, i]
        for i in range(x.shape[1])
    ]
    return torch.stack(columns).sum(0)


def poisson(folder: Path | None) -> Problem:
    """Poisson's equation on the unit square, zero on its border, with the solution sin(πx) sin(πy): squared residuals
    inside plus squared values on the border. Scores are relative L2 errors."""

    def solution(x: Tensor) -> Tensor:
        return torch.sin(math.pi * x).prod(1)

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        inside = torch.rand(512, 2, generator=generator).requires_grad_()
        border = torch.rand(128, 2, generator=generator)
        side = torch.arange(128) % 4
        border[torch.arange(128), side // 2] = (side % 2).float()
        # One call of the network, so that each layer is used once.
        values: Tensor = model(torch.cat([inside, border]))
        second = laplacian(values[:512], inside)
        residual = second + 2 * math.pi**2 * solution(inside.detach())
        on_border: Tensor = values[512:].square().mean()
        return residual.square().mean() + 100 * on_border

    def error(shift: float) -> ScoreFn:
        axis = (torch.arange(64) + shift) / 64
        points = torch.cartesian_prod(axis, axis)

        @torch.no_grad()
        def score(model: nn.Module) -> float:
            true = solution(points)
            return float((model(points)[:, 0] - true).norm() / true.norm())

        return score

    return Problem(lambda: mlp((2, 64, 64, 64, 64, 1), nn.Tanh), loss, error(0.25), error(0.75))


def small_gpt() -> CharGPT:
    """A GPT for long trainings on one core."""
    return CharGPT(layers=2, width=64, context=64)


LONG_GPT = replace(
    CPU["gpt"], words="tiny Shakespeare, GPT, 2 layers, width 64, 8 windows of 64", batch_size=8,
    data=cache(shakespeare(64, 128)), model=small_gpt,
)  # fmt: skip

DEVELOPMENT: Mapping[str, StudyTask] = {
    "digits": race_task(CPU["digits"], cross_entropy),
    "autoencoder": race_task(CPU["autoencoder"], squared_error),
    "gpt": race_task(CPU["gpt"], cross_entropy, steps=300),
    "cifar10": race_task(CPU["cifar10"], cross_entropy, steps=160),
    "relu": StudyTask(
        "10,000 images of CIFAR-10, ReLU network 3072-512-512-512-10, batch 128", "training loss", 300, relu_network
    ),
    "poisson": StudyTask(
        "Poisson's equation on the unit square, tanh network of 4 layers of 64", "relative error", 800, poisson
    ),
    "autoencoder_long": race_task(CPU["autoencoder"], squared_error, steps=2500),
    "gpt_long": race_task(LONG_GPT, cross_entropy, steps=2500),
}
