"""An image classifier for any network, and for any optimizer."""

from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from examples.batches import Batch


class ImageClassifier(L.LightningModule):
    """Cross-entropy training of ``network``; logs ``train_loss``, and loss and accuracy as ``val_…`` and ``test_…``.

    It has no ``configure_optimizers``. On the command line LightningCLI adds one, from the keys ``optimizer`` and
    ``lr_scheduler``. In Python, add it in a subclass::

        class Classifier(ImageClassifier):
            def configure_optimizers(self):
                return configure_thor(self, lr=6e-3, weight_decay=0.05)

    Args:
        network: images ``[N, C, H, W]`` to logits ``[N, num_classes]``.
        num_classes: length of the logits.
        label_smoothing: share of the target spread evenly over all classes, 0..1, in training only: ``val_loss`` and
            ``test_loss`` are plain cross-entropy, so they can be compared between values.

    Raises:
        ValueError: when training starts, the data has more classes than ``num_classes``.
    """

    def __init__(self, network: nn.Module, num_classes: int = 10, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "classes", ())
        if len(classes) > self.num_classes:
            raise ValueError(
                f"The data has {len(classes)} classes, the classifier only num_classes={self.num_classes}. Set "
                f"--model.num_classes {len(classes)}, and the network's num_classes too."
            )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate("val", self.val_acc, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate("test", self.test_acc, batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The probabilities of the classes, ``[N, num_classes]``."""
        probabilities: Tensor = self(batch[0]).softmax(dim=1)
        return probabilities

    def evaluate(self, split: str, accuracy: MulticlassAccuracy, batch: Batch) -> None:
        """Log the loss and ``accuracy`` of one batch as ``<split>_loss`` and ``<split>_acc``."""
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.log(f"{split}_acc", accuracy, prog_bar=True, batch_size=len(labels))
