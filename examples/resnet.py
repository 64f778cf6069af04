"""ResNet-18 in the form usual for 32x32 images: a 3x3 stem, no pooling before the stages."""

from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without a bias: batch norm follows, and has a shift of its own."""
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: ``[N, channels_in, H, W]`` to ``[N, channels_out, H/stride, W/stride]``.

    The shortcut is the identity, or a 1x1 convolution with batch norm where the shape changes.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv3x3(channels_in, channels_out, stride),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
            conv3x3(channels_out, channels_out),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


class ResNet18(nn.Module):
    """``[N, 3, 32, 32]`` to logits ``[N, num_classes]``; 11,173,962 parameters at ``width`` 64 and 10 classes.

    Args:
        width: channels of the first stage; the four stages have ``width, 2 width, 4 width, 8 width``.
        num_classes: length of the logits.
    """

    def __init__(self, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv3x3(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(
            BasicBlock(width, width, stride=1),
            BasicBlock(width, width, stride=1),
            BasicBlock(width, 2 * width, stride=2),
            BasicBlock(2 * width, 2 * width, stride=1),
            BasicBlock(2 * width, 4 * width, stride=2),
            BasicBlock(4 * width, 4 * width, stride=1),
            BasicBlock(4 * width, 8 * width, stride=2),
            BasicBlock(8 * width, 8 * width, stride=1),
        )
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.stages(self.stem(images)).mean(dim=(2, 3))
        logits: Tensor = self.head(pooled)
        return logits
