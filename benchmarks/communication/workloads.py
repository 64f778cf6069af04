"""Networks and batches of one rank, of which ``communication`` counts and times refreshes."""

import torch
from torch import nn

from benchmarks.common.models import gpt2, imagenet_resnet18
from benchmarks.common.workloads import Workload, images, tokens
from examples.char_gpt import CharGPT
from examples.resnet import ResNet18, ResNet50

WORKLOADS = {
    "resnet18": Workload(ResNet18, images(32), "ResNet-18, 32 images of 32×32"),
    "resnet18_224": Workload(
        imagenet_resnet18, images(32, 224, 1000), "ResNet-18 for ImageNet, 32 images of 224×224"
    ),
    "resnet50": Workload(ResNet50, images(32, 64, 1000), "ResNet-50, 32 images of 64×64"),
    "resnet50_224": Workload(ResNet50, images(32, 224, 1000), "ResNet-50, 32 images of 224×224"),
    "gpt": Workload(CharGPT, tokens(16, 128), "GPT, 4 layers of width 128, 2,048 tokens"),
    "gpt256": Workload(
        lambda: CharGPT(layers=4, width=256), tokens(16, 128), "GPT, 4 layers of width 256, 2,048 tokens"
    ),
    "gpt2": Workload(gpt2, tokens(2, 1024, 50257), "GPT-2 small, 2,048 tokens"),
    "tiny": Workload(
        lambda: nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 10)),
        lambda: (torch.randn(8, 40), torch.randint(10, (8,))),
        "MLP 40-300-10, to try this program",
    ),
}  # fmt: skip
