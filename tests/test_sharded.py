"""Laws of directions that several processes compute together: they are those that one process computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_thor import Curvature
from lightning_thor.directions import Mode
from lightning_thor.sharded import ShardedCurvature
from tests.fakes import Threads, run_in_threads


class Everything(nn.Module):
    """Each kind of layer, with widths that few numbers of processes divide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.norm = nn.LayerNorm((5, 12))
        self.fused = nn.Linear(12, 30)
        self.scale = nn.RMSNorm(30)
        self.convolution = nn.Conv1d(30, 14, 3, groups=2, padding=1)
        self.transposed = nn.ConvTranspose1d(14, 10, 3, groups=2, padding=1)
        self.recurrent = nn.GRU(10, 3, batch_first=True)
        self.head = nn.Linear(3, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.table(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.scale(self.fused(x)).mT
        x = self.transposed(F.relu(self.convolution(x))).mT
        return self.head(self.recurrent(x)[0])


def curvature_of(
    mode: Mode, block_size: int | None = 4, precondition_bias: bool = False, model: nn.Module | None = None
) -> Curvature:
    """Of `Everything`, in float64, after two refreshes; gradients are those of the last one."""
    torch.manual_seed(2)
    model = model or Everything()
    curvature = Curvature(
        model.double(), mode=mode, block_size=block_size, precondition_bias=precondition_bias, update_every_n_steps=1
    )
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(torch.randint(11, (8, 5))).flatten(0, 1), torch.randint(13, (40,))).backward()
        curvature.update()
    return curvature


def shards_of(tensor: Tensor, n: int) -> list[Tensor]:
    """As FSDP2 cuts: the last of them may have fewer rows, or none."""
    parts = list(tensor.chunk(n))
    return parts + [tensor[:0]] * (n - len(parts))


def directions_together(
    curvature: Curvature, grads: dict[nn.Parameter, Tensor], n: int, is_polar: bool = False
) -> tuple[list[dict[nn.Parameter, Tensor]], list[Threads]]:
    found: list[dict[nn.Parameter, Tensor]] = [{} for _ in range(n)]

    def work(exchange: Threads) -> None:
        own = {p: shards_of(grad, n)[exchange.own_share] for p, grad in grads.items()}
        sharded = ShardedCurvature(curvature, exchange)
        for _ in range(2):  # the second time by a plan that is there
            found[exchange.own_share] = (sharded.precondition_polar if is_polar else sharded.precondition)(own)

    return found, run_in_threads(n, work)


def assert_the_same(together: list[dict[nn.Parameter, Tensor]], alone: dict[nn.Parameter, Tensor]) -> None:
    for p, direction in alone.items():
        parts = [found[p] for found in together]
        assert [part.shape for part in parts] == [part.shape for part in shards_of(direction, len(parts))]
        torch.testing.assert_close(torch.cat(parts), direction, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("mode", ["natural", "polar"])
@pytest.mark.parametrize(("block_size", "precondition_bias"), [(4, False), (5, True), (None, True)])
def test_the_directions_of_all_kinds_of_layers_are_those_of_one_process(
    mode: Mode, n: int, block_size: int | None, precondition_bias: bool
) -> None:
    curvature = curvature_of(mode, block_size, precondition_bias)
    grads = {p: p.grad.clone() for p in curvature.model.parameters() if p.grad is not None}
    before = {p: grad.clone() for p, grad in grads.items()}
    assert_the_same(directions_together(curvature, grads, n)[0], curvature.precondition(grads))
    if mode == "polar":
        found, _ = directions_together(curvature, grads, n, is_polar=True)
        assert_the_same(found, curvature.precondition_polar(grads))
    for p, grad in grads.items():
        assert torch.equal(grad, before[p])
