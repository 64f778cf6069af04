"""The published recipes of THOR: ResNet-50 on ImageNet, and BERT-large.

Figures and formulas are those of "MindSpore models" (resnet with its Thor configurations for GPU and Ascend, and bert
with its Thor section), the trainings that THOR's paper reports (Chen et al., AAAI 2021). Epochs are fractions, counted
from the end of each step, as they are there: step 0 is at epoch ``1 / steps_per_epoch``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from lightning_thor.optim.param_groups import configure_thor
from lightning_thor.schedules import PerStepLR, Polynomial, check_positive
from lightning_thor.trainer.callback import ThorCallback

Variant = Literal["gpu", "ascend"]


class _ResNet50(NamedTuple):
    """The differences between the two published trainings of ResNet-50."""

    lr: float
    lr_power: float
    lr_end_epoch: int
    lr_halved_at: tuple[int, ...]
    damping: float
    damping_per_10_epochs: float
    max_epochs: int


RESNET50 = {
    "gpu": _ResNet50(0.05672, 4.9687, 50, (), 0.02345, 0.5467, 40),
    "ascend": _ResNet50(0.05803, 4.0839, 53, (39, 40), 0.03, 0.50036, 45),
}


@dataclass(frozen=True)
class _ResNet50Schedule:
    steps_per_epoch: int
    variant: Variant = "gpu"

    def __post_init__(self) -> None:
        check_positive(steps_per_epoch=self.steps_per_epoch)
        if self.variant not in RESNET50:
            raise ValueError(f"variant must be one of {', '.join(RESNET50)}, got {self.variant!r}.")

    def _epoch(self, step: int) -> float:
        return (step + 1) / self.steps_per_epoch


class ResNet50LearningRate(_ResNet50Schedule):
    """Learning rate of ResNet-50 on ImageNet at a step; e is the epoch, ``(step + 1) / steps_per_epoch``.

    * ``"gpu"``: 0.05672 · (1 − e/50)^4.9687; the published training ends after epoch 40.
    * ``"ascend"``: 0.05803 · (1 − e/53)^4.0839, half of it from epoch 39, a quarter from epoch 40; it ends after 45.

    After epoch 50 (53) it is 0.

    Args:
        steps_per_epoch: optimizer steps in an epoch; 5004 for the published batches of 8 x 32 images.
        variant: ``"gpu"`` or ``"ascend"``.

    Raises:
        ValueError: ``steps_per_epoch`` is not positive, or there is no such variant.

    >>> rate = ResNet50LearningRate(steps_per_epoch=10)
    >>> rate(249), rate(499), rate(600)
    (0.00181, 0.0, 0.0)
    """

    def __call__(self, step: int) -> float:
        published, epoch = RESNET50[self.variant], self._epoch(step)
        halvings = sum(epoch >= start for start in published.lr_halved_at)
        left = max(0.0, 1.0 - epoch / published.lr_end_epoch)
        return float(published.lr * left**published.lr_power * 0.5**halvings)


class ResNet50Damping(_ResNet50Schedule):
    """Damping of ResNet-50 on ImageNet at a step, for ``damping_rule="sqrt"``; e is ``(step + 1) / steps_per_epoch``.

    * ``"gpu"``: 0.02345 · 0.5467^(e/10)
    * ``"ascend"``: 0.03 · 0.50036^(e/10)

    Args:
        steps_per_epoch: as of `ResNet50LearningRate`.
        variant: ``"gpu"`` or ``"ascend"``.

    Raises:
        ValueError: as of `ResNet50LearningRate`.

    >>> ResNet50Damping(steps_per_epoch=10)(99)
    0.01282
    """

    def __call__(self, step: int) -> float:
        published = RESNET50[self.variant]
        return float(published.damping * published.damping_per_10_epochs ** (self._epoch(step) / 10))


@dataclass(frozen=True)
class Recipe:
    """The published settings of a training, and the callback and optimizer made from them.

    ::

        recipe = resnet50_imagenet(steps_per_epoch=5004)

        class Model(L.LightningModule):
            def configure_optimizers(self):
                return recipe.configure_optimizers(self)

        L.Trainer(max_epochs=recipe.max_epochs, callbacks=[recipe.callback()])
    """

    learning_rate: Callable[[int], float]
    """The learning rate at each step."""
    damping: Callable[[int], float]
    """The damping at each step, for ``damping_rule="sqrt"``."""
    update_every_n_steps: int
    weight_decay: float
    batch_size: int
    """Samples of one step, over all devices."""
    max_epochs: int | None = None
    """Where training ended; None where `max_steps` ends it."""
    max_steps: int = -1
    momentum: float = 0.9
    clip_norm: float | None = None
    """Largest L2 norm of each tensor's update, before momentum."""
    label_smoothing: float = 0.0
    loss_scale: float = 1.0
    """The fixed loss scale in float16. A GradScaler finds its own; bfloat16 needs none."""
    split_indices: tuple[int, ...] = ()
    """The layers after which nn.thor begins a new all-reduce."""

    def callback(self, **options: Any) -> ThorCallback:
        """Make plain THOR's `ThorCallback`: nn.thor's statistics, damping rule and blocks, of the last batch alone.

        Args:
            **options: of `ThorCallback`, instead of these values or in addition.
        """
        plain: dict[str, Any] = {
            "damping": self.damping,
            "damping_rule": "sqrt",
            "block_size": 128,
            "update_every_n_steps": self.update_every_n_steps,
            "averaging": 0.0,
            "statistics": "thor",
            "max_rows": None,
        }
        return ThorCallback(**{**plain, **options})

    def configure_optimizers(self, module: nn.Module, lr: float = 1.0) -> dict[str, Any]:
        """Make the result of a LightningModule's ``configure_optimizers``: plain `Thor`, with a learning rate per step.

        Args:
            module: the trained model; weights decay, biases and norms do not.
            lr: factor of the published learning rate, such as for another batch size.
        """
        optimizer = configure_thor(
            module,
            lr=lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=False,
            clip_norm=self.clip_norm,
            match_rms=None,
            decoupled_weight_decay=False,
        )
        scheduler = PerStepLR(optimizer, self.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": PerStepLR.interval}}


def resnet50_imagenet(steps_per_epoch: int, variant: Variant = "gpu") -> Recipe:
    """ResNet-50 on ImageNet in batches of 8 x 32: 75.9 % after 40 to 45 epochs in the paper.

    The statistics are those of MindSpore's Ascend version for both; its GPU version averages the patches of a batch
    before it takes covariances (`lightning_thor.mindspore` has these numbers). In MindSpore biases and norms decay too,
    and its program halves the learning rate at epochs 39 and 40 on a GPU too: in the last epoch.

    Args:
        steps_per_epoch: optimizer steps in an epoch; 5004 for the published batches.
        variant: ``"gpu"`` or ``"ascend"``, whose learning rates and dampings differ.

    Returns:
        The recipe.

    Raises:
        ValueError: ``steps_per_epoch`` is not positive, or there is no such variant.

    >>> resnet50_imagenet(5004, "ascend").max_epochs
    45
    """
    return Recipe(
        learning_rate=ResNet50LearningRate(steps_per_epoch, variant),
        damping=ResNet50Damping(steps_per_epoch, variant),
        update_every_n_steps=834,
        weight_decay=5e-4,
        batch_size=8 * 32,
        max_epochs=RESNET50[variant].max_epochs,
        label_smoothing=0.1,
        loss_scale=128.0,
        split_indices=(26, 53),
    )


def bert_large(n_steps: int = 30_000) -> Recipe:
    """Pretraining of BERT-large in batches of 8 x 12 sequences of 512: 71.3 % of masked words in the paper.

    Learning rate from 6.464e-3 to 1e-6 by the power 2, damping from 7.035e-3 to 1e-6 by the power 4. MindSpore's own
    run reached its target after 3,000 steps of the 30,000 that the schedules span, and clips each tensor's update.
    nn.thor divides a layer norm's gradient by its own square; here layer norms take plain momentum.

    Args:
        n_steps: steps that the schedules span.

    Returns:
        The recipe.

    Raises:
        ValueError: ``n_steps`` is not positive.

    >>> bert_large().learning_rate(15_000)
    0.00161675
    """
    return Recipe(
        learning_rate=Polynomial(6.464e-3, end=1e-6, n_steps=n_steps, power=2.0),
        damping=Polynomial(7.035e-3, end=1e-6, n_steps=n_steps, power=4.0),
        update_every_n_steps=100,
        weight_decay=1e-5,
        batch_size=8 * 12,
        max_steps=n_steps,
        clip_norm=1.0,
        loss_scale=1024.0,
        split_indices=(38, 93, 149),
    )
