"""The migration door against a float64 transcription of nn.thor's formulas: what the recordings do not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_thor.mindspore.optimizer import thor
from tests.helpers.nn_thor_formulas import NumpyThor, float64

STEPS = 7


class Text(nn.Module):
    """Embedding, layer norms, a dense layer on every token, and BERT's next sentence head with its two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(40, 150), nn.LayerNorm(150)
        self.hidden, self.head = nn.Linear(150, 12), nn.Linear(12, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.norm(self.embedding(tokens))).tanh().mean(1))
        return logits


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 140), nn.Tanh(), nn.Linear(140, 2))


def convolutions() -> nn.Module:
    """C · k · k is 144 in the first, 180 in the second."""
    return nn.Sequential(
        nn.Conv2d(16, 20, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(20, 130, 3, stride=2, padding=(1, 0), dilation=(2, 1), bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(130 * 2 * 2, 4),
    )


NETS: dict[str, Any] = {
    "dense": (dense, lambda g: torch.randn(9, 300, generator=g, dtype=torch.float64), 2),
    "convolutions": (convolutions, lambda g: torch.randn(5, 16, 6, 5, generator=g, dtype=torch.float64), 4),
    "text": (Text, lambda g: torch.randint(40, (6, 7), generator=g), 2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"weight_decay": 0.03, "loss_scale": 64.0, "use_nesterov": True, "enable_clip_grad": True, "momentum": 0.8},
    "heavy ball": {"weight_decay": 0.03, "loss_scale": 1024.0, "use_nesterov": False, "momentum": 0.9},
    "plain": {"momentum": 0.0},
}


def close(ours: Tensor, theirs: Any, what: str) -> None:
    expected = torch.from_numpy(theirs)
    error = (ours.detach() - expected).abs().max() / expected.abs().max()
    assert error < 1e-9, f"{what}: off by {float(error):.1e} of its largest entry"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("variant", ["gpu", "ascend"])
@pytest.mark.parametrize("name", NETS)
def test_the_formulas_are_followed_step_by_step(name: str, variant: str, options: dict[str, Any]) -> None:
    """Widths over 128, frequency 3, a learning rate and a damping of their own for every step; weights and moments."""
    make, draw, classes = NETS[name]
    net = float64(make(), seed=5)
    defaults = {"weight_decay": 0.0, "loss_scale": 1.0, "use_nesterov": False, "enable_clip_grad": False}
    settings = {**defaults, **options, "frequency": 3, "variant": variant}
    rates, dampings = [0.01 / (1 + t) for t in range(STEPS)], [0.3 * 0.7**t for t in range(STEPS)]
    generator = torch.Generator().manual_seed(6)
    batches = [draw(generator) for _ in range(STEPS)]
    n = len(batches[0])
    targets = [torch.randint(classes, (n,), generator=generator) for _ in range(STEPS)]
    reference = NumpyThor(net, rates, dampings, batch_size=n, decays=lambda name: "bias" not in name, **settings)
    optimizer = thor(net, rates, dampings, batch_size=n, decay_filter=lambda p: "bias" not in p.name, **settings)
    for step, (x, y) in enumerate(zip(batches, targets, strict=True)):
        reference.step(lambda model, x=x, y=y: F.cross_entropy(model(x), y))
        (F.cross_entropy(net(x), y) * settings["loss_scale"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for key, p in net.named_parameters():
            close(p, reference.weights[key], f"{key} after step {step}")
            if settings["momentum"]:
                close(optimizer.state[p]["momentum_buffer"], reference.moments[key], f"moment of {key}, {step}")
    assert {True, False} <= set(reference.clipped) or not settings["enable_clip_grad"]


def test_on_ascend_a_dense_layer_with_two_outputs_has_the_identity_for_its_inverse_of_G() -> None:
    """w - lr · grad (A + √λ I)⁻¹, in closed form; the neighbour with three outputs has its G."""
    for outputs in (2, 3):
        net = float64(nn.Linear(4, outputs, bias=False), seed=1)
        assert isinstance(net, nn.Linear)
        optimizer = thor(net, 0.1, 0.25, 0.0, batch_size=6, loss_scale=8.0, variant="ascend")
        x = torch.randn(6, 4, dtype=torch.float64)
        before = net.weight.detach().clone()
        (8.0 * net(x).square().sum(1).mean()).backward()
        grad = net.weight.grad
        optimizer.step()
        eye = torch.eye(4, dtype=torch.float64)
        without_G = before - 0.1 * grad / 8.0 @ torch.linalg.inv(x.T @ x / 6 + 0.5 * eye)
        assert torch.allclose(net.weight.detach(), without_G, rtol=1e-12) == (outputs == 2)


def test_gradients_in_float16_are_unscaled_in_float32() -> None:
    """In float16 these would be 0 over the loss scale, which is there to keep them."""
    net = nn.Linear(4, 3).half()
    optimizer = thor(net, 0.1, 0.25, 0.9, batch_size=6, loss_scale=65536.0)
    grads = {p: 1e-3 * torch.ones_like(p) for p in net.parameters()}
    assert optimizer.preconditioner is not None
    directions = optimizer.preconditioner.precondition(grads)
    for p, grad in grads.items():
        torch.testing.assert_close(directions[p], grad.float() / 65536.0, rtol=0, atol=0)
