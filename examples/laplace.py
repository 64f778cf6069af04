"""A K-FAC Laplace approximation of a trained network, for predictions that know what they do not know: ``python -m
examples.laplace``. See docs/laplace.md.

The posterior of a layer's weights is taken to be normal around what was trained, with covariance (N G ⊗ A + τ I)⁻¹ for
N training samples and a prior of precision τ (Ritter et al. 2018, "A scalable Laplace approximation for neural
networks"). `lightning_thor.exact_factors` computes A and G; the eigenbases of both diagonalise the sum.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from examples.classifier import ImageClassifier
from examples.digits import DigitsData
from lightning_thor import ThorCallback, configure_thor, exact_factors

Factors = dict[str, dict[str, Any]]


class Classifier(ImageClassifier):
    """Two hidden layers on 8x8 images."""

    def __init__(self) -> None:
        layers = (nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        super().__init__(nn.Sequential(*layers))

    def configure_optimizers(self) -> Any:
        return configure_thor(self, lr=1e-2)


def factors_of(network: nn.Module, batches: Iterable[Any], last: int = 2) -> Factors:
    """A and G of the last linear layers, with biases in A, of targets drawn from the predictions."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(logits, Categorical(logits=logits.detach()).sample())

    layers = [module for module in network.modules() if isinstance(module, nn.Linear)][-last:]
    parameters = [p for layer in layers for p in layer.parameters()]
    return exact_factors(network, batches, loss, parameters=parameters, precondition_bias=True)


def draw(factors: dict[str, Any], n: int, tau: float, noise: Tensor) -> Tensor:
    """From standard normal ``noise [..., out, in + 1]`` to a deviation of weight and bias with covariance
    (n G ⊗ A + τ I)⁻¹ of its entries, row by row."""
    of_A, A = factors["A_eigenvectors"][0, 0], factors["A_eigenvalues"][0, 0].clamp_min(0)
    of_G, G = factors["G_eigenvectors"][0, 0], factors["G_eigenvalues"][0, 0].clamp_min(0)
    scaled = noise.to(A.dtype) * (n * G[:, None] * A + tau).rsqrt()
    drawn: Tensor = of_G @ scaled @ of_A.T
    return drawn


@torch.no_grad()
def predict(network: nn.Module, factors: Factors, images: Tensor, n: int, tau: float, samples: int = 50) -> Tensor:
    """Class probabilities ``[n, classes]``: the mean over weights that are drawn from the posterior."""
    generator, layers = torch.Generator().manual_seed(0), {name: network.get_submodule(name) for name in factors}
    trained = {p: p.clone() for layer in layers.values() for p in layer.parameters()}
    total = torch.zeros(())
    for _ in range(samples):
        for name, layer in layers.items():
            weight, bias = layer.parameters()
            noise = torch.randn(weight.shape[0], weight.shape[1] + 1, generator=generator)
            deviation = draw(factors[name], n, tau, noise).to(weight)
            weight.copy_(trained[weight] + deviation[:, :-1])
            bias.copy_(trained[bias] + deviation[:, -1])
        total = total + network(images).softmax(1) / samples
    for p, value in trained.items():
        p.copy_(value)
    return total


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, choose τ on the validation images, and compare; returns what is printed."""
    parser = argparse.ArgumentParser(description="A Laplace approximation from THOR's factors, on digits.")
    parser.add_argument("--epochs", type=int, default=15, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    L.seed_everything(0, verbose=False)
    data, module = DigitsData(batch_size=64), Classifier()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=options.epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[ThorCallback(summary=False)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    network, n = module.network.eval(), len(data.train[0])
    factors = factors_of(network, data.train_dataloader())

    def loss(tau: float, split: Any) -> float:
        return float(F.nll_loss(predict(network, factors, split[0], n, tau).log(), split[1]))

    tau = min((0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0), key=lambda one: loss(one, data.val))
    noise = torch.rand(360, 1, 8, 8)
    point = [network(images).detach().softmax(1) for images in (data.test[0], noise)]
    laplace = [predict(network, factors, images, n, tau) for images in (data.test[0], noise)]
    figures = {"tau": tau}
    for name, (digits, other) in {"point": point, "laplace": laplace}.items():
        figures[f"{name} loss"] = float(F.nll_loss(digits.log(), data.test[1]))
        figures[f"{name} accuracy"] = float((digits.argmax(1) == data.test[1]).float().mean())
        figures[f"{name} confidence in noise"] = float(other.amax(1).mean())
    for name, figure in figures.items():
        print(f"{name}: {figure:.3g}")
    return figures


if __name__ == "__main__":
    main()
