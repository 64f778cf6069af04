"""ResNet-18 in the form usual for 32x32 images, and the ResNet-50 of ImageNet."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def convolution(channels_in: int, channels_out: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without a bias: batch norm follows, and has a shift of its own."""
    return nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding=kernel_size // 2, bias=False)


class Block(nn.Module):
    """``residual`` beside a shortcut: ``[N, channels_in, H, W]`` to ``[N, channels_out, H/stride, W/stride]``.

    The shortcut is the identity, or a 1x1 convolution with batch norm where the shape changes.
    """

    def __init__(self, residual: nn.Sequential, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                convolution(channels_in, channels_out, 1, stride), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


def basic_block(channels_in: int, channels_out: int, stride: int) -> Block:
    """Two 3x3 convolutions."""
    residual = nn.Sequential(
        convolution(channels_in, channels_out, 3, stride),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
        convolution(channels_out, channels_out, 3),
        nn.BatchNorm2d(channels_out),
    )
    return Block(residual, channels_in, channels_out, stride)


def bottleneck(channels_in: int, channels_out: int, stride: int) -> Block:
    """A 3x3 convolution on a quarter of the channels, between two 1x1; the stride is in the 3x3 (version 1.5)."""
    inner = channels_out // 4
    residual = nn.Sequential(
        convolution(channels_in, inner, 1),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        convolution(inner, inner, 3, stride),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        convolution(inner, channels_out, 1),
        nn.BatchNorm2d(channels_out),
    )
    return Block(residual, channels_in, channels_out, stride)


def four_stages(
    block: Callable[[int, int, int], Block], channels_in: int, channels: int, depths: Sequence[int]
) -> nn.Sequential:
    """``depths`` blocks in a row; each stage but the first halves height and width, and doubles ``channels``."""
    blocks = []
    for stage, depth in enumerate(depths):
        for index in range(depth):
            channels_out = channels * 2**stage
            blocks.append(block(channels_in, channels_out, 2 if stage > 0 and index == 0 else 1))
            channels_in = channels_out
    return nn.Sequential(*blocks)


class ResNet(nn.Module):
    """``stem``, ``stages``, the mean over the image, and a linear layer: ``[N, 3, H, W]`` to ``[N, num_classes]``."""

    def __init__(self, stem: nn.Sequential, stages: nn.Sequential, channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = stages
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.stages(self.stem(images)).mean(dim=(2, 3))
        logits: Tensor = self.head(pooled)
        return logits


class ResNet18(ResNet):
    """``[N, 3, 32, 32]`` to logits ``[N, num_classes]``; 11,173,962 parameters at ``width`` 64 and 10 classes.

    A 3x3 stem, no pooling before the stages.

    Args:
        width: channels of the first stage; the four stages have ``width, 2 width, 4 width, 8 width``.
        num_classes: length of the logits.
    """

    def __init__(self, width: int = 64, num_classes: int = 10) -> None:
        stem = nn.Sequential(convolution(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        super().__init__(stem, four_stages(basic_block, width, width, (2, 2, 2, 2)), 8 * width, num_classes)


class ResNet50(ResNet):
    """``[N, 3, 224, 224]`` to logits ``[N, num_classes]``; 25,557,032 parameters at ``width`` 64 and 1000 classes.

    Args:
        width: channels of the stem, a quarter of the first stage's.
        num_classes: length of the logits.
    """

    def __init__(self, width: int = 64, num_classes: int = 1000) -> None:
        stem = nn.Sequential(
            convolution(3, width, 7, stride=2),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        super().__init__(stem, four_stages(bottleneck, width, 4 * width, (3, 4, 6, 3)), 32 * width, num_classes)
