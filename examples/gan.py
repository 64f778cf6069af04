"""A generative adversarial network with two `Thor` optimizers, on handwritten digits: ``python -m examples.gan``.

Manual optimization, two losses: the generator's gradient flows through the discriminator's layers, whose curvature must
not see it. ``toggle_optimizer`` sees to that: while the generator's step is under way, the discriminator's weights
require no gradient, and layers that do not train are not observed. `ThorCallback` gives each network its curvature.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.batches import Batch
from examples.digits import DigitsData
from lightning_thor import ThorCallback, configure_thor

NOISE = 16


def perceptron(n_in: int, n_out: int, width: int) -> nn.Sequential:
    """Two hidden layers: ``[n, n_in]`` to ``[n, n_out]``."""
    layers = (nn.Linear(n_in, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2))
    return nn.Sequential(*layers, nn.Linear(width, n_out))


class GAN(L.LightningModule):
    """The non-saturating loss (Goodfellow et al. 2014, section 3), with the R1 penalty on real images (Mescheder et al.
    2018, arXiv:1801.04406), whose second pass of backward no curvature observes.

    Args:
        width: of the hidden layers.
        lr: of both optimizers.
        penalty: weight of the R1 penalty.
    """

    def __init__(self, width: int = 128, lr: float = 2e-3, penalty: float = 1.0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr, self.penalty = lr, penalty
        self.generator = nn.Sequential(perceptron(NOISE, 64, width), nn.Sigmoid())
        self.discriminator = perceptron(64, 1, width)

    def configure_optimizers(self) -> Any:
        networks = (self.generator, self.discriminator)
        return [configure_thor(network, lr=self.lr, momentum=0.5) for network in networks]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        real = batch[0].flatten(1)
        optimizers: Any = self.optimizers()
        of_generator, of_discriminator = optimizers

        self.toggle_optimizer(of_discriminator)
        with torch.no_grad():
            made = self.generator(self.noise(len(real)))
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(made)).mean()
        (slope,) = torch.autograd.grad(self.discriminator(real.requires_grad_()).sum(), real, create_graph=True)
        self.take_step(of_discriminator, loss + self.penalty / 2 * slope.square().sum(1).mean())

        self.toggle_optimizer(of_generator)
        fooled = F.softplus(-self.discriminator(self.generator(self.noise(len(real))))).mean()
        self.take_step(of_generator, fooled)
        self.log_dict({"discriminator": loss, "generator": fooled}, prog_bar=True)

    def take_step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def noise(self, n: int) -> Tensor:
        return torch.randn(n, NOISE, device=self.device)

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.generator(noise)
        return images

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Noise ``[n, 16]`` to images ``[n, 8, 8]``."""
        return self.forward(batch).reshape(-1, 8, 8)


def distance(real: Tensor, made: Tensor) -> float:
    """Fréchet distance between the normal distributions with the moments of two sets of points ``[n, d]``: what the FID
    computes of features (Heusel et al. 2017, arXiv:1706.08500), here of pixels."""
    means, covariances = [x.mean(0) for x in (real, made)], [x.T.cov() for x in (real, made)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * overlap)


def draw(images: Tensor, file: Path) -> None:
    """Save images ``[64, 8, 8]`` in 0..1 as one picture."""
    from matplotlib import pyplot

    sheet = F.pad(images, (1, 1, 1, 1)).reshape(8, 8, 10, 10).transpose(1, 2).reshape(80, 80)
    pyplot.imsave(file, sheet.repeat_interleave(6, 0).repeat_interleave(6, 1).numpy(), cmap="gray_r", vmin=0, vmax=1)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train, predict, and draw; returns the distance to held-out digits before and after."""
    parser = argparse.ArgumentParser(description="A generative adversarial network on digits, trained with THOR.")
    parser.add_argument("--epochs", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gan"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    L.seed_everything(0, verbose=False)
    data, module = DigitsData(batch_size=64), GAN(lr=options.lr)
    callbacks: list[L.Callback] = [ThorCallback()]
    trainer = L.Trainer(max_epochs=options.epochs, callbacks=callbacks, logger=False, default_root_dir=options.out)

    def predicted() -> Tensor:
        noise: Any = torch.randn(360, NOISE, generator=torch.Generator().manual_seed(1))
        found: Any = trainer.predict(module, DataLoader(noise, batch_size=120))
        return torch.cat(found).cpu()

    before = predicted()
    trainer.fit(module, datamodule=data)
    after = predicted()
    held_out = data.val[0].flatten(1)
    first, last = (distance(held_out, images.flatten(1)) for images in (before, after))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(after[:64], options.out / "digits.png")
    print(f"distance to held-out digits: {first:.2f} before, {last:.2f} after {trainer.global_step // 2} steps of each")
    return first, last


if __name__ == "__main__":
    main()
