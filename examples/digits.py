"""Handwritten digits, 8x8 pixels (scikit-learn ships them, so nothing is downloaded), and a small network for them."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.batches import Batch, batch_loader


class DigitsData(L.LightningDataModule):
    """The 1,797 images of ``sklearn.datasets.load_digits``: 1,077 to train on, 360 to validate with, 360 to test with.

    A batch is ``(images [N, 1, 8, 8] in 0..1, labels [N] in 0..9)``. The last training batch may be smaller.

    Args:
        batch_size: images per batch.
        split_seed: decides which images are held out, and nothing else; classes keep their shares (stratified).

    Raises:
        ImportError: scikit-learn is missing.
    """

    def __init__(self, batch_size: int = 64, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.split_seed = split_seed

    def setup(self, stage: str | None = None) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("DigitsData needs scikit-learn: pip install 'lightning-thor[examples]'") from error
        pixels, labels = load_digits(return_X_y=True)  # [1797, 64] in 0..16, [1797]
        rest, test = train_test_split(
            range(len(labels)), test_size=360, random_state=self.split_seed, stratify=labels, shuffle=True
        )
        train, val = train_test_split(
            rest, test_size=360, random_state=self.split_seed, stratify=labels[rest], shuffle=True
        )
        images = torch.tensor(pixels, dtype=torch.float32).div_(16).reshape(-1, 1, 8, 8)
        classes = torch.tensor(labels, dtype=torch.int64)
        self.train: Batch = (images[train], classes[train])
        self.val: Batch = (images[val], classes[val])
        self.test: Batch = (images[test], classes[test])

    def train_dataloader(self) -> DataLoader[Batch]:
        return batch_loader(*self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return batch_loader(*self.val, batch_size=360, shuffle=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        return batch_loader(*self.test, batch_size=360, shuffle=False)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()


class DigitsNet(nn.Module):
    """Three 3x3 convolutions with batch norm, and a linear head: ``[N, 1, 8, 8]`` to logits ``[N, num_classes]``.

    Args:
        width: channels of the first convolution; the other two have twice as many.
        num_classes: length of the logits.
    """

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *convolution(1, width),
            *convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *convolution(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * width * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    """A 3x3 convolution that keeps the size, batch norm and ReLU."""
    # Batch norm has a shift of its own, so a bias would be lost in it.
    return (
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )
