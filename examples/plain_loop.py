"""THOR in an ordinary PyTorch loop, without a Trainer: ``python -m examples.plain_loop``."""

import torch
from rich import print
from torch.nn import functional as F

from examples.digits import DigitsData, DigitsNet
from lightning_thor import Curvature, Thor


def main(epochs: int = 5) -> float:
    """Train on the digits; returns the last validation accuracy, 0..1."""
    torch.manual_seed(0)
    data = DigitsData(batch_size=64)
    data.setup()
    model = DigitsNet()
    curvature = Curvature(model)
    optimizer = Thor(model.parameters(), lr=1e-2, preconditioner=curvature)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)

    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        for images, labels in data.train_dataloader():
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()

        model.eval()
        with torch.no_grad():
            images, labels = data.val
            accuracy = (model(images).argmax(dim=1) == labels).float().mean().item()
        print(f"epoch {epoch}: validation accuracy [bold]{accuracy:.1%}[/bold]")
    return accuracy


if __name__ == "__main__":
    main()
