"""Confirmation tasks named after the first confirmation, see README.md: before their own, nothing was tried on them but
AdamW, and on the experts nothing at all."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.models import mlp
from benchmarks.common.workloads import Batch
from benchmarks.default_mode.confirmation import (
    CPU,
    Llama,
    LlamaBlock,
    problem,
    python_source,
    shuffled,
    windows_of_64,
)
from benchmarks.default_mode.problem import Problem, ScoreFn, StudyTask
from benchmarks.time_to_target.tasks import Data, cifar10, cross_entropy, draws, shakespeare
from lightning_thor import register_layer


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 digits: pixels ``[1797, 64]`` in -1..1 and labels ``[1797]``."""
    from sklearn.datasets import load_digits

    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    return pixels.float() / 8 - 1, labels


# ── mixer ──


class MixerBlock(nn.Module):
    """Mixes positions, then channels, each after a layer norm: ``[N, 64, width]`` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.positions = mlp((64, 64, 64), nn.GELU)
        self.channels = mlp((width, 2 * width, width), nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(self.norms[0](x).mT).mT
        mixed: Tensor = x + self.channels(self.norms[1](x))
        return mixed


class Mixer(nn.Module):
    """An MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601) on patches of 4x4: ``[N, 3, 32, 32]`` to logits."""

    def __init__(self, layers: int = 2, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.blocks = nn.Sequential(*(MixerBlock(width) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.patches(images).flatten(2).mT).mean(dim=1))
        return logits


def mixed_images(folder: Path | None) -> Problem:
    """10,000 images of CIFAR-10, shifted and mirrored at random."""
    return problem(cifar10(10_000, 1000)(folder, 32, CPU), Mixer, cross_entropy)


# ── diffusion ──


def diffusion(folder: Path | None) -> Problem:
    """The noise in digits that were mixed with noise at random angles (as the cosine schedule of Nichol & Dhariwal
    2021, arXiv:2102.09672, has them), by a SiLU network that is told the angle."""
    pixels, _ = digits()
    data = shuffled(pixels, torch.zeros(len(pixels)), 360, batch_size=128)

    def mixed(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        angle = torch.rand(len(clean), 1, generator=generator) * math.pi / 2
        noise = torch.randn(clean.shape, generator=generator)
        told = torch.cat([angle.cos(), angle.sin()], dim=1)
        return torch.cat([angle.cos() * clean + angle.sin() * noise, told], dim=1), noise

    def held_out(part: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        return mixed(part.repeat(4, 1), torch.Generator().manual_seed(seed))

    noisy = Data(
        lambda generator: mixed(data.draw(generator)[0], generator),
        held_out(data.validation[0], 0),
        held_out(data.test[0], 1),
    )
    return problem(noisy, lambda: mlp((66, 256, 256, 256, 64), nn.SiLU), F.mse_loss)


# ── contrast ──


class TwoTowers(nn.Module):
    """Upper and lower halves of digits, ``[N, 64]``, to cosines of all pairs times a learnt scale, ``[N, N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = (mlp((32, 128, 128, 32)) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels: Tensor) -> Tensor:
        upper, lower = self.upper(pixels[:, :32]), self.lower(pixels[:, 32:])
        return self.log_scale.exp() * F.normalize(upper, dim=1) @ F.normalize(lower, dim=1).T


def contrast(folder: Path | None) -> Problem:
    """Which lower half belongs to which upper one, among 128: contrastive learning as in CLIP (Radford et al. 2021,
    arXiv:2103.00020). Scores are losses on the first 256 held-out digits in twos of 128."""
    data = shuffled(*digits(), 360, batch_size=128)

    def measure(cosines: Tensor) -> Tensor:
        own = torch.arange(len(cosines))
        return (F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own)) / 2

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        return measure(model(data.draw(generator)[0]))

    def held_out(pixels: Tensor) -> ScoreFn:
        @torch.no_grad()
        def score(model: nn.Module) -> float:
            return sum(float(measure(model(part))) for part in pixels[:256].split(128)) / 2

        return score

    return Problem(TwoTowers, loss, held_out(data.validation[0]), held_out(data.test[0]))


# ── deep ──


def deep(folder: Path | None) -> Problem:
    """Digits, by twelve ReLU layers of 64 with torch's initial weights, no norm and no shortcut; scores are training
    losses, since it is there to be fitted."""
    pixels, labels = digits()

    def part(start: int) -> tuple[Tensor, Tensor]:
        return pixels[start : start + 800], labels[start : start + 800]

    return problem(Data(draws(pixels, labels, 64), part(0), part(800)), lambda: mlp((64,) * 13 + (10,)), cross_entropy)


# ── experts ──


