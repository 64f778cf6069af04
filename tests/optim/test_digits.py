"""Slow decline: each mode learns the digits from several seeds, with its defaults, as well as it did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_thor import Curvature, configure_thor

SEEDS, STEPS, BATCH = 3, 100, 128


def held_out_accuracy(mode: str, seed: int) -> float:
    """Of an MLP after `STEPS` steps on 1,400 of scikit-learn's digits, on the other 397."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")
    images, digits = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = configure_thor(model, mode=mode)
    optimizer.preconditioner = Curvature(model, mode=mode)
    for _ in range(STEPS):
        batch = train[torch.randint(len(train), (BATCH,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return float((model(x[test]).argmax(1) == y[test]).float().mean())


@pytest.mark.parametrize(("mode", "least"), [("natural", 0.95), ("polar", 0.87), ("adam", 0.95)])
def test_each_mode_learns_the_digits(mode: str, least: float) -> None:
    found = [held_out_accuracy(mode, seed) for seed in range(SEEDS)]
    assert min(found) > least, found
