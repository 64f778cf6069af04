"""THOR in a plain loop over many ranks: FSDP2, replicas and tensor parallelism by flags, without Lightning.

    torchrun --nproc-per-node=4 -m examples.sharded_loop --shard 2 --tensor 2

A small GPT learns the characters of this file. With ``--checkpoint`` it goes on from that folder, on any mesh.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from lightning_thor import Curvature, ShardedCurvature, Thor


class Block(nn.Module):
    """Attention and a two-layer network, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        # As many heads of 16 as this rank has: tensor parallelism gives it some of the outputs of q, k and v.
        q, k, v = (f(normed).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return torch.add(x, self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Predicts the next character."""

    def __init__(self, n_symbols: int, context: int, width: int = 64, n_blocks: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(n_symbols, width), nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(n_blocks)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, n_symbols, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions)))
        return logits


def parallelize(model: GPT, mesh: DeviceMesh) -> None:
    """Share out products over the mesh's ranks of tensor parallelism, then weights over its shards, in replicas."""
    if mesh["tensor"].size() > 1:
        plan: dict[str, Any] = {f"blocks.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")}
        plan |= {f"blocks.*.{name}": RowwiseParallel() for name in ("out", "down")}
        plan |= {"tokens": RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(model, mesh["tensor"], plan | {"head": ColwiseParallel(output_layouts=Replicate())})
    if mesh["replicate"].size() * mesh["shard"].size() > 1:
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh["replicate", "shard"])


def main() -> None:
    """Train, print the loss, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("replicate", "shard", "tensor")
    for name in names:
        parser.add_argument(f"--{name}", type=int, default=1, help="ranks in this dimension of the mesh")
    parser.add_argument("--mode", default="natural", choices=("natural", "polar", "adam"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_device(f"{device}:{os.environ['LOCAL_RANK']}" if device == "cuda" else device)
    mesh = init_device_mesh(device, tuple(getattr(args, name) for name in names), mesh_dim_names=names)
    n_data, place = args.replicate * args.shard, dist.get_rank() // args.tensor
    text, context, batch_size = Path(__file__).read_text("utf-8"), 32, 32
    symbols = sorted(set(text))
    windows = torch.tensor([symbols.index(one) for one in text]).unfold(0, context + 1, 1)
    torch.manual_seed(0)  # the same weights on all ranks, which their shards are cut from
    model = GPT(len(symbols), context)
    parallelize(model, mesh)
    curvature = Curvature(model, mode=args.mode)
    optimizer = Thor(model.parameters(), lr=0.01, mode=args.mode, preconditioner=ShardedCurvature(curvature))
    optimizer.make_state()

    def whole_state() -> dict[str, Any]:
        weights, momenta = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": momenta, "curvature": curvature.state_dict()}

    if args.checkpoint and args.checkpoint.is_dir():
        load(state := whole_state(), checkpoint_id=args.checkpoint)  # in place, each rank its shards
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        curvature.load_state_dict(state["curvature"])
    for step in range(curvature.step, curvature.step + args.steps):
        starts = torch.randint(len(windows), (batch_size,), generator=torch.Generator(device).manual_seed(step))
        batch = windows[starts.chunk(n_data)[place]]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total := loss.detach())
        if dist.get_rank() == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {total.item() / dist.get_world_size():.4f}", flush=True)
    if args.checkpoint:
        save(whole_state(), checkpoint_id=args.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