class Experts(nn.Module):
    """Gated perceptrons, of which each row of ``[n, width]`` takes two; their matrices are three parameters."""

    def __init__(self, n_experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, n_experts, bias=False)
        self.gate, self.up = (nn.Parameter(torch.empty(n_experts, inner, width)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(n_experts, width, inner))
        for stack in (self.gate, self.up, self.down):
            nn.init.normal_(stack, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            own = x[rows]
            mixed = F.linear(F.silu(F.linear(own, gate)) * F.linear(own, up), down)
            out = out.index_add(0, rows, mixed * shares[rows, places, None])
        return out


register_layer(Experts, matrices="out_in")


class MixtureBlock(LlamaBlock):
    """As Llama's, with experts in place of the perceptron."""

    def __init__(self, width: int, heads: int, n_experts: int, inner: int) -> None:
        super().__init__(width, heads, inner)
        del self.gate, self.up, self.down
        self.experts = Experts(n_experts, width, inner)

    def mlp(self, normed: Tensor) -> Tensor:
        out: Tensor = self.experts(normed.flatten(0, 1)).view_as(normed)
        return out


def mixture(folder: Path | None) -> Problem:
    """The next character of tiny Shakespeare, in windows of 64, by a language model built as Mixtral is (Jiang et al.
    2024, arXiv:2401.04088), without a loss that balances the experts."""
    model = partial(Llama, 65, block=lambda: MixtureBlock(64, 2, 8, 96))
    return problem(shakespeare(64, 128)(folder, 16, CPU), model, cross_entropy)


# ── words, vectors ──

N_WORDS = 4096


@cache
def python_words() -> tuple[Tensor, Tensor, Tensor]:
    """Names, numbers, signs and line breaks of Python's standard library: what to train on, to validate and to test
    with. The most frequent ones have numbers of their own, all others share 0."""
    parts = [
        re.findall(r"\w+|[^\w\s]|\n", bytes(part.to(torch.uint8).numpy()).decode(errors="ignore"))
        for part in python_source()
    ]
    number = {word: 1 + place for place, (word, _) in enumerate(Counter(parts[0]).most_common(N_WORDS - 1))}
    train, validation, test = (torch.tensor([number.get(word, 0) for word in part]) for part in parts)
    return train, validation, test


class TiedLlama(Llama):
    """Its output layer is its table of words."""

    def __init__(self) -> None:
        super().__init__(N_WORDS)
        self.head.weight = self.token.weight


def words(folder: Path | None) -> Problem:
    """The next word of Python's standard library, in windows of 64."""
    return problem(windows_of_64(python_words(), 64), TiedLlama, cross_entropy)


class WordVectors(nn.Module):
    """Two tables: words ``[N]`` and others ``[N, k]`` to logits ``[N, k]`` that these are near those."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.word, self.other = nn.Embedding(N_WORDS, width), nn.Embedding(N_WORDS, width)
        nn.init.uniform_(self.word.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.other.weight)

    def forward(self, words: Tensor, others: Tensor) -> Tensor:
        out: Tensor = (self.other(others) @ self.word(words)[:, :, None])[..., 0]
        return out


def vectors(folder: Path | None) -> Problem:
    """Which of six words comes next: skip-grams with negative samples (Mikolov et al. 2013, arXiv:1310.4546), here from
    the words as often as they are. The score is of fixed negative samples."""
    train, validation, test = python_words()

    def draw(text: Tensor, starts: Tensor, generator: torch.Generator) -> Batch:
        drawn = train[torch.randint(len(train), (len(starts), 5), generator=generator)]
        return text[starts], torch.cat([text[starts + 1, None], drawn], dim=1)

    def measure(logits: Tensor) -> Tensor:
        return -(F.logsigmoid(logits[:, 0]) + F.logsigmoid(-logits[:, 1:]).sum(1)).mean()

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        return measure(model(*draw(train, torch.randint(len(train) - 1, (256,), generator=generator), generator)))

    def held_out(text: Tensor) -> ScoreFn:
        batch = draw(text, torch.arange(0, len(text) - 1, len(text) // 8192), torch.Generator().manual_seed(0))

        @torch.no_grad()
        def score(model: nn.Module) -> float:
            return float(measure(model(*batch)))

        return score

    return Problem(WordVectors, loss, held_out(validation), held_out(test))


LATER_CONFIRMATION: Mapping[str, StudyTask] = {
    "mixer": StudyTask(
        "10,000 images of CIFAR-10, MLP-Mixer, 2 layers, width 64, batch 32", "cross-entropy", 300, mixed_images,
        decay=1e-4,
    ),
    "diffusion": StudyTask(
        "denoising diffusion of digits, SiLU network of 3 layers of 256, batch 128", "squared error", 1500, diffusion
    ),
    "contrast": StudyTask("halves of digits, two ReLU towers, InfoNCE among 128", "cross-entropy", 200, contrast),
    "deep": StudyTask("digits, 12 ReLU layers of 64 without norms, batch 64", "training loss", 1500, deep),
    "experts": StudyTask(
        "tiny Shakespeare, 2 layers, width 64, two of 8 experts, 16 windows of 64", "cross-entropy", 500, mixture,
        decay=1e-4, per_position=True,
    ),
    "words": StudyTask(
        "words of Python's library, Llama, 2 layers, width 64, a tied table of 4,096 words, 8 windows of 64",
        "cross-entropy", 600, words, decay=1e-4, per_position=True, facts={"damping_of_rare_tokens": 1},
    ),
    "vectors": StudyTask(
        "skip-grams of Python's library, two tables of 4,096 words, width 32, batch 256", "logistic loss", 2000,
        vectors, facts={"damping_of_rare_tokens": 1},
    ),
}  # fmt: skip
