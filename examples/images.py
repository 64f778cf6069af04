"""What happens to images before they are trained on: parts of them, mirrored, normalised."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge, in pixels."""


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``[N, 3, H, W]`` uint8 to float32, less ``mean``, divided by ``std``: both per channel, of values in 0..1."""
    shift, scale = (torch.tensor(values, device=images.device).mul_(255).reshape(1, 3, 1, 1) for values in (mean, std))
    return images.to(torch.float32).sub_(shift).div_(scale)


def random_crop_and_flip(images: Tensor, padding: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """Shift every image by up to ``padding`` pixels (black moves in), and mirror every second one on average.

    Args:
        images: ``[N, C, H, W]``, any dtype; it is not changed.
        padding: largest shift in each direction, in pixels.
        generator: source of the shifts and flips, on the device of ``images``; None is torch's own, which
            ``seed_everything`` seeds.

    Returns:
        ``[N, C, H, W]``, in the dtype of ``images``.
    """
    count, _, height, width = images.shape
    device = images.device
    shifts = torch.randint(0, 2 * padding + 1, (2, count, 1), device=device, generator=generator)
    flips = torch.rand((count, 1), device=device, generator=generator) < 0.5
    across = torch.arange(width, device=device)
    rows = shifts[0] + torch.arange(height, device=device)  # [N, H]
    columns = shifts[1] + torch.where(flips, across.flip(0), across)  # [N, W]
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(count, device=device)
    crops = padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]  # [N, H, W, C]
    return crops.permute(0, 3, 1, 2).contiguous()


def middle_box(width: int, height: int) -> Box:
    """The square in the middle whose edge is 7/8 of the shorter one: 224 of 256.

    >>> middle_box(320, 256)
    (48.0, 16.0, 272.0, 240.0)
    """
    edge = min(width, height) * 7 / 8
    left, upper = (width - edge) / 2, (height - edge) / 2
    return left, upper, left + edge, upper + edge


def random_box(width: int, height: int, generator: torch.Generator | None = None) -> Box:
    """A part of an image: 8 to 100 % of its area, from 3:4 to 4:3 in shape (Szegedy et al. 2015, arXiv:1409.4842).

    Up to ten are drawn; if none fits into the image, which only a very long one makes likely, it is the middle square.

    Args:
        width: of the image, in pixels.
        height: likewise.
        generator: source of the box; None is torch's own, which ``seed_everything`` seeds, in workers too.
    """
    draws = torch.rand((10, 4), generator=generator, dtype=torch.float64)
    for share, shape, x, y in draws.tolist():
        area = width * height * (0.08 + 0.92 * share)
        ratio = math.exp(math.log(3 / 4) + shape * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, upper = x * (width - w), y * (height - h)
            return left, upper, left + w, upper + h
    edge = min(width, height)
    left, upper = (width - edge) / 2, (height - edge) / 2
    return left, upper, left + edge, upper + edge
