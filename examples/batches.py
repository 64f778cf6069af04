"""Tensors in memory as a data loader that hands out whole batches, without a Python call for every sample."""

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
