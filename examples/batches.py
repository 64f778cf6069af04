"""What the data of several examples share: the text of a file, and tensors in memory as whole batches."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, ...]


class TensorBatches(TensorDataset):
    """A ``TensorDataset`` that indexes its tensors once for a batch instead of once for a sample."""

    def __getitems__(self, indices: list[int]) -> Batch:
        """The rows ``indices`` of every tensor, already stacked: ``[len(indices), ...]`` each."""
        batch: Batch = self[indices]
        return batch


def as_it_is(batch: Any) -> Any:
    """A collate function for batches that are tensors already (not a lambda, so that workers can pickle it)."""
    return batch


def batch_loader(*tensors: Tensor, batch_size: int, shuffle: bool) -> DataLoader[Batch]:
    """Batches of ``tensors`` (equal first dimensions); the last batch may be smaller.

    An ordinary ``DataLoader``, so Lightning can give it a distributed sampler.
    """
    return DataLoader(TensorBatches(*tensors), batch_size=batch_size, shuffle=shuffle, collate_fn=as_it_is)


def read_text(root: Path, data: str) -> str:
    """The text of the file ``root``, or of ``input.txt`` in the folder ``root``; an error names the class ``data``."""
    path = root / "input.txt" if root.is_dir() else root
    if not path.is_file():
        raise FileNotFoundError(
            f"{data} found no text at {path}. Give a text file (such as tiny Shakespeare), or a folder that holds one "
            f"named input.txt: --data.root PATH on the command line, {data}(root=PATH) in Python."
        )
    return path.read_text(encoding="utf-8")
