"""What nn.thor computes, written from its formulas in float64 NumPy: a reference that shares no code with the package.

N is the ``batch_size`` argument, S the loss scale, λ the damping of the step; statistics only where
``step % frequency == 0``, each from that batch alone:

* dense: A = xᵀx / in_features (GPU) or xᵀx / rows (Ascend), G = doutᵀdout / rows; (A + √λ I)⁻¹ and (G N²/S² + √λ I)⁻¹;
  on Ascend a layer with two outputs has the identity in the place of G⁻¹.
* convolution: on a GPU patches and gradients are averaged over the batch first, P Pᵀ / positions; on Ascend
  patchesᵀpatches / (images · positions); √(λ / positions) on both sides, and 1 / positions on the update.
* embedding: 1 / (counts / N + √λ) for each row and (G N²/S² + √λ I)⁻¹, G = doutᵀdout / tokens, never cut.
* layer norm, every step: g / (g² / N + √λ). All else: g.

Dense and convolution: A and G in diagonal blocks of 128, the remainder last. Then weight decay, a clip of each tensor
to an L2 norm of 1, momentum. Several processes: the mean of their factors, and of their gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
Factors = dict[str, tuple[Array, Array]]


class NumpyThor:
    """Trains a copy of ``net`` by the formulas; gradients alone come from autograd."""

    def __init__(
        self,
        net: nn.Module,
        learning_rate: Sequence[float],
        damping: Sequence[float],
        momentum: float,
        *,
        weight_decay: float,
        loss_scale: float,
        batch_size: int,
        use_nesterov: bool,
        enable_clip_grad: bool,
        frequency: int,
        variant: str,
        decays: Callable[[str], bool],
    ) -> None:
        self.net = copy.deepcopy(net)
        self.learning_rate, self.damping, self.momentum = learning_rate, damping, momentum
        self.weight_decay, self.loss_scale, self.batch_size = weight_decay, loss_scale, batch_size
        self.use_nesterov, self.enable_clip_grad = use_nesterov, enable_clip_grad
        self.frequency, self.variant, self.decays = frequency, variant, decays
        self.weights = {name: p.detach().numpy() for name, p in self.net.named_parameters()}  # views
        self.moments = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        self.inverses: Factors = {}
        self.step_number = 0
        self.clipped: list[bool] = []
        self.seen: dict[str, tuple[Array, Array]] = {}
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                module.register_forward_hook(self._keep(name))

    def step(self, *losses: Callable[[nn.Module], Tensor]) -> None:
        """One step; each loss is one process's, of its part of the batch."""
        damping = self.damping[min(self.step_number, len(self.damping) - 1)]
        rate = self.learning_rate[min(self.step_number, len(self.learning_rate) - 1)]
        gradients = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        factors: list[Factors] = []
        for loss in losses:
            self.net.zero_grad()
            (loss(self.net) * self.loss_scale).backward()
            factors.append({name: self._factors(name, *pair) for name, pair in self.seen.items()})
            for name, p in self.net.named_parameters():
                gradients[name] += p.grad.numpy() / self.loss_scale / len(losses)
        if self.step_number % self.frequency == 0:
            for name in factors[0]:
                A, G = (np.mean([one[name][side] for one in factors], axis=0) for side in (0, 1))
                self.inverses[name] = self._inverses(name, A, G, damping)
        for name, gradient in gradients.items():
            update = self._precondition(name, gradient, damping)
            if self.decays(name):
                update = update + self.weight_decay * self.weights[name]
            if self.enable_clip_grad:
                self.clipped.append(bool(np.linalg.norm(update) > 1.0))
                update = update / max(1.0, float(np.linalg.norm(update)))
            self.moments[name] = self.momentum * self.moments[name] + update
            ahead = update + self.momentum * self.moments[name]
            self.weights[name] -= rate * (ahead if self.use_nesterov else self.moments[name])
        self.step_number += 1

    def _keep(self, name: str) -> Callable[..., None]:
        def on_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().numpy().copy()
            output.register_hook(lambda g: self.seen.__setitem__(name, (x, g.numpy().copy())))

        return on_forward

    def _factors(self, name: str, x: Array, dout: Array) -> tuple[Array, Array]:
        module: Any = self.net.get_submodule(name)
        if isinstance(module, nn.Embedding):
            tokens, rows = x.reshape(-1), dout.reshape(-1, dout.shape[-1])
            return np.bincount(tokens.astype(int), minlength=module.num_embeddings).astype(float), rows.T @ rows / len(
                rows
            )
        if isinstance(module, nn.Linear):
            x, dout = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
            return x.T @ x / (x.shape[1] if self.variant == "gpu" else len(x)), dout.T @ dout / len(dout)
        P, D = patches(x, module), dout.reshape(*dout.shape[:2], -1)
        if self.variant == "gpu":
            P, D = P.mean(0), D.mean(0)
            return P @ P.T / P.shape[1], D @ D.T / D.shape[1]
        rows = len(P) * P.shape[2]
        return np.einsum("nip,njp->ij", P, P) / rows, np.einsum("nip,njp->ij", D, D) / rows

    def _inverses(self, name: str, A: Array, G: Array, damping: float) -> tuple[Array, Array]:
        module = self.net.get_submodule(name)
        G = G * self.batch_size**2 / self.loss_scale**2
        if isinstance(module, nn.Embedding):
            root = np.sqrt(damping)
            return 1.0 / (A / self.batch_size + root), np.linalg.inv(G + root * np.eye(len(G)))
        if isinstance(module, nn.Linear):
            G_inverse = block_inverse(G, np.sqrt(damping))
            if self.variant == "ascend" and module.out_features == 2:
                G_inverse = np.eye(2)
            return block_inverse(A, np.sqrt(damping)), G_inverse
        positions = self.seen[name][1][0, 0].size
        root = np.sqrt(damping / positions)
        return block_inverse(A, root) / np.sqrt(positions), block_inverse(G, root) / np.sqrt(positions)

    def _precondition(self, parameter: str, gradient: Array, damping: float) -> Array:
        name, _, kind = parameter.rpartition(".")
        module = self.net.get_submodule(name)
        if isinstance(module, nn.LayerNorm):
            return gradient / (gradient**2 / self.batch_size + np.sqrt(damping))
        if kind == "bias" or name not in self.inverses:
            return gradient
        A_inverse, G_inverse = self.inverses[name]
        if isinstance(module, nn.Embedding):
            return A_inverse[:, None] * gradient @ G_inverse
        return (G_inverse @ gradient.reshape(len(gradient), -1) @ A_inverse).reshape(gradient.shape)


