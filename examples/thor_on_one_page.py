"""THOR on one page of plain torch: ``python -m examples.thor_on_one_page`` learns to read digits in a few seconds.

A linear layer y = W a + b has an input a and a gradient g = dloss/dy for each sample. K-FAC (Martens & Grosse 2015,
arXiv:1503.05671, section 3) approximates its Fisher matrix by A ⊗ G, where A = E[a aᵀ] and G = E[g gᵀ]. THOR (Chen et
al., AAAI 2021) keeps only diagonal blocks of A and G, inverts them every n steps, and takes g from the true labels.
tests/test_thor_on_one_page.py holds `lightning_thor`, which also shortens steps along rounding errors, to this page.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def block_covariance(x: Tensor, block_size: int) -> Tensor:
    """E[x xᵀ] over the rows of ``x [batch, width]``, and 0 outside of equal diagonal blocks."""
    width = x.shape[1]
    divisors = [n for n in range(block_size, max(block_size // 2, 1) - 1, -1) if width % n == 0]
    size = divisors[0] if divisors else math.ceil(width / math.ceil(width / block_size))
    block = torch.arange(width, device=x.device) // size  # in which block a row or column lies
    return x.T @ x / len(x) * (block[:, None] == block)


def damped_inverse(C: Tensor, damping: float) -> Tensor:
    """(C + damping · mean eigenvalue of C · I)⁻¹ (K-FAC, section 6.3); THOR is cheap because it goes block by block."""
    return (C + damping * C.diag().mean() * torch.eye(len(C)).to(C)).inverse()


@dataclass
class ThorOnOnePage:
    """For a loss that is a mean over the batch: a sample's own g is then len(g) times g. Options as in Thor."""

    model: nn.Module
    lr: float = 6e-3
    momentum: float = 0.9
    match_rms: float = 0.2  # root mean square of directions, about that of AdamW's (Liu et al., arXiv:2502.16982)
    rms_averaging: float = 0.9  # weight of the past in the mean square of a tensor's gradients
    max_relative_step: float = 0.01  # most of lr · match_rms, over the 1 / √(3 · inputs) of nn.Linear at first
    damping: float = 0.2  # relative to the mean eigenvalue of A and of G
    averaging: float = 0.8  # weight of the past in A and G (K-FAC, section 5), bias-corrected as in Adam
    block_size: int = 64  # at most
    update_every_n_steps: int | None = None  # None at step n: n / 10, from 1 to 10; then n / 100, up to 100

    def __post_init__(self) -> None:
        self.n_steps = self.next_refresh = self.n_refreshes = 0
        self.momenta, self.mean_square, self.average, self.inverse = (dict[object, Tensor]() for _ in range(4))
        self.layers = [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        for layer in self.layers:
            layer.register_forward_hook(self.observe)

    def observe(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # a forward hook
        if output.requires_grad and self.n_steps == self.next_refresh:
            output.register_hook(lambda g: self.refresh(layer, A=inputs[0].detach(), G=g * len(g)))  # in backward

    def refresh(self, layer: nn.Module, **rows: Tensor) -> None:
        weight = (1 - self.averaging) / (1 - self.averaging ** (self.n_refreshes + 1))
        for factor, x in rows.items():
            average = (1 - weight) * self.average.get((layer, factor), 0 * x[0, 0])
            self.average[layer, factor] = average + weight * block_covariance(x, self.block_size)
            self.inverse[layer, factor] = damped_inverse(self.average[layer, factor], self.damping)

    @torch.no_grad()
    def step(self) -> None:
        directions: dict[Tensor, Tensor] = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        squares = {p: grad.square().mean().clamp_min(1e-60) for p, grad in directions.items()}
        for layer in self.layers:  # the natural gradient, (A ⊗ G)⁻¹ vec(grad) = vec(G⁻¹ grad A⁻¹): K-FAC, section 4.2
            directions[layer.weight] = self.inverse[layer, "G"] @ directions[layer.weight] @ self.inverse[layer, "A"]
        for p, direction in directions.items():  # that of a bias is its gradient; one of zeros stays zero
            most = math.inf if p.dim() < 2 else self.max_relative_step / (self.lr * math.sqrt(3 * p.shape[1]))
            mean = self.mean_square[p] = squares[p].lerp(self.mean_square.get(p, 0 * squares[p]), self.rms_averaging)
            size = min(self.match_rms, 3 * self.match_rms * float((squares[p] / mean).sqrt()), most)
            update = direction * (size / direction.square().mean().sqrt().clamp_min(1e-30))
            self.momenta[p] = self.momentum * self.momenta.get(p, 0.0) + update
            p -= self.lr * (update + self.momentum * self.momenta[p])  # Nesterov's momentum, as in torch.optim.SGD
        if (n := self.n_steps) == self.next_refresh:
            self.n_refreshes += 1
            self.next_refresh += self.update_every_n_steps or max(1, min(n // 10, 10), min(n // 100, 100))
        self.n_steps += 1


def main(n_steps: int = 200) -> float:
    """Train on scikit-learn's digits; returns the accuracy on the 360 of 1,797 that are held out, 0..1."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    train, held_out = torch.randperm(1797).split([1437, 360])
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    optimizer = ThorOnOnePage(model)
    for batch in train[torch.randint(1437, (n_steps, 64))]:
        model.zero_grad()
        nn.functional.cross_entropy(model(pixels[batch] / 16), labels[batch]).backward()
        optimizer.step()
    return float((model(pixels[held_out] / 16).argmax(dim=1) == labels[held_out]).double().mean())


if __name__ == "__main__":
    print(f"held-out accuracy: {main():.1%}")
