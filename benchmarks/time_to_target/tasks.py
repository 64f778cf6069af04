"""The tasks of ``time_to_target``: data, network, loss and target, each in two sizes: for two cores, and for a GPU.

Tuning uses the validation split; all reported figures come from the test split, which tuning never saw.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.models import mlp, small_resnet
from benchmarks.common.workloads import Batch
from examples.char_data import CharData
from examples.char_gpt import CharGPT
from examples.cifar10 import MEAN, STD, CIFAR10Data
from examples.digits import DigitsData, DigitsNet
from examples.images import normalise, random_crop_and_flip
from examples.resnet import ResNet18


class Data(NamedTuple):
    """Training batches, and two held-out splits."""

    draw: Callable[[torch.Generator], Batch]
    """Draws a training batch, with replacement; the generator alone decides it."""
    validation: Batch
    test: Batch


@dataclass(frozen=True)
class Task:
    """One training, without its optimizer."""

    words: str
    metric: str
    target: float
    higher_is_better: bool
    steps: int
    tuning_steps: int
    batch_size: int
    decay: float
    """Weight decay per step at the peak learning rate, of weights of two or more dimensions; it falls with the rate."""
    data: Callable[[Path | None, int, torch.device], Data]
    """From the folder of the data sets (None: there is none), the batch size, and the device for all tensors."""
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    """Minimised in training; from the network's output and the batch's targets."""
    score: Callable[[Tensor, Tensor], Tensor]
    """The metric: a mean over the rows of one batch."""
    per_position: bool = False
    """Whether the loss is a mean over positions as well as samples."""
    checks: int = 20
    """Evaluations of a full training, evenly spaced."""
    seeds: int = 3
    """Full trainings of each optimizer: those of all optimizers take half an hour to an hour on two cores."""

    def goodness(self, value: float | None) -> float:
        """``value`` on a scale where more is better; minus infinity for None, a value that was not finite."""
        if value is None:
            return -float("inf")
        return value if self.higher_is_better else -value

    def reached(self, value: float | None) -> bool:
        """Whether ``value`` is as good as the target; None (not finite) is not."""
        return self.goodness(value) >= self.goodness(self.target)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over all rows of ``logits`` ``[..., classes]`` and ``labels`` ``[...]``."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the rows of ``logits`` ``[..., classes]`` whose largest logit is their label's."""
    return (logits.argmax(-1) == labels).float().mean()


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance between rows of ``[N, d]``, as a mean over the batch."""
    return 0.5 * (outputs - targets).square().sum(1).mean()


def draws(inputs: Tensor, targets: Tensor, batch_size: int) -> Callable[[torch.Generator], Batch]:
    """Make a function that draws ``batch_size`` random rows of both, with a generator on their device."""

    def draw(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(inputs), (batch_size,), generator=generator, device=inputs.device)
        return inputs[rows], targets[rows]

    return draw


def on_device(device: torch.device, *splits: tuple[Tensor, ...]) -> list[Batch]:
    """Copy pairs of inputs and targets to ``device``."""
    return [(inputs.to(device), targets.to(device)) for inputs, targets in splits]


def digits(folder: Path | None, batch_size: int, device: torch.device) -> Data:
    """scikit-learn's digits, which need no folder; see `Task.data`."""
    data = DigitsData()
    data.setup()
    train, val, test = on_device(device, data.train, data.val, data.test)
    return Data(draws(*train, batch_size), val, test)


def cifar10(train_rows: int | None, test_rows: int) -> Callable[[Path | None, int, torch.device], Data]:
    """CIFAR-10, augmented: ``train_rows`` training images (None: all), ``test_rows`` in each held-out split."""

    def data(folder: Path | None, batch_size: int, device: torch.device) -> Data:
        read = read_cifar10(folder, train_rows, test_rows)
        train, *held_out = on_device(device, read.train, read.val, read.test)
        draw = draws(*train, batch_size)

        def augmented(generator: torch.Generator) -> Batch:
            images, labels = draw(generator)
            return normalise(random_crop_and_flip(images, generator=generator), MEAN, STD), labels

        val, test = ((normalise(images, MEAN, STD), labels) for images, labels in held_out)
        return Data(augmented, val, test)

    return data


def grey_cifar10(folder: Path | None, batch_size: int, device: torch.device) -> Data:
    """CIFAR-10's images in grey, rows of 1024 numbers around 0, both inputs and targets; see `Task.data`."""
    read = read_cifar10(folder, 20_000, 1000)
    parts = (read.train[0], read.val[0], read.test[0])
    train, val, test = (part.to(device).float().mean(1).flatten(1) / 255 - 0.5 for part in parts)
    return Data(draws(train, train, batch_size), (val, val), (test, test))


