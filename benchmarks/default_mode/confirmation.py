"""The confirmation tasks: no setting of THOR, and no part of the rule for its default, was ever chosen on them.

Each was tried with AdamW alone, to find a number of steps in which it trains and that two cores can afford.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.models import ViT, mlp
from benchmarks.common.workloads import Batch
from benchmarks.default_mode.development import held_out
from benchmarks.default_mode.problem import Problem, ScoreFn, StudyTask
from benchmarks.time_to_target.tasks import Data, cifar10, cross_entropy, draws, shakespeare, squared_error
from examples.char_gpt import initialise_

CPU = torch.device("cpu")


def problem(data: Data, model: Callable[[], nn.Module], measure: Callable[[Tensor, Tensor], Tensor]) -> Problem:
    """Train and score by the same ``measure`` of outputs and targets."""

    def loss(network: nn.Module, generator: torch.Generator) -> Tensor:
        inputs, targets = data.draw(generator)
        return measure(network(inputs), targets)

    return Problem(model, loss, held_out(data.validation, measure), held_out(data.test, measure))


def shuffled(inputs: Tensor, targets: Tensor, held_out_rows: int, batch_size: int) -> Data:
    """Split the rows of a data set at random, the same way every time.

    Args:
        inputs: one row per sample.
        targets: as many rows.
        held_out_rows: of the validation split, and as many of the test split; the others train.
        batch_size: of the training batches.
    """
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    validation, test, train = order.tensor_split((held_out_rows, 2 * held_out_rows))
    return Data(
        draws(inputs[train], targets[train], batch_size),
        (inputs[validation], targets[validation]),
        (inputs[test], targets[test]),
    )


def grey_photograph(name: str) -> Tensor:
    """One of scikit-learn's two sample photographs in grey, ``[427, 640]`` in 0..1."""
    from sklearn.datasets import load_sample_image

    pixels: Tensor = torch.tensor(load_sample_image(name)).float().mean(2) / 255
    return pixels


# ── siren ──

FREQUENCY = 15.0


class Sine(nn.Module):
    """``sin(15 x)``, the activation of a SIREN (Sitzmann et al. 2020, arXiv:2006.09661)."""

    def forward(self, x: Tensor) -> Tensor:
        return (FREQUENCY * x).sin()


def siren() -> nn.Sequential:
    """A sine network from 2 coordinates in -1..1 to one value, with the initial weights of its paper."""
    network = mlp((2, 128, 128, 128, 1), Sine)
    for layer in network:
        if isinstance(layer, nn.Linear):
            width = layer.in_features
            bound = 1 / width if layer is network[0] else math.sqrt(6 / width) / FREQUENCY
            nn.init.uniform_(layer.weight, -bound, bound)
    return network


def photograph(folder: Path | None) -> Problem:
    """Every pixel of a photograph from its coordinates; pixels left out of training are the held-out splits."""
    square = grey_photograph("china.jpg")[:, 106:533]
    pixels = F.interpolate(square[None, None], (128, 128), mode="area").reshape(-1, 1)
    axis = torch.linspace(-1, 1, 128)
    data = shuffled(torch.cartesian_prod(axis, axis), 2 * pixels - 1, 1024, batch_size=512)
    return problem(data, siren, F.mse_loss)


# ── unet ──


