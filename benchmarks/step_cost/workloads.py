"""What ``step_cost`` measures: networks and batches, sized for two cores and for a GPU, and the optimizers."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.contenders import CONTENDERS, Stepper
from benchmarks.common.environment import synchronise
from benchmarks.common.models import ViT, mlp, resnet50
from examples.char_gpt import CharGPT
from examples.resnet import ResNet18
from lightning_thor import Curvature, Thor

# Between refreshes that are timed. The cost of either kind of step does not depend on it, so a short interval measures
# both equally often; figures for longer intervals weigh the two kinds as those intervals mix them.
MEASURED_INTERVAL = 2
# What lies in one step of a staggered interval does depend on it: that is the default's.
STAGGERED_INTERVAL = 10


@dataclass(frozen=True)
class Workload:
    """A model, and batches ``(inputs, targets)`` made once; the model gives logits with the classes last."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    words: str
    per_position: bool = False


def images(count: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Images of 32x32 and their labels."""
    return lambda: (torch.randn(count, 3, 32, 32), torch.randint(10, (count,)))


def rows(count: int, width: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Rows of numbers and their labels."""
    return lambda: (torch.randn(count, width), torch.randint(10, (count,)))


def characters(windows: int, context: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Windows of a text, and the next characters."""
    return lambda: (torch.randint(65, (windows, context)), torch.randint(65, (windows, context)))


CPU = {
    "mlp": Workload(
        lambda: mlp((784, 512, 512, 512, 10)), rows(128, 784), "MLP 784-512-512-512-10, batch 128"
    ),
    "mlp1024": Workload(
        lambda: mlp((1024, 1024, 1024, 1024, 1024, 10)), rows(1024, 1024), "MLP, 4 hidden layers of 1024, batch 1024"
    ),
    "resnet18": Workload(lambda: ResNet18(width=32), images(64), "ResNet-18, width 32, batch 64 of 32×32"),
    "resnet50": Workload(lambda: resnet50(16), images(64), "ResNet-50's shape, width 16, batch 64 of 32×32"),
    "gpt": Workload(
        lambda: CharGPT(layers=4, width=256), characters(32, 128), "GPT, 4 layers, width 256, 4,096 tokens", True
    ),
    "vit": Workload(lambda: ViT(4, 192, 3), images(32), "ViT, 4 layers, width 192, batch 32 of 64 patches"),
}  # fmt: skip
GPU = {
    "mlp": CPU["mlp"],
    "mlp1024": CPU["mlp1024"],
    "resnet18": Workload(ResNet18, images(512), "ResNet-18, width 64, batch 512 of 32×32"),
    "resnet50": Workload(lambda: resnet50(64), images(512), "ResNet-50's shape, width 64, batch 512 of 32×32"),
    "gpt": Workload(
        lambda: CharGPT(layers=12, width=768, heads=12, context=512), characters(32, 512),
        "GPT, 12 layers, width 768, 16,384 tokens", True,
    ),
    "vit": Workload(lambda: ViT(12, 384, 6), images(512), "ViT, 12 layers, width 384, batch 512 of 64 patches"),
}  # fmt: skip
WORKLOADS: Mapping[str, Mapping[str, Workload]] = {"cpu": CPU, "gpu": GPU}


@dataclass
class Runner:
    """One optimizer with its own copy of the model."""

    model: nn.Module
    optimizer: Stepper
    curvature: Curvature | None = None

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One training step, in bfloat16 autocast on a GPU; its seconds."""
        synchronise(inputs.device)
        start = time.perf_counter()
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=inputs.device.type == "cuda"):
            loss = F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronise(inputs.device)
        return time.perf_counter() - start

    def is_due(self) -> bool:
        """Whether the coming step is a refresh: of THOR's curvature, or of the factors of SINGD."""
        if self.curvature is not None:
            return self.curvature.is_due()
        kfac = getattr(self.optimizer, "optimizers", (self.optimizer,))[0]
        return bool(getattr(kfac, "steps", 1) % MEASURED_INTERVAL == 0)


def runner(name: str, workload: Workload, device: torch.device, curvature_type: type[Curvature] = Curvature) -> Runner:
    """One optimizer at its defaults, on a fresh model from one seed; on a GPU SGD and AdamW are the fused ones.

    Args:
        name: ``"sgd"``, ``"adamw"``, ``"thor"``, ``"thor_staggered"`` or ``"singd"``.
        workload: whose model.
        device: on which.
        curvature_type: of THOR: one that times itself, say.
    """
    torch.manual_seed(0)
    model = workload.model().to(device).train()
    if name.startswith("thor"):
        staggered = name == "thor_staggered"
        every = STAGGERED_INTERVAL if staggered else MEASURED_INTERVAL
        curvature = curvature_type(model, update_every_n_steps=every, stagger=staggered)
        return Runner(model, Thor(model.parameters(), lr=1e-3, preconditioner=curvature), curvature)
    contender = CONTENDERS[name]
    options: dict[str, Any] = dict(contender.options)
    if name in ("sgd", "adamw") and device.type == "cuda":
        options["fused"] = True
    if name == "singd":
        options["T"] = MEASURED_INTERVAL
    return Runner(model, contender.build(model, 1e-3, options, workload.per_position))