def read_cifar10(folder: Path | None, train_rows: int | None, test_rows: int) -> CIFAR10Data:
    """Read the images of the examples' data module; arguments as of `cifar10`, ``folder`` as of `Task.data`."""
    root = str(data_folder(folder, "cifar10"))
    data = CIFAR10Data(root, subset=train_rows, val_subset=test_rows, test_subset=test_rows)
    data.setup()
    return data


def shakespeare(context: int, windows: int) -> Callable[[Path | None, int, torch.device], Data]:
    """Tiny Shakespeare, in windows of ``context`` characters; ``windows`` of them in each held-out split."""

    def data(folder: Path | None, batch_size: int, device: torch.device) -> Data:
        read = CharData(str(data_folder(folder, "tinyshakespeare")), context=context, val_windows=windows)
        read.setup()
        characters, reach = read.train.characters.to(device), torch.arange(context + 1, device=device)

        def draw(generator: torch.Generator) -> Batch:
            starts = torch.randint(len(read.train), (batch_size, 1), generator=generator, device=device)
            window = characters[starts + reach]
            return window[:, :-1], window[:, 1:]

        loaders = (read.val_dataloader(), read.test_dataloader())
        held_out = [[torch.cat(part) for part in zip(*loader, strict=True)] for loader in loaders]
        val, test = on_device(device, *map(tuple, held_out))
        return Data(draw, val, test)

    return data


def data_folder(folder: Path | None, name: str) -> Path:
    """``folder / name``; without a folder, exit with advice."""
    if folder is None:
        raise SystemExit(f"This workload reads {name}: say --data DIR, a folder that holds {name}/.")
    return folder / name


AUTOENCODER = (1024, 256, 128, 32, 128, 256, 1024)

CPU = {
    "digits": Task(
        "digits, CNN with 3 convolutions, batch 64", "accuracy", 0.98, True, 250, 80, 64, 0.0,
        digits, DigitsNet, cross_entropy, accuracy, checks=50, seeds=20,
    ),
    "autoencoder": Task(
        # AdamW reached the target in 290 steps, in a trial before any other optimizer but SGD had run.
        "CIFAR-10 in grey, tanh autoencoder 1024-256-128-32-128-256-1024, batch 128", "squared error", 5.5, False,
        400, 130, 128, 0.0, grey_cifar10, lambda: mlp(AUTOENCODER, nn.Tanh), squared_error, squared_error,
        checks=40, seeds=8,
    ),
    "gpt": Task(
        "tiny Shakespeare, GPT, 3 layers, width 96, 16 windows of 64", "loss", 2.0, False, 600, 200, 16, 1e-4,
        shakespeare(64, 128), lambda: CharGPT(layers=3, width=96, context=64), cross_entropy, cross_entropy,
        per_position=True, checks=40, seeds=5,
    ),
    "cifar10": Task(
        "10,000 images of CIFAR-10, ResNet-8, batch 64", "accuracy", 0.5, True, 240, 80, 64, 1e-4,
        cifar10(10_000, 1000), lambda: small_resnet(16), cross_entropy, accuracy, checks=24, seeds=5,
    ),
}  # fmt: skip
GPU = {
    "digits": CPU["digits"],
    "autoencoder": Task(
        "CIFAR-10 in grey, tanh autoencoder 1024-2048-1024-256-64-256-1024-2048-1024, batch 512", "squared error", 3.0,
        False, 4000, 1300, 512, 0.0, grey_cifar10,
        lambda: mlp((1024, 2048, 1024, 256, 64, 256, 1024, 2048, 1024), nn.Tanh), squared_error, squared_error,
    ),
    "gpt": Task(
        "tiny Shakespeare, GPT, 6 layers, width 384, 64 windows of 256", "loss", 1.8, False, 400, 130, 64, 1e-4,
        shakespeare(256, 128), lambda: CharGPT(layers=6, width=384, heads=6, context=256), cross_entropy, cross_entropy,
        per_position=True, checks=40,
    ),
    "cifar10": Task(
        "CIFAR-10, ResNet-18, batch 128", "accuracy", 0.93, True, 7000, 2300, 128, 1e-4,
        cifar10(None, 5000), ResNet18, cross_entropy, accuracy,
    ),
}  # fmt: skip
TASKS: Mapping[str, Mapping[str, Task]] = {"cpu": CPU, "gpu": GPU}
