"""CIFAR-10 from two parquet files, decoded once, kept in memory as bytes, augmented batch by batch."""

import io
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from examples.batches import Batch, batch_loader
from examples.images import normalise, random_crop_and_flip

# Per channel, over the training images, in 0..1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class CIFAR10Data(L.LightningDataModule):
    """CIFAR-10: the last 5,000 rows of ``train.parquet`` validate, the rows before them train, ``test.parquet`` tests.

    A batch is ``(images [N, 3, 32, 32] float32, normalised per channel, labels [N] in 0..9)`` once it has passed
    ``on_after_batch_transfer``; the data loaders themselves hand out uint8 images, a quarter of the bytes to move.

    Args:
        root: folder that holds ``train.parquet`` and ``test.parquet``, each with the columns ``img`` (a struct with the
            encoded image in its field ``bytes``) and ``label``: the layout of ``uoft-cs/cifar10`` on the HF hub.
        batch_size: images per batch; the last training batch may be smaller.
        subset: take only that many training images (at most 45,000), the first ones; None takes all.
        val_subset: the same for validation (at most 5,000).
        test_subset: the same for the test (at most 10,000).
        augment: random crops after 4 pixels of padding, and random flips, in training only.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: pyarrow or Pillow is missing.
        ValueError: a subset is larger than what there is.
    """

    val_rows = 5_000

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        subset: int | None = None,
        val_subset: int | None = None,
        test_subset: int | None = None,
        augment: bool = True,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.batch_size = batch_size
        self.subset = subset
        self.val_subset = val_subset
        self.test_subset = test_subset
        self.augment = augment

    def setup(self, stage: str | None = None) -> None:
        if stage in ("fit", "validate", None) and not hasattr(self, "val"):
            path = self.root / "train.parquet"
            held_out = number_of_rows(path) - self.val_rows
            self.train: Batch = read_images(path, 0, rows_to_take("subset", self.subset, held_out))
            self.val: Batch = read_images(path, held_out, rows_to_take("val_subset", self.val_subset, self.val_rows))
        if stage in ("test", "predict", None) and not hasattr(self, "test"):
            path = self.root / "test.parquet"
            rows = number_of_rows(path)
            self.test: Batch = read_images(path, 0, rows_to_take("test_subset", self.test_subset, rows))

    def train_dataloader(self) -> DataLoader[Batch]:
        return batch_loader(*self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return batch_loader(*self.val, batch_size=500, shuffle=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        return batch_loader(*self.test, batch_size=500, shuffle=False)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment and normalise where the batch already is: on the accelerator, if there is one."""
        images, labels = batch
        if self.augment and self.trainer is not None and self.trainer.training:
            images = random_crop_and_flip(images)
        return normalise(images, MEAN, STD), labels


def rows_to_take(option: str, asked: int | None, available: int) -> int:
    """``asked``, or all that are ``available`` where it is None."""
    if asked is None:
        return available
    if not 1 <= asked <= available:
        raise ValueError(f"CIFAR10Data: {option} must be None or 1..{available}, the images there are; got {asked}.")
    return asked


def number_of_rows(path: Path) -> int:
    """Rows of a parquet file, read from its footer."""
    return int(open_parquet(path).metadata.num_rows)


def read_images(path: Path, first: int, count: int) -> Batch:
    """Decode the rows ``first .. first + count`` of ``path``: uint8 ``[count, 3, 32, 32]`` and int64 ``[count]``."""
    try:
        import numpy
        from PIL import Image
    except ImportError as error:
        raise ImportError("CIFAR10Data needs Pillow: pip install 'lightning-thor[examples]'") from error
    table = open_parquet(path).read(columns=["img", "label"]).slice(first, count)
    decoded = [
        numpy.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table["img"].to_pylist()
    ]
    images = torch.from_numpy(numpy.stack(decoded)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(table["label"].to_pylist(), dtype=torch.int64)


def open_parquet(path: Path):  # type: ignore[no-untyped-def]  # pyarrow has no types
    """``path`` as a ``pyarrow.parquet.ParquetFile``, or an error that says what to do."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError("CIFAR10Data needs pyarrow: pip install 'lightning-thor[examples]'") from error
    if not path.is_file():
        raise FileNotFoundError(
            f"CIFAR10Data found no file {path}. Put train.parquet and test.parquet of the data set uoft-cs/cifar10 "
            "(Hugging Face hub; rename its two files to these names) into one folder, and give that folder: "
            "--data.root FOLDER on the command line, CIFAR10Data(root=FOLDER) in Python."
        )
    return ParquetFile(path)
