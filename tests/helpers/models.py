"""Small models that several tests train, and what a curvature of them has after a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_thor import Curvature


class Words(nn.Module):
    """A table that is the output layer too, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.out = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(self.table(tokens)))
        return logits


class ByLinears(nn.Module):
    """One-headed attention written with linear layers, of the same weights."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width = attention.embed_dim
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width).double() for _ in range(4))
        for index, layer in enumerate((self.q_proj, self.k_proj, self.v_proj)):
            layer.weight.data = attention.in_proj_weight.detach().chunk(3)[index].clone()
            layer.bias.data = attention.in_proj_bias.detach().chunk(3)[index].clone()
        self.out_proj.load_state_dict(attention.out_proj.state_dict())

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.q_proj(query), self.k_proj(memory), self.v_proj(memory)
        output: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v))
        return output


def every_kind() -> nn.Sequential:
    """Two linear layers with padded blocks, a plain, a grouped and a transposed convolution, an embedding, a norm."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Embedding(9, 12),
        nn.Linear(12, 18),
        nn.Unflatten(1, (2, 3, 3)),
        nn.Conv2d(2, 4, 2, padding=1),
        nn.Conv2d(4, 6, 2, groups=2),
        nn.ConvTranspose2d(6, 4, 2, groups=2, bias=False),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 5),
    )
    return model.double()


def observed(model: nn.Module, mode: Any = "polar", **options: Any) -> Curvature:
    """A curvature after one batch; the model has its gradients."""
    curvature = Curvature(model, mode=mode, **{"block_size": 5, "damping": 0.1, **options})
    tokens = torch.randint(9, (40,), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    model(tokens).square().mean().backward()
    curvature.update()
    return curvature


def grads_of(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    return {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
