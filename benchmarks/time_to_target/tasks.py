"""What is trained in ``time_to_target``: data, network, loss, and the target. Two sizes of each: two cores, or a GPU.

Tuning looks at the validation split; all figures that are reported are of the test split, which tuning never saw.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.models import mlp, small_resnet
from examples.char_gpt import CharData, CharGPT
from examples.cifar10 import CIFAR10Data, normalise, random_crop_and_flip
from examples.digits import DigitsData, DigitsNet
from examples.resnet import ResNet18

Batch = tuple[Tensor, Tensor]


class Data(NamedTuple):
    """Where batches come from."""

    draw: Callable[[torch.Generator], Batch]
    """A training batch, decided by the generator alone; drawn with replacement."""
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
    """Weights of two or more dimensions are multiplied by ``1 - decay`` a step, or by less as the rate falls."""
    data: Callable[[Path | None, int, torch.device], Data]
    """From the folder of the data sets, the batch size, and the device that everything is to lie on."""
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    """What is minimised, from the network's output and the batch's targets."""
    score: Callable[[Tensor, Tensor], Tensor]
    """The metric of one batch, a mean over its rows."""
    per_position: bool = False
    """Whether the loss is a mean over positions as well as samples."""
    checks: int = 20
    """How often a full training is looked at, evenly spaced."""
    seeds: int = 3
    """How many full trainings each optimizer gets: on two cores, what all of them do in half an hour to an hour."""

    def goodness(self, value: float | None) -> float:
        """``value`` on a scale where more is better; the worst for one that was not finite."""
        if value is None:
            return -float("inf")
        return value if self.higher_is_better else -value

    def reached(self, value: float | None) -> bool:
        """Whether ``value`` is as good as the target; None is a value that was not finite."""
        return self.goodness(value) >= self.goodness(self.target)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over all rows; the classes are the last dimension."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is their label's."""
    return (logits.argmax(-1) == labels).float().mean()


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance of each row, its mean over the batch: ``[N, d]`` both."""
    return 0.5 * (outputs - targets).square().sum(1).mean()


def draws(inputs: Tensor, targets: Tensor, batch_size: int) -> Callable[[torch.Generator], Batch]:
    """Random rows of both; the generator is on their device."""

    def draw(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(inputs), (batch_size,), generator=generator, device=inputs.device)
        return inputs[rows], targets[rows]

    return draw


def on(device: torch.device, *parts: tuple[Tensor, ...]) -> list[Batch]:
    """Pairs of tensors, on ``device``."""
    return [(inputs.to(device), targets.to(device)) for inputs, targets in parts]


def digits(folder: Path | None, batch_size: int, device: torch.device) -> Data:
    """scikit-learn's digits; they need no folder."""
    data = DigitsData()
    data.setup()
    train, val, test = on(device, data.train, data.val, data.test)
    return Data(draws(*train, batch_size), val, test)


def cifar10(train_rows: int | None, test_rows: int) -> Callable[[Path | None, int, torch.device], Data]:
    """CIFAR-10, augmented; ``train_rows`` images to train on, ``test_rows`` each to tune and to test with."""

    def data(folder: Path | None, batch_size: int, device: torch.device) -> Data:
        read = read_cifar10(folder, train_rows, test_rows)
        train, *held_out = on(device, read.train, read.val, read.test)
        draw = draws(*train, batch_size)

        def augmented(generator: torch.Generator) -> Batch:
            images, labels = draw(generator)
            return normalise(random_crop_and_flip(images, generator=generator)), labels

        val, test = ((normalise(images), labels) for images, labels in held_out)
        return Data(augmented, val, test)

    return data


def grey_cifar10(folder: Path | None, batch_size: int, device: torch.device) -> Data:
    """CIFAR-10's images in grey, as rows of 1024 numbers around 0, which are input and target both."""
    read = read_cifar10(folder, 20_000, 1000)
    parts = (read.train[0], read.val[0], read.test[0])
    train, val, test = (part.to(device).float().mean(1).flatten(1) / 255 - 0.5 for part in parts)
    return Data(draws(train, train, batch_size), (val, val), (test, test))


def read_cifar10(folder: Path | None, train_rows: int | None, test_rows: int) -> CIFAR10Data:
    """The data module of the examples, with its images read."""
    root = str(needed(folder, "cifar10"))
    data = CIFAR10Data(root, subset=train_rows, val_subset=test_rows, test_subset=test_rows)
    data.setup()
    return data


def shakespeare(context: int, windows: int) -> Callable[[Path | None, int, torch.device], Data]:
    """Tiny Shakespeare, in windows of ``context`` characters; ``windows`` of them each to tune and to test with."""

    def data(folder: Path | None, batch_size: int, device: torch.device) -> Data:
        read = CharData(str(needed(folder, "tinyshakespeare")), context=context, val_windows=windows)
        read.setup()
        characters, reach = read.train.characters.to(device), torch.arange(context + 1, device=device)

        def draw(generator: torch.Generator) -> Batch:
            starts = torch.randint(len(read.train), (batch_size, 1), generator=generator, device=device)
            window = characters[starts + reach]
            return window[:, :-1], window[:, 1:]

        loaders = (read.val_dataloader(), read.test_dataloader())
        held_out = [[torch.cat(part) for part in zip(*loader, strict=True)] for loader in loaders]
        val, test = on(device, *map(tuple, held_out))
        return Data(draw, val, test)

    return data


def needed(folder: Path | None, name: str) -> Path:
    """``folder / name``, or an end of the program that says what to do."""
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
        # The target is what AdamW reached in 290 steps, in a trial before any other optimizer but SGD had run.
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