def patches(x: Array, module: nn.Conv2d) -> Array:
    """``[batch, channels, height, width]`` to ``[batch, channels * kernel, positions]``, one patch after another."""
    (down, right), (step_i, step_j) = module.stride, module.dilation
    height, width = ((k - 1) * step + 1 for k, step in zip(module.kernel_size, module.dilation, strict=True))
    assert isinstance(module.padding, tuple)
    above, left = (int(n) for n in module.padding)
    x = np.pad(x, ((0, 0), (0, 0), (above, above), (left, left)))
    columns = [
        x[:, :, i : i + height : step_i, j : j + width : step_j].reshape(len(x), -1)
        for i in range(0, x.shape[2] - height + 1, down)
        for j in range(0, x.shape[3] - width + 1, right)
    ]
    return np.stack(columns, axis=2)


def block_inverse(matrix: Array, damping: float) -> Array:
    """Inverse of the diagonal blocks of 128 (a smaller one last) of ``matrix + damping * I``, zero elsewhere."""
    inverse = np.zeros_like(matrix)
    for start in range(0, len(matrix), 128):
        block = slice(start, min(start + 128, len(matrix)))
        damped = matrix[block, block] + damping * np.eye(len(matrix[block, block]))
        inverse[block, block] = np.linalg.inv(damped)
    return inverse


def float64(net: nn.Module, seed: int) -> nn.Module:
    """``net`` in float64, its weights (the scales of norms included) drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(p.shape[-1], 4) ** 0.5)
    return net
