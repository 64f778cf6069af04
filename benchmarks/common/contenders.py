"""The compared optimizers, in one table: how each is built, and its learning rates to try.

Every optimizer has its documented defaults except for the options in the table. None decays weights itself: the
training loop does, alike for all. Each has the same number of learning rates, half decades over two decades around its
usual ones, except the untuned contender, which has its default alone.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor
from lightning_thor.preconditioning.grouping import Directions, Tensors

DEFAULT_RATE = 6e-3
"""Of `Thor`."""

TRIALS = 5
"""Learning rates to try for each tuned contender."""


class Stepper(Protocol):
    """The part of an optimizer that a training loop uses."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any:
        """Change the parameters by their gradients."""

    def zero_grad(self) -> None:
        """Clear the gradients."""


class CombinedOptimizer:
    """Several optimizers, each for some of a model's parameters, as one."""

    def __init__(self, *optimizers: Stepper) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Take one step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class FlatMuon(torch.optim.Muon):
    """`torch.optim.Muon`, which takes matrices only, for kernels too: as matrices ``[out, in * kernel]``, as is usual.

    On a CPU its Newton-Schulz iteration runs in float32: torch's bfloat16 takes up to 50 times as long there, a
    handicap that Muon has on this machine alone.
    """

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        self.originals = list(params)
        # Views: a change to them changes the model.
        self.matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in self.originals]
        super().__init__(self.matrices, **options)

    def step(self, closure: Any = None) -> Any:
        """As of any optimizer."""
        for p, matrix in zip(self.originals, self.matrices, strict=True):
            matrix.grad = None if p.grad is None else p.grad.reshape(matrix.shape)
        if self.originals[0].device.type != "cpu":
            return super().step(closure)  # type: ignore[no-untyped-call]
        with patch("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz):
            return super().step(closure)  # type: ignore[no-untyped-call]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of parameters and matrices; always to None."""
        for p in (*self.originals, *self.matrices):
            p.grad = None


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximate the polar factor in the precision of ``matrix``: ``X <- a X + (b X Xᵀ + c (X Xᵀ)²) X``, from
    ``matrix`` over its Frobenius norm (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    Args:
        matrix: ``[m, n]``.
        coefficients: a, b and c.
        steps: number of iterations.
        eps: lower bound of the norm to divide by.

    Returns:
        ``[m, n]``, with singular values near 1.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


Build = Callable[[nn.Module, float, Mapping[str, Any], bool], Stepper]
"""From the model, the learning rate, options, and whether the loss is a mean over positions as well as samples."""


@dataclass(frozen=True)
class Contender:
    """One optimizer of a comparison."""

    label: str
    build: Build
    rates: tuple[float, ...]
    """The learning rates to try; a single one is not tuned."""
    colour: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options for ``build``, in plain types: results of one contender with other options are kept apart by them."""


def thor(model: nn.Module, lr: float, options: Mapping[str, Any], per_position: bool) -> Stepper:
    """`Thor` with its curvature; ``options`` hold those of each under ``"curvature"`` and ``"optimizer"``."""
    curvature = Curvature(model, **options.get("curvature", {}))
    return Thor(model.parameters(), lr=lr, preconditioner=curvature, **options.get("optimizer", {}))


class Identity:
    """A preconditioner that leaves gradients as they are."""

    def update(self) -> None:
        """Do nothing."""

    def precondition(self, grads: Tensors) -> Directions:
        """Copy the gradients."""
        return {p: grad.clone() for p, grad in grads.items()}


def without_curvature(model: nn.Module, lr: float, options: Mapping[str, Any], per_position: bool) -> Stepper:
    """What is left of `Thor` without curvature: momentum with matched scale on plain gradients, at any rate."""
    return Thor(model.parameters(), lr=lr, max_relative_step=None, preconditioner=Identity(), **options)


def plain(optimizer_type: Callable[..., Stepper]) -> Build:
    """An optimizer that takes parameters, ``lr`` and the options."""
    return lambda model, lr, options, per_position: optimizer_type(model.parameters(), lr=lr, **options)


def muon(model: nn.Module, lr: float, options: Mapping[str, Any], per_position: bool) -> Stepper:
    """Muon for hidden matrices and kernels; AdamW, at the same rate, for embeddings, the head and vectors."""
    hidden: list[Any] = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][:-1]
    return CombinedOptimizer(
        FlatMuon(hidden, lr=lr, weight_decay=0.0, **options),
        torch.optim.AdamW(others(model, hidden), lr=lr, weight_decay=0.0),
    )


def soap(params: Iterable[nn.Parameter], **options: Any) -> Stepper:
    """SOAP (pytorch_optimizer)."""
    import pytorch_optimizer

    return pytorch_optimizer.SOAP(params, weight_decay=0.0, **options)


def shampoo(params: Iterable[nn.Parameter], **options: Any) -> Stepper:
    """Distributed Shampoo (pytorch_optimizer)."""
    import pytorch_optimizer

    return pytorch_optimizer.ScalableShampoo(params, **options)


def singd(model: nn.Module, lr: float, options: Mapping[str, Any], per_position: bool) -> Stepper:
    """SINGD, an inverse-free K-FAC (singd), for linear layers and convolutions; AdamW at its default for the rest."""
    from singd.optim.optimizer import SINGD

    own = [p for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in m.parameters(recurse=False)]
    kfac = SINGD(model, own, lr=lr, loss_average="batch+sequence" if per_position else "batch", **options)
    rest = others(model, own)
    return CombinedOptimizer(kfac, torch.optim.AdamW(rest, weight_decay=0.0)) if rest else kfac


def others(model: nn.Module, own: Iterable[Tensor]) -> list[nn.Parameter]:
    """The parameters of ``model`` that are not in ``own``."""
    ids = set(map(id, own))
    return [p for p in model.parameters() if id(p) not in ids]


def half_decades(first: float) -> tuple[float, ...]:
    """``TRIALS`` learning rates from ``first`` on, two to a decade: 1, 3, 10, ...

    >>> half_decades(3e-4)
    (0.0003, 0.001, 0.003, 0.01, 0.03)
    """
    series = [float(f"{digit}e{exponent}") for exponent in range(-6, 3) for digit in (1, 3)]
    start = series.index(first)
    return tuple(series[start : start + TRIALS])


POLAR = {"curvature": {"mode": "polar"}, "optimizer": {"mode": "polar"}}
ADAM = {"curvature": {"mode": "adam"}, "optimizer": {"mode": "adam"}}
NATURAL = {
    "curvature": {"damping_rule": "pi", "damping": 0.03, "block_size": 128},
    "optimizer": {"match_rms": None, "kl_clip": 1e-3, "nesterov": False},
}
FALLBACK = {
    "curvature": {"damping_rule": "sqrt", "damping": 0.03, "averaging": 0.0, "block_size": 128},
    "optimizer": {"match_rms": None, "nesterov": False},
}

CONTENDERS = {
    "thor": Contender("THOR", thor, half_decades(1e-3), "tab:red"),
    "thor_untuned": Contender("THOR, untuned", thor, (DEFAULT_RATE,), "lightcoral"),
    # The rates of Muon, whose steps have the same size.
    "thor_polar": Contender("THOR, polar", thor, half_decades(1e-3), "tab:pink", POLAR),
    # The rates of AdamW, whose steps have the same size.
    "thor_adam": Contender("THOR, adam", thor, half_decades(3e-4), "tab:olive", ADAM),
    # KL clip at kfac-pytorch's value; damping as in the design's trial.
    "thor_natural": Contender("THOR, KL clip and π", thor, half_decades(3e-2), "tab:orange", NATURAL),
    # Damping of about the size with which nn.thor's published recipes begin.
    "thor_plain": Contender("THOR, as nn.thor", thor, half_decades(1e-3), "gold", FALLBACK),
    "without": Contender("THOR without curvature", without_curvature, half_decades(3e-4), "lightgray"),
    "sgd": Contender("momentum SGD", plain(torch.optim.SGD), half_decades(1e-2), "tab:gray", {"momentum": 0.9}),
    "adamw": Contender("AdamW", plain(partial(torch.optim.AdamW, weight_decay=0.0)), half_decades(3e-4), "tab:blue"),
    # torch documents this rule for rates known from AdamW: with it one rate serves both halves.
    "muon": Contender("Muon", muon, half_decades(1e-3), "tab:green", {"adjust_lr_fn": "match_rms_adamw"}),
    "soap": Contender("SOAP", plain(soap), half_decades(3e-4), "tab:purple"),
    # Not the defaults: those first precondition at step 1000, and graft SGD's norm, which suits no transformer.
    "shampoo": Contender(
        "Shampoo", plain(shampoo), half_decades(3e-4), "tab:brown",
        # 3 is its RMSPROP. On a CPU, roots by SVD take a fifth of its iteration's time.
        {"preconditioning_compute_steps": 20, "graft_type": 3, "moving_average_for_momentum": True, "use_svd": True},
    ),
    # Its authors advise normalised rates of the factors where they are not scheduled.
    "singd": Contender("SINGD (K-FAC)", singd, half_decades(3e-3), "tab:cyan", {"normalize_lr_cov": True}),
}  # fmt: skip
