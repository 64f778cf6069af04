"""The migration door against recorded runs of MindSpore's own nn.thor, see recordings/README.md."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_thor import ThorCallback
from lightning_thor.mindspore.optimizer import MindSporeThor, thor
from tests.helpers.boring import Boring, assert_bitwise, trainer, without_words

FOLDER = Path(__file__).parent / "recordings"

CASES = ["mlp", "mlp_ls128_nesterov", "convnet", "convnet_ascend_translit", "text"]


class ConvNet(nn.Module):
    """The recorded convnet; "same" padding with stride 2 there is a zero after each axis here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2)
        self.fc = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.fc(F.relu(self.conv2(F.pad(x, (0, 1, 0, 1)))).flatten(1))
        return out


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.ln = nn.LayerNorm(8, eps=1e-7)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.ln(self.embedding(x)).mean(1))
        return out


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(20, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return out


def torch_name(name: str) -> str:
    for there, here in ((".gamma", ".weight"), (".beta", ".bias"), ("embedding_table", "weight")):
        name = name.replace(there, here)
    return name


def close(ours: Tensor, theirs: Any, first: bool, what: str) -> None:
    """1e-5 of the largest entry after the first step, 1e-4 to the end."""
    recorded = torch.as_tensor(theirs, dtype=torch.float64)
    error = (ours.detach().double().reshape(recorded.shape) - recorded).abs().max() / recorded.abs().max()
    assert error < (1e-5 if first else 1e-4), f"{what}: off by {float(error):.2e} of its largest entry"


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_trajectory_is_followed(case: str) -> None:
    """Weights, moments, factors and inverses, step by step; the text's table apart, whose inverse is wrong there."""
    z = dict(np.load(FOLDER / f"{case}.npz"))
    meta = json.loads(str(z.pop("meta")))
    net: nn.Module = {"mlp": MLP, "mlp_ls128_nesterov": MLP, "text": Text}.get(case, ConvNet)()
    own = dict(net.named_parameters())
    names = {name: own[torch_name(name)] for name in meta["param_order"]}
    with torch.no_grad():
        for name, p in names.items():
            p.copy_(torch.from_numpy(z[f"w/{name}"][0]))
    decays = {torch_name(name): decay for name, decay in meta["decay_flags"].items()}
    scale = meta["loss_scale"]
    optimizer = thor(
        net,
        z["lr"].tolist(),
        torch.from_numpy(z["damping"]),
        meta["momentum"],
        weight_decay=meta["weight_decay"],
        loss_scale=scale,
        batch_size=meta["batch_size"],
        use_nesterov=meta["use_nesterov"],
        decay_filter=lambda p: decays[p.name],
        enable_clip_grad=meta["enable_clip_grad"],
        frequency=meta["frequency"],
        variant="ascend" if "ascend" in case else "gpu",
    )
    updates = 0
    for step in range(meta["steps"]):
        due = optimizer.curvature.is_due()
        assert due == z["is_update"][step]
        x = torch.from_numpy(z["x"][step])
        loss = F.cross_entropy(net(x.long() if case == "text" else x), torch.from_numpy(z["y"][step]).long())
        assert loss.item() == pytest.approx(float(z["loss"][step]), rel=1e-4)
        (loss * scale).backward()
        optimizer.step()
        first = step == 0
        for name, p in names.items():
            if case == "text" and p is net.embedding.weight:
                p.data.copy_(torch.from_numpy(z[f"w/{name}"][step + 1]))
                continue
            close(p, z[f"w/{name}"][step + 1], first, f"{name} after step {step}")
            close(optimizer.state[p]["momentum_buffer"], z[f"moment/{name}"][step], first, f"moment of {name}, {step}")
        if due:
            follow_factors(optimizer, z, meta, updates, case, first)
            updates += 1
        optimizer.zero_grad()
    assert updates == 2


def follow_factors(
    optimizer: MindSporeThor, z: dict[str, Any], meta: dict[str, Any], update: int, case: str, first: bool
) -> None:
    """Raw A and G, and the inverses, in nn.thor's units: G without its factor batch_size² / loss_scale²."""
    stacks, names = optimizer.curvature.factors, list(optimizer.curvature.layers)
    assert names == meta["layers"]
    per_sample = (meta["batch_size"] / meta["loss_scale"]) ** 2
    for i, name in enumerate(names):
        positions = float(stacks.positions[i])
        counted = meta["batch_size"] if name == "embedding" else 1  # recorded: counts, not yet over batch_size
        A = counted * stacks.blocks(i, "A", "average")
        close(A, z[f"A/{name}"][update], first, f"A of {name}, update {update}")
        G = stacks.blocks(i, "G", "average") / positions / per_sample
        close(G, z[f"G/{name}"][update], first, f"G of {name}, update {update}")
        # Convolutions there: 1 / positions is shared by both inverses on a GPU, and a factor of its own on Ascend.
        share = 0.0 if case.endswith("ascend_translit") else 0.5
        A_inverse = stacks.blocks(i, "A", "inverse") / positions**share
        close(A_inverse, z[f"Ainv/{name}"][update], first, f"A⁻¹ of {name}, update {update}")
        if name != "embedding":  # wrong there
            G_inverse = stacks.blocks(i, "G", "inverse") * positions ** (1 - share)
            close(G_inverse, z[f"Ginv/{name}"][update], first, f"G⁻¹ of {name}, update {update}")


# ── what the recordings do not have ──


def grad_of(net: nn.Module, x: Tensor) -> None:
    net(x).square().sum(1).mean().backward()


def test_a_width_over_128_has_blocks_of_128_and_the_remainder_last() -> None:
    """Against dense inverses of the blocks in index order, in float64."""
    net = nn.Linear(300, 5, bias=False).double()
    optimizer = thor(net, 0.1, 0.3, 0.0, batch_size=16)
    x = torch.randn(16, 300, dtype=torch.float64)
    grad_of(net, x)
    before, grad = net.weight.detach().clone(), net.weight.grad
    y = (x @ before.T).requires_grad_()
    (gradients,) = torch.autograd.grad(y.square().sum(1).mean(), y)
    A, G = x.T @ x / 300, gradients.T @ gradients / 16 * 16**2
    A_inverse = torch.zeros(300, 300, dtype=torch.float64)
    for start, stop in ((0, 128), (128, 256), (256, 300)):
        block = slice(start, stop)
        A_inverse[block, block] = torch.linalg.inv(A[block, block] + 0.3**0.5 * torch.eye(stop - start))
    expected = before - 0.1 * torch.linalg.inv(G + 0.3**0.5 * torch.eye(5)) @ grad @ A_inverse
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), expected)


