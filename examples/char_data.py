"""Windows of a text, character by character."""

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from examples.batches import Batch, read_text


class CharData(L.LightningDataModule):
    """Windows of a text, character by character: the first 90 % of it train, the next 5 % validate, the last 5 % test.

    A batch is ``(characters [N, context], next characters [N, context])``, int64 numbers of the sorted symbols of the
    text. Every epoch draws new training windows, decided by ``seed`` and the number of the epoch alone, so a resumed
    run sees the windows that an unbroken one would. Validation windows are always the same, evenly spaced.

    Args:
        root: a text file (UTF-8), or a folder that holds ``input.txt``.
        context: characters per window.
        batch_size: windows per batch.
        steps_per_epoch: training batches per epoch (on every rank).
        val_windows: validation windows, and as many test windows.
        seed: decides the training windows.

    Raises:
        FileNotFoundError: there is no such text.
        ValueError: the text is too short for one window.
    """

    def __init__(
        self,
        root: str,
        context: int = 128,
        batch_size: int = 16,
        steps_per_epoch: int = 300,
        val_windows: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.context = context
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.val_windows = val_windows
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        text = read_text(self.root, "CharData")
        self.symbols = sorted(set(text))
        number = {symbol: i for i, symbol in enumerate(self.symbols)}
        characters = torch.tensor([number[symbol] for symbol in text], dtype=torch.int64)
        train, val = len(text) * 90 // 100, len(text) * 95 // 100
        self.train = Windows(characters[:train], self.context)
        self.val = Windows(characters[train:val], self.context)
        self.test = Windows(characters[val:], self.context)

    def train_dataloader(self) -> DataLoader[Batch]:
        ranks, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = RandomWindows(self.train, self.batch_size * self.steps_per_epoch, ranks, rank, self.seed)
        return DataLoader(self.train, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.evenly_spaced(self.val)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.evenly_spaced(self.test)

    def evenly_spaced(self, windows: "Windows") -> DataLoader[Batch]:
        """``val_windows`` of ``windows``, always the same ones."""
        starts = torch.linspace(0, len(windows) - 1, min(self.val_windows, len(windows))).long().tolist()
        return DataLoader(torch.utils.data.Subset(windows, starts), batch_size=self.batch_size)


class Windows(Dataset[Batch]):
    """Every window of ``context`` characters, with the window one character later."""

    def __init__(self, characters: Tensor, context: int) -> None:
        if len(characters) <= context:
            raise ValueError(
                f"A split of the text has {len(characters)} characters, a window takes context + 1 = {context + 1}. "
                "Give a longer text, or a smaller context."
            )
        self.characters = characters
        self.context = context

    def __len__(self) -> int:
        return len(self.characters) - self.context

    def __getitem__(self, start: int) -> Batch:
        window = self.characters[start : start + self.context + 1]
        return window[:-1], window[1:]


class RandomWindows(DistributedSampler[Batch]):
    """``samples_per_rank`` random starts per epoch, decided by ``seed`` and the epoch.

    A ``DistributedSampler`` even on one device: Lightning then tells it the epoch, and leaves it in place under DDP.
    """

    def __init__(self, windows: Windows, samples_per_rank: int, ranks: int, rank: int, seed: int) -> None:
        super().__init__(windows, num_replicas=ranks, rank=rank, seed=seed)
        self.number_of_windows = len(windows)
        self.samples_per_rank = samples_per_rank

    def __len__(self) -> int:
        return self.samples_per_rank

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]  # torch declares the sample, and yields its index
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        starts = torch.randint(self.number_of_windows, (self.samples_per_rank, self.num_replicas), generator=generator)
        return iter(starts[:, self.rank].tolist())