class UNet(nn.Module):
    """A U-Net of three resolutions (Ronneberger et al. 2015, arXiv:1505.04597): ``[N, 1, H, W]`` to the same shape.

    It predicts what to take away from its input.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [convolutions(1, width), convolutions(width, 2 * width), convolutions(2 * width, 4 * width)]
        )
        self.grow = nn.ModuleList(
            [nn.ConvTranspose2d(2 * width, width, 2, stride=2), nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)]
        )
        self.up = nn.ModuleList([convolutions(2 * width, width), convolutions(4 * width, 2 * width)])
        self.head = nn.Conv2d(width, 1, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        first: Tensor = self.down[0](images)
        second: Tensor = self.down[1](F.max_pool2d(first, 2))
        x: Tensor = self.down[2](F.max_pool2d(second, 2))
        for level, skip in ((1, second), (0, first)):
            x = self.up[level](torch.cat([skip, self.grow[level](x)], dim=1))
        noise: Tensor = self.head(x)
        return images - noise


def convolutions(channels_in: int, channels_out: int) -> nn.Sequential:
    """Two 3x3 convolutions, each followed by a group norm and a SiLU."""
    parts = [
        part
        for channels in (channels_in, channels_out)
        for part in (nn.Conv2d(channels, channels_out, 3, padding=1), nn.GroupNorm(4, channels_out), nn.SiLU())
    ]
    return nn.Sequential(*parts)


def denoising(folder: Path | None) -> Problem:
    """Patches of two photographs from the same with noise; the held-out patches are from the photographs' right."""
    pixels = torch.stack([grey_photograph(name) for name in ("china.jpg", "flower.jpg")])
    pixels = (pixels - pixels.mean()) / pixels.std()
    train, *right = pixels.split((384, 128, 128), dim=2)
    reach = torch.arange(32)

    def noisy(clean: Tensor, generator: torch.Generator) -> Batch:
        return clean + 0.5 * torch.randn(clean.shape, generator=generator), clean

    def draw(generator: torch.Generator) -> Batch:
        image, top, left = (torch.randint(n, (8, 1, 1), generator=generator) for n in (2, 427 - 31, 384 - 31))
        clean = train[image, top + reach[:, None], left + reach]
        return noisy(clean[:, None], generator)

    def patches(part: Tensor, seed: int) -> Batch:
        clean = part.unfold(1, 32, 32).unfold(2, 32, 32).reshape(-1, 1, 32, 32)
        return noisy(clean, torch.Generator().manual_seed(seed))

    validation, test = (patches(part, seed) for seed, part in enumerate(right))
    return problem(Data(draw, validation, test), lambda: UNet(12), F.mse_loss)


# ── llama_bytes ──


class LlamaBlock(nn.Module):
    """Causal attention with rotary positions, then a SwiGLU, each after an RMS norm: ``[N, T, width]`` to the same."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm_mlp = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_attention(x)
        q, k, v = (part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out

    def mlp(self, normed: Tensor) -> Tensor:
        """The gated perceptron, ``[N, T, width]`` to the same."""
        out: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return out


def rotated(x: Tensor) -> Tensor:
    """Turn pairs of the numbers of ``x [..., T, d]`` by angles that grow with the position (Su et al. 2021,
    arXiv:2104.09864)."""
    cosine, sine = rotation(*x.shape[-2:])
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


@cache
def rotation(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles, each ``[length, width / 2]``."""
    angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    return angles.cos(), angles.sin()


class Llama(nn.Module):
    """A language model of bytes, built as Llama is (Touvron et al. 2023, arXiv:2302.13971): ``[N, T]`` to logits."""

    def __init__(
        self, vocabulary: int = 256, layers: int = 2, width: int = 64, block: Callable[[], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*((block or partial(LlamaBlock, width, 2, 128))() for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(initialise_)

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.token(text))))
        return logits


def python_source() -> tuple[Tensor, Tensor, Tensor]:
    """The bytes of the modules of Python's standard library: files to train on (2 MB), to validate and to test with.

    They are those of the running Python, so that scores of different versions of it do not compare.
    """
    parts, sizes = [bytearray() for _ in range(3)], (2_000_000, 400_000, 400_000)
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        growing = [part for part, size in zip(parts, sizes, strict=True) if len(part) < size]
        if not growing:
            break
        growing[0].extend(path.read_bytes())
    train, validation, test = (torch.frombuffer(one, dtype=torch.uint8).long() for one in parts)
    return train, validation, test


