"""Networks that only the benchmarks need; the others are those of the examples."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.char_gpt import Block
from examples.resnet import BasicBlock, conv3x3


def mlp(widths: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers from each of ``widths`` to the next, with ``activation`` between them.

    >>> [type(part).__name__ for part in mlp((4, 3, 2))]
    ['Linear', 'ReLU', 'Linear']
    """
    parts = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), activation())]
    return nn.Sequential(*parts[:-1])


class Pool(nn.Module):
    """The mean over the positions of an image: ``[N, C, H, W]`` to ``[N, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def small_resnet(width: int, blocks_per_stage: int = 1) -> nn.Sequential:
    """Three stages of `BasicBlock`, as He et al. (2016, arXiv:1512.03385, section 4.2) have them for 32x32 images;
    ``6 * blocks_per_stage + 2`` layers."""
    blocks: list[nn.Module] = []
    channels = width
    for stage in range(3):
        for number in range(blocks_per_stage):
            out, stride = width * 2**stage, 2 if stage > 0 and number == 0 else 1
            blocks.append(BasicBlock(channels, out, stride))
            channels = out
    stem = (conv3x3(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, *blocks, Pool(), nn.Linear(channels, 10))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 beside a shortcut: ``[N, channels_in, H, W]`` to ``[N, 4 width, H/s, W/s]``."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.residual = nn.Sequential(
            nn.Conv2d(channels_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            conv3x3(width, width, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


def resnet50(width: int) -> nn.Sequential:
    """The stages of ResNet-50 behind a 3x3 stem, for 32x32 images; ``width`` is 64 in ResNet-50 itself."""
    blocks, channels = [], width
    for stage, count in enumerate((3, 4, 6, 3)):
        for number in range(count):
            blocks.append(Bottleneck(channels, width * 2**stage, 2 if stage > 0 and number == 0 else 1))
            channels = 4 * width * 2**stage
    stem = (conv3x3(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, *blocks, Pool(), nn.Linear(channels, 10))


class OpenBlock(Block):
    """A transformer block whose attention sees all positions."""

    def attend(self, x: Tensor) -> Tensor:
        """Mix all positions, ``[N, T, width]`` to the same."""
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
