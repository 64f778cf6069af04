"""Networks that only the benchmarks need; the others are those of the examples."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.char_gpt import Block, CharGPT
from examples.resnet import ResNet, basic_block, bottleneck, convolution, four_stages


def mlp(widths: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers from each of ``widths`` to the next, with ``activation`` between them.

    >>> [type(part).__name__ for part in mlp((4, 3, 2))]
    ['Linear', 'ReLU', 'Linear']
    """
    parts = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), activation())]
    return nn.Sequential(*parts[:-1])


def stem(width: int) -> nn.Sequential:
    """The first layers of a ResNet for 32x32 images."""
    return nn.Sequential(convolution(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def small_resnet(width: int, blocks_per_stage: int = 1) -> ResNet:
    """Three stages of basic blocks, for 32x32 images (He et al. 2016, arXiv:1512.03385, section 4.2): in all
    ``6 * blocks_per_stage + 2`` layers."""
    return ResNet(stem(width), four_stages(basic_block, width, width, 3 * (blocks_per_stage,)), 4 * width, 10)


def resnet50(width: int) -> ResNet:
    """The stages of ResNet-50 behind a 3x3 stem, for 32x32 images; ``width`` is 64 in ResNet-50 itself."""
    return ResNet(stem(width), four_stages(bottleneck, width, 4 * width, (3, 4, 6, 3)), 32 * width, 10)


def imagenet_resnet18() -> ResNet:
    """ResNet-18 for images of 224x224 and 1,000 classes (He et al. 2016, arXiv:1512.03385, table 1).

    >>> sum(p.numel() for p in imagenet_resnet18().parameters())
    11689512
    """
    first = nn.Sequential(
        convolution(3, 64, 7, stride=2), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
    )
    return ResNet(first, four_stages(basic_block, 64, 64, (2, 2, 2, 2)), 512, 1000)


def gpt2(vocab_size: int = 50257, context: int = 1024, width: int = 768, layers: int = 12, heads: int = 12) -> CharGPT:
    """GPT-2 small, with the output layer tied to the token embedding (Radford et al. 2019).

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in gpt2().parameters())
    124439808
    """
    model = CharGPT(vocab_size=vocab_size, context=context, width=width, layers=layers, heads=heads)
    model.head.weight = model.token.weight
    return model


class OpenBlock(Block):
    """A transformer block without a causal mask."""

    def attend(self, x: Tensor) -> Tensor:
        """Mix all positions of ``x`` ``[N, T, width]``; returns the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class ViT(nn.Module):
    """A vision transformer on patches of 4x4: ``[N, 3, 32, 32]`` to logits ``[N, 10]`` of the mean over positions."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.position = nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(OpenBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.position(torch.arange(64, device=images.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(dim=1))
        return logits