def windows_of_64(parts: Sequence[Tensor], n_held_out: int) -> Data:
    """Tokens and those after them, in batches of eight windows.

    Args:
        parts: to train on, to validate and to test with.
        n_held_out: windows of each of the latter two.
    """
    train, *right = parts
    reach = torch.arange(65)

    def windows(text: Tensor, starts: Tensor) -> Batch:
        window = text[starts[:, None] + reach]
        return window[:, :-1], window[:, 1:]

    def draw(generator: torch.Generator) -> Batch:
        return windows(train, torch.randint(len(train) - 64, (8,), generator=generator))

    validation, test = (windows(text, torch.linspace(0, len(text) - 65, n_held_out).long()) for text in right)
    return Data(draw, validation, test)


def source_code(folder: Path | None) -> Problem:
    """The next byte of Python's standard library, in windows of 64."""
    return problem(windows_of_64(python_source(), 128), Llama, cross_entropy)


# ── lstm ──


class CharLSTM(nn.Module):
    """One recurrent layer between an embedding and a linear head: characters ``[N, T]`` to logits ``[N, T, 65]``."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.token = nn.Embedding(65, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 65)

    def forward(self, characters: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.token(characters))[0])
        return logits


# ── vit, tabular, sequences ──


def images(folder: Path | None) -> Problem:
    """10,000 images of CIFAR-10, shifted and mirrored at random."""
    return problem(cifar10(10_000, 1000)(folder, 32, CPU), lambda: ViT(2, 64, 4), cross_entropy)


def characters(folder: Path | None) -> Problem:
    """The next character of tiny Shakespeare, in windows of 64."""
    return problem(shakespeare(64, 128)(folder, 16, CPU), CharLSTM, cross_entropy)


def friedman(folder: Path | None) -> Problem:
    """Friedman's first regression problem with noise, standardised: 5 of its 10 inputs matter."""
    from sklearn.datasets import make_friedman1

    inputs, targets = map(torch.Tensor, make_friedman1(12_000, n_features=10, noise=1.0, random_state=0))
    data = shuffled(2 * inputs - 1, ((targets - targets.mean()) / targets.std())[:, None], 1000, batch_size=64)
    return problem(data, batch_norm_network, squared_error)


def batch_norm_network() -> nn.Sequential:
    """Four ReLU layers of 128, each with a batch norm, from 10 numbers to 1."""
    return mlp((10, 128, 128, 128, 128, 1), NormThenReLU128)


