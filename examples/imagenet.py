"""ImageNet, or any other folder of images, read with Pillow."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.batches import Batch
from examples.images import middle_box, normalise, random_box

# Per channel, over ImageNet's training images, in 0..1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png")


class ImageFolderData(L.LightningDataModule):
    """Images in ``root/train/<class>/`` and ``root/val/<class>/``, as .jpg, .jpeg or .png (``.JPEG`` too).

    A batch is ``(images [N, 3, size, size] float32, normalised per channel, labels [N])`` once it has passed
    ``on_after_batch_transfer``; the data loaders themselves hand out uint8 images. A label is the place of the class
    among the sorted folders of ``root/train``.

    Args:
        root: folder that holds ``train`` and ``val``.
        batch_size: images per batch, on each device; the training batches that would be smaller are left out.
        size: of the images, in pixels. Training takes a random part of each image, mirrored or not; validation the
            middle, 7/8 of the shorter edge.
        num_workers: processes that read images.

    Raises:
        FileNotFoundError: there are no images.
        ImportError: Pillow is missing.
        ValueError: a class of ``val`` is not in ``train``.
    """

    def __init__(self, root: str, batch_size: int = 32, size: int = 224, num_workers: int = 0) -> None:
        super().__init__()
        self.root = Path(root)
        self.batch_size = batch_size
        self.size = size
        self.num_workers = num_workers

    def setup(self, stage: str | None = None) -> None:
        self.classes = folders_in(self.root / "train")
        unknown = sorted({*folders_in(self.root / "val")} - {*self.classes})
        if unknown:
            raise ValueError(f"{self.root / 'val'} has classes that {self.root / 'train'} has not: {unknown[:5]}.")
        self.train = ImageFolder(self.root / "train", self.classes, self.size, is_random=True)
        self.val = ImageFolder(self.root / "val", self.classes, self.size, is_random=False)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.train, shuffle=True, drop_last=len(self.train) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.val, shuffle=False, drop_last=False)

    def loader(self, images: "ImageFolder", shuffle: bool, drop_last: bool) -> DataLoader[Any]:
        """Batches of ``images``, read by ``num_workers`` processes that stay for all epochs."""
        return DataLoader(
            images,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise where the batch already is: on the accelerator, if there is one."""
        images, labels = batch
        return normalise(images, MEAN, STD), labels


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Every image of ``folder/<class>/`` as uint8 ``[3, size, size]``, and the place of its class in ``classes``."""

    def __init__(self, folder: Path, classes: list[str], size: int, is_random: bool) -> None:
        self.files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).glob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise FileNotFoundError(f"{folder} has no image in its folders: no file named *.jpg, *.jpeg or *.png.")
        self.size = size
        self.is_random = is_random

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            import numpy
            from PIL import Image
        except ImportError as error:
            raise ImportError("ImageFolderData needs Pillow: pip install 'lightning-thor[examples]'") from error
        with Image.open(path) as file:
            image = file.convert("RGB")
        box = random_box(*image.size) if self.is_random else middle_box(*image.size)
        resized = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.from_numpy(numpy.array(resized)).permute(2, 0, 1)
        if self.is_random and torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        return pixels.contiguous(), label


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(
            f"ImageFolderData found no folder of images in {folder}. Give the folder that holds train/<class>/*.jpg "
            "and val/<class>/*.jpg: --data.root FOLDER on the command line, ImageFolderData(root=FOLDER) in Python."
        )
    return names