def test_enable_clip_grad_clips_each_tensor_after_weight_decay() -> None:
    net, free = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    free.load_state_dict(net.state_dict())
    x = 100 * torch.randn(8, 4, dtype=torch.float64)
    moments = []
    for module, clip in ((net, True), (free, False)):
        optimizer = thor(module, 0.1, 1e-3, 0.9, weight_decay=10.0, batch_size=8, enable_clip_grad=clip)
        grad_of(module, x)
        optimizer.step()
        moments.append([optimizer.state[p]["momentum_buffer"] for p in module.parameters()])
    for clipped, whole in zip(*moments, strict=True):
        torch.testing.assert_close(clipped, whole / max(1.0, float(whole.norm())))
    assert any(whole.norm() > 1 for whole in moments[1])


def test_an_embedding_has_the_right_inverse() -> None:
    """1 / (counts / N + sqrt(damping)) for each row, (G + sqrt(damping) I)⁻¹ whole."""
    net = nn.Sequential(nn.Embedding(6, 200), nn.Flatten()).double()
    optimizer = thor(net, 0.1, 0.04, 0.0, batch_size=3)
    tokens = torch.tensor([[0, 1], [1, 5], [1, 2]])
    table: Any = net[0].weight
    rows = table.detach()[tokens].requires_grad_()
    (g,) = torch.autograd.grad(rows.flatten(1).square().sum(1).mean(), rows)
    grad_of(net, tokens)
    before, grad = table.detach().clone(), table.grad
    G = g.reshape(6, 200).T @ g.reshape(6, 200) / 6 * 3**2
    scaled = grad / (tokens.flatten().bincount(minlength=6)[:, None] / 3 + 0.2)
    optimizer.step()
    expected = before - 0.1 * scaled @ torch.linalg.inv(G + 0.2 * torch.eye(200))
    torch.testing.assert_close(table.detach(), expected)


