"""Networks and batches of ``step_cost``, sized for two cores and for a GPU, and the optimizers that step on them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.contenders import CONTENDERS, Stepper
from benchmarks.common.models import ViT, mlp, resnet50
from benchmarks.common.workloads import Workload, images, rows, tokens
from examples.char_gpt import CharGPT
from examples.resnet import ResNet18
from lightning_thor import Curvature, Thor

# The cost of plain and of refresh steps does not depend on the interval, so a short one times both equally often;
# figures for longer intervals weigh the two kinds as those intervals mix them.
MEASURED_INTERVAL = 2
# The cost of a staggered step does depend on the interval: this is the default.
STAGGERED_INTERVAL = 10


def compiled(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same network, compiled in place."""

    def build_compiled() -> nn.Module:
        model = build()
        model.compile()
        return model

    return build_compiled


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
        lambda: CharGPT(layers=4, width=256), tokens(32, 128), "GPT, 4 layers, width 256, 4,096 tokens", True
    ),
    "vit": Workload(lambda: ViT(4, 192, 3), images(32), "ViT, 4 layers, width 192, batch 32 of 64 patches"),
}  # fmt: skip
GPU = {
    "mlp": CPU["mlp"],
    "mlp1024": CPU["mlp1024"],
    "resnet18": Workload(ResNet18, images(512), "ResNet-18, width 64, batch 512 of 32×32"),
    "resnet50": Workload(lambda: resnet50(64), images(512), "ResNet-50's shape, width 64, batch 512 of 32×32"),
    "gpt": Workload(
        lambda: CharGPT(layers=12, width=768, heads=12, context=512), tokens(32, 512),
        "GPT, 12 layers, width 768, 16,384 tokens", True,
    ),
    "vit": Workload(lambda: ViT(12, 384, 6), images(512), "ViT, 12 layers, width 384, batch 512 of 64 patches"),
}  # fmt: skip
GPU |= {
    f"{name}_compiled": replace(GPU[name], model=compiled(GPU[name].model), words=f"{GPU[name].words}, compiled")
    for name in ("resnet50", "gpt")
}
WORKLOADS: Mapping[str, Mapping[str, Workload]] = {"cpu": CPU, "gpu": GPU}


@dataclass
class Runner:
    """One optimizer with its own copy of the model."""

    model: nn.Module
    optimizer: Stepper
    curvature: Curvature | None = None

    def backward(self, inputs: Tensor, targets: Tensor) -> None:
        """Run forward and backward, in bfloat16 autocast on a GPU."""
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=inputs.device.type == "cuda"):
            loss = F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Take one training step, without waiting for the device."""
        self.backward(inputs, targets)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def is_due(self) -> bool:
        """Whether the coming step refreshes the factors, of THOR's curvature or of SINGD."""
        if self.curvature is not None:
            return self.curvature.is_due()
        kfac = getattr(self.optimizer, "optimizers", (self.optimizer,))[0]
        return bool(getattr(kfac, "steps", 1) % MEASURED_INTERVAL == 0)


def make_runner(name: str, workload: Workload, device: torch.device, every: int = MEASURED_INTERVAL) -> Runner:
    """Build an optimizer (see `rounds.OPTIMIZERS` and ``PEERS``) at its defaults but for THOR's interval, on a fresh
    model from a fixed seed; on a GPU SGD and AdamW are fused."""
    torch.manual_seed(0)
    model = workload.model().to(device).train()
    if name.startswith("thor"):
        staggered = name == "thor_staggered"
        every = STAGGERED_INTERVAL if staggered else every
        curvature = Curvature(model, update_every_n_steps=every, stagger=staggered)
        return Runner(model, Thor(model.parameters(), lr=1e-3, preconditioner=curvature), curvature)
    contender = CONTENDERS[name]
    options: dict[str, Any] = dict(contender.options)
    if name in ("sgd", "adamw") and device.type == "cuda":
        options["fused"] = True
    if name == "singd":
        options["T"] = MEASURED_INTERVAL
    return Runner(model, contender.build(model, 1e-3, options, workload.per_position))