class NormThenReLU128(nn.Sequential):
    """A batch norm of 128 channels and a ReLU."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(128), nn.ReLU())


class PixelTransformer(nn.Module):
    """A post-norm transformer encoder without dropout: 64 grey levels in 0..16, ``[N, 64]``, to logits ``[N, 10]``."""

    def __init__(self, layers: int = 2, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.level = nn.Embedding(17, width)
        self.position = nn.Embedding(64, width)
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True) for _ in range(layers))
        )
        self.head = nn.Linear(width, 10)

    def forward(self, levels: Tensor) -> Tensor:
        x = self.blocks(self.level(levels) + self.position(torch.arange(64)))
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


def pixel_sequences(folder: Path | None) -> Problem:
    """Handwritten digits of 8x8 pixels as sequences of 64 grey levels."""
    from sklearn.datasets import load_digits

    levels, labels = map(torch.tensor, load_digits(return_X_y=True))
    return problem(shuffled(levels.long(), labels, 360, batch_size=32), PixelTransformer, cross_entropy)


# ── burgers ──


def burgers_solution(x: numpy.ndarray, t: numpy.ndarray, viscosity: float, nodes: int = 200) -> numpy.ndarray:
    """Burgers' equation ``u_t + u u_x = ν u_xx`` from ``u(0, x) = -sin(πx)``, zero at x = -1 and 1.

    The Cole-Hopf transform makes it the heat equation, whose solution is an integral over a Gaussian (Basdevant et al.
    1986, Computers & Fluids 14, equation 2.5); here by Gauss-Hermite quadrature.

    Args:
        x: places in -1..1, float64.
        t: times, of the same shape.
        viscosity: ν.
        nodes: of the quadrature.

    Returns:
        The values of u, in the shape of ``x``.
    """
    z, weights = numpy.polynomial.hermite.hermgauss(nodes)
    y = x[..., None] - numpy.sqrt(4 * viscosity * t)[..., None] * z
    exponent = -numpy.cos(numpy.pi * y) / (2 * numpy.pi * viscosity)
    density = weights * numpy.exp(exponent - exponent.max(axis=-1, keepdims=True))
    values: numpy.ndarray = -(density * numpy.sin(numpy.pi * y)).sum(-1) / density.sum(-1)
    return values


def burgers(folder: Path | None, viscosity: float = 0.05) -> Problem:
    """Burgers' equation, see `burgers_solution`: squared residuals inside, plus squared errors at the start and the
    borders. Scores are relative L2 errors on a grid, half of it each, as of a chessboard's colours."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        inside = torch.rand(512, 2, generator=generator)
        inside[:, 0] = 2 * inside[:, 0] - 1
        inside.requires_grad_()
        start, border = torch.rand(2, 64, generator=generator)
        start = 2 * start - 1
        side = 2.0 * (torch.arange(64) % 2) - 1
        points = torch.cat([torch.stack([start, torch.zeros(64)], 1), torch.stack([side, border], 1)])
        known = torch.cat([-torch.sin(math.pi * start), torch.zeros(64)])
        # One call of the network, so that each layer is used once.
        values = model(torch.cat([inside, points]))[:, 0]
        u = values[:512]
        (first,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
        u_x, u_t = first.unbind(1)
        u_xx = torch.autograd.grad(u_x.sum(), inside, create_graph=True)[0][:, 0]
        residual = u_t + u * u_x - viscosity * u_xx
        total: Tensor = residual.square().mean() + 10 * (values[512:] - known).square().mean()
        return total

    x, t = numpy.meshgrid(numpy.linspace(-1, 1, 129), numpy.linspace(0.01, 1, 100), indexing="ij")
    grid = torch.tensor(numpy.stack([x, t], axis=-1), dtype=torch.float32)
    true = torch.tensor(burgers_solution(x, t, viscosity), dtype=torch.float32)
    black = torch.tensor(numpy.indices(x.shape).sum(0) % 2 == 1)

    def error(half: Tensor) -> ScoreFn:
        @torch.no_grad()
        def score(model: nn.Module) -> float:
            return float((model(grid[half])[:, 0] - true[half]).norm() / true[half].norm())

        return score

    return Problem(lambda: mlp((2, 40, 40, 40, 40, 1), nn.Tanh), loss, error(black), error(~black))


CONFIRMATION: Mapping[str, StudyTask] = {
    "siren": StudyTask(
        "a photograph of 128x128 pixels, sine network of 3 layers of 128, batch 512", "squared error", 2500, photograph
    ),
    "unet": StudyTask("noisy patches of photographs, U-Net of width 12, batch 8", "squared error", 250, denoising),
    "vit": StudyTask(
        "10,000 images of CIFAR-10, ViT, 2 layers, width 64, batch 32", "cross-entropy", 200, images, decay=1e-4
    ),
    "llama_bytes": StudyTask(
        "bytes of Python's library, Llama, 2 layers, width 64, 8 windows of 64", "cross-entropy", 2500, source_code,
        decay=1e-4, per_position=True, facts={"damping_of_rare_tokens": 1},
    ),
    "tabular": StudyTask(
        "Friedman's regression, ReLU network of 4 layers of 128 with batch norms, batch 64", "squared error", 2000,
        friedman,
    ),
    "lstm": StudyTask(
        "tiny Shakespeare, LSTM of width 128, 16 windows of 64", "cross-entropy", 500, characters, decay=1e-4,
        per_position=True, facts={"recurrent_curvature": 1},
    ),
    "sequences": StudyTask(
        "digits as sequences of 64 pixels, post-norm transformer, 2 layers, width 48, batch 32", "cross-entropy", 300,
        pixel_sequences,
    ),
    "burgers": StudyTask(
        "Burgers' equation, viscosity 0.05, tanh network of 4 layers of 40", "relative error", 1200, burgers
    ),
}  # fmt: skip
