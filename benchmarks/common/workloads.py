"""Networks with batches of random numbers, for benchmarks whose figures do not depend on data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""


@dataclass(frozen=True)
class Workload:
    """A network that returns logits, classes last, and its batches."""

    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    words: str
    """Description for tables."""
    per_position: bool = False
    """Whether the loss is a mean over positions as well as samples."""


def images(count: int, size: int = 32, classes: int = 10) -> Callable[[], Batch]:
    """Batches of ``count`` square images, ``[count, 3, size, size]``, and their classes ``[count]``."""
    return lambda: (torch.randn(count, 3, size, size), torch.randint(classes, (count,)))


def rows(count: int, width: int) -> Callable[[], Batch]:
    """Batches of vectors, ``[count, width]``, and their classes ``[count]``, of ten."""
    return lambda: (torch.randn(count, width), torch.randint(10, (count,)))


def tokens(windows: int, context: int, vocab_size: int = 65) -> Callable[[], Batch]:
    """Batches of token windows and of the tokens to predict, both ``[windows, context]``."""
    return lambda: (torch.randint(vocab_size, (windows, context)), torch.randint(vocab_size, (windows, context)))