def test_a_state_of_another_optimizer_is_refused() -> None:
    net = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="holds no curvature"):
        thor(net, 0.1, 0.1, 0.9).load_state_dict(torch.optim.SGD(net.parameters(), lr=0.1).state_dict())


class Migrated(Boring):
    """A parameter group of its own, settings that change with every step and end before the fit does."""

    def configure_optimizers(self) -> Any:
        own = list(self.net.parameters())
        params = [
            {"params": own[:4], "lr": [0.01, 0.02, 0.03, 0.01, 0.02, 0.03, 0.01], "grad_centralization": True},
            {"params": own[4:], "weight_decay": 0.1},
        ]
        return thor(
            self.net,
            0.01,
            [0.1 / step for step in range(1, 9)],
            0.9,
            batch_size=self.batch_size,
            frequency=3,
            params=params,
        )


def plain_fit(folder: Path, module: L.LightningModule, epochs: int, **options: Any) -> L.Trainer:
    found = trainer(folder, max_epochs=epochs)
    found.callbacks = [c for c in found.callbacks if not isinstance(c, ThorCallback)]
    found.fit(module, **options)
    return found


@pytest.mark.filterwarnings("ignore:.* the last one holds from here on")
@pytest.mark.parametrize("epochs", [1, 2])
def test_it_trains_and_resumes_under_a_trainer(tmp_path: Path, epochs: int) -> None:
    """Bitwise, in weights, momentum and curvature, with a checkpoint between two refreshes or behind the settings."""
    unbroken = plain_fit(tmp_path, Migrated(), 3)
    first = plain_fit(tmp_path, Migrated(), epochs)
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = plain_fit(tmp_path, Migrated(), 3, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert resumed.global_step == 12
    ours, theirs = (dict(t.lightning_module.named_parameters()) for t in (resumed, unbroken))
    assert_bitwise(ours, theirs)
    ours, theirs = (t.optimizers[0].state_dict() for t in (resumed, unbroken))
    assert ours.keys() == {"state", "param_groups", "curvature"}
    assert_bitwise(without_words(ours), without_words(theirs))


@pytest.mark.filterwarnings("ignore:.* the last one holds from here on")
def test_a_fit_is_the_plain_loop(tmp_path: Path) -> None:
    fitted = plain_fit(tmp_path, Migrated(), 2).lightning_module
    module = Migrated()
    optimizer = module.configure_optimizers()
    for _ in range(2):
        for x, y in module.data():
            module.loss(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_bitwise(dict(module.named_parameters()), dict(fitted.named_parameters()))


def test_its_state_can_be_saved_without_a_trainer() -> None:
    net = nn.Linear(4, 3)
    optimizer = thor(net, 0.1, 0.1, 0.9)
    grad_of(net, torch.randn(8, 4))
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = thor(copy.deepcopy(net), 0.1, 0.1, 0.9)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.curvature.step == 1
    torch.testing.assert_close(
        twin.curvature.factors.batches[4].inverse, optimizer.curvature.factors.batches[4].inverse
    )


def test_the_callback_beside_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found a MindSporeThor that has a preconditioner already"):
        trainer(tmp_path).fit(Migrated())
