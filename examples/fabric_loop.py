"""THOR in a loop of Lightning Fabric: ``python -m examples.fabric_loop``, or with ``--devices 2`` (DDP).

`setup_fabric` takes the place of ``fabric.setup``; all else is Fabric's own loop. A run that is cut off goes on from
its checkpoint, which holds the curvature too.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch.nn import functional as F

from examples.digits import DigitsData, DigitsNet
from lightning_thor import configure_thor, setup_fabric


def main(arguments: list[str] | None = None) -> float:
    """Train on the digits; returns the last validation accuracy, 0..1."""
    parser = argparse.ArgumentParser(description="THOR under Lightning Fabric, on digits.")
    parser.add_argument("--epochs", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--devices", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--precision", default="32-true", help="Fabric's (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches in a step (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/fabric"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)

    fabric = Fabric(devices=options.devices, precision=options.precision)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    data = DigitsData(batch_size=64)
    data.setup()
    network = DigitsNet()
    model, optimizer, curvature = setup_fabric(
        fabric, network, configure_thor(network, lr=1e-2), accumulate_grad_batches=options.accumulate
    )
    batches: Any = fabric.setup_dataloaders(data.train_dataloader())

    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "curvature": curvature, "epoch": 0}
    checkpoint = options.out / "last.ckpt"
    if checkpoint.exists():
        fabric.load(checkpoint, state)
    accuracy = 0.0
    while state["epoch"] < options.epochs:
        model.train()
        for number, (images, labels) in enumerate(batches, start=1):
            is_step = number % options.accumulate == 0
            with fabric.no_backward_sync(model, enabled=not is_step):
                loss = F.cross_entropy(model(images), labels)
                fabric.backward(loss / options.accumulate)
            if is_step:
                optimizer.step()
                optimizer.zero_grad()
        state["epoch"] += 1
        fabric.save(checkpoint, state)

        model.eval()
        with torch.no_grad():
            images, labels = fabric.to_device(data.val)
            accuracy = (model(images).argmax(dim=1) == labels).float().mean().item()
        fabric.print(f"epoch {state['epoch']}: validation accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
