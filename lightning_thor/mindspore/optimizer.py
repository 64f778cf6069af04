"""For users of MindSpore: ``thor(...)`` with the signature, the defaults and the numbers of ``mindspore.nn.thor``.

A thin layer over `Curvature` and `Thor`: it chooses the statistics, blocks, damping rule and order of a step of
MindSpore 2.7. New programs are better served by `configure_thor` and `ThorCallback`.

MindSpore's known defects are kept only where its numbers need them: the GPU version divides A of a dense layer by the
number of inputs, and averages a convolution's patches over the batch before their covariance. Not kept: the wrong
inverse of an embedding's G, patches that ignore padding, dilation and groups, and the averaging of inverses over
devices.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.curvature.callables import ParameterFn
from lightning_thor.curvature.curvature import Curvature
from lightning_thor.distributed.factor_reducer import check_split_indices
from lightning_thor.layers.base import LayerKind, Rows, RowsFn
from lightning_thor.layers.conv import CONVOLUTION, batched
from lightning_thor.layers.embedding import EMBEDDING, ascend_embedding_rows
from lightning_thor.layers.linear import LINEAR
from lightning_thor.layers.patches import Convolution, patches_and_values
from lightning_thor.layers.registry import KfacApprox
from lightning_thor.linalg.block_diagonal import partition_with_remainder
from lightning_thor.linalg.dtypes import wide
from lightning_thor.mindspore.arguments import PerStep, StepFunction, check_bool, check_number
from lightning_thor.mindspore.param_groups import Group, Params, groups_of
from lightning_thor.optim.thor import Thor

BLOCK_SIZE = 128
CLIP_NORM = 1.0


def thor(
    net: nn.Module,
    learning_rate: PerStep,
    damping: PerStep,
    momentum: float,
    weight_decay: float = 0.0,
    loss_scale: float = 1.0,
    batch_size: int = 32,
    use_nesterov: bool = False,
    decay_filter: ParameterFn = lambda parameter: True,
    split_indices: Sequence[int] | None = None,
    enable_clip_grad: bool = False,
    frequency: int = 100,
    variant: str = "gpu",
    params: Params | None = None,
) -> MindSporeThor:
    """What ``mindspore.nn.thor`` computes, as a torch optimizer that carries its curvature.

    In a plain loop: ``(loss * loss_scale).backward(); optimizer.step(); optimizer.zero_grad()``. Under a Trainer return
    it from ``configure_optimizers``, without ThorCallback; its state, curvature included, is in the optimizer's
    ``state_dict``.

    Args:
        net: the network, on its device; hooks observe its layers from now on.
        learning_rate: a number, or one per step (past the end the last one holds, with one warning).
        damping: a number greater than 0, or one per step.
        momentum: in [0, 1).
        weight_decay: 0 or greater; added to the preconditioned gradient where ``decay_filter`` allows.
        loss_scale: factor of the loss before ``backward``; greater than 0.
        batch_size: samples per batch (of each process, where there are several): nn.thor does not measure it.
        use_nesterov: Nesterov's momentum.
        decay_filter: whether a parameter decays, given an object whose ``.name`` is the parameter's name.
        split_indices: the layers after which nn.thor begins a new all-reduce. It is checked, and changes no number; for
            several processes see `ThorDDPStrategy`.
        enable_clip_grad: clip each tensor's update, before momentum, to an L2 norm of 1.
        frequency: steps from one update of the curvature to the next; at least 2.
        variant: ``"gpu"`` or ``"ascend"``, whose statistics differ.
        params: the trained parameters: None for all of ``net``, a list of parameters, or MindSpore's list of
            dictionaries with ``params`` (of ``net``) and optionally ``lr`` (as ``learning_rate``), ``weight_decay``
            (for the whole group, whatever ``decay_filter`` says) and ``grad_centralization`` (True subtracts from each
            gradient, before it is preconditioned, its mean over all axes but the first; parameters of convolutions
            only). One more dictionary may have ``order_params`` alone, all parameters in the order that the groups
            keep.

    Returns:
        The optimizer.

    Raises:
        TypeError: an argument of a type that nn.thor refuses.
        ValueError: an argument out of its range, or groups that cannot mean anything.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {net!r}; give parameter groups as params=[...].")
    check_number("momentum", momentum, float)
    check_number("weight_decay", weight_decay, float, int)
    check_number("loss_scale", loss_scale, float, or_zero=False)
    check_number("batch_size", batch_size, int, at_least=1)
    check_bool("use_nesterov", use_nesterov)
    if not callable(decay_filter):
        raise TypeError(f"decay_filter must be a function of a parameter's .name, got {decay_filter!r}.")
    if not (isinstance(split_indices, list | tuple) and len(split_indices) == 0):
        check_split_indices(split_indices)
    check_bool("enable_clip_grad", enable_clip_grad)
    check_number("frequency", frequency, int, at_least=2)
    if variant not in ("gpu", "ascend"):
        raise ValueError(f"variant must be 'gpu' or 'ascend', got {variant!r}.")
    dampings = StepFunction("damping", damping, may_be_zero=False)
    groups = groups_of(net, params, StepFunction("learning_rate", learning_rate), weight_decay, decay_filter)
    is_gpu = variant == "gpu"
    rows: dict[LayerKind, RowsFn] = {
        LINEAR: _gpu_linear_rows if is_gpu else LINEAR.rows,
        CONVOLUTION: _gpu_conv_rows if is_gpu else CONVOLUTION.rows,
        EMBEDDING: partial(ascend_embedding_rows, batch_size=batch_size),
    }
    curvature = Curvature(
        net,
        damping=dampings,
        damping_rule="sqrt",
        block_size=BLOCK_SIZE,
        update_every_n_steps=frequency,
        averaging=0.0,
        max_rows=None,
        statistics=KfacApprox(rows.get, partition=partition_with_remainder, split_embedding_G=False),
        # nn.thor's G is that of the mean loss, times batch_size² / loss_scale².
        loss_reduction="sum",
        loss_multiplier=lambda: loss_scale / batch_size,
        parameters=[p for group in groups for p in group.parameters],
    )
    return MindSporeThor(
        groups,
        _Preconditioner(curvature, groups, loss_scale, batch_size, variant),
        momentum=momentum,
        nesterov=use_nesterov and momentum > 0,
        clip_norm=CLIP_NORM if enable_clip_grad else None,
    )


class MindSporeThor(Thor):
    """The optimizer that `thor` makes: `Thor` without scale matching, with its own learning rate at each step.

    A learning rate that is one number is the groups' ``lr``, which a torch scheduler may change. One per step is
    written there before each step; what a scheduler wrote is lost, with one warning.

    Args:
        groups: the parameters.
        preconditioner: made by `thor`.
        **options: of `Thor`.
    """

    # So that torch.amp.GradScaler hands its scale over: `step` refuses it.
    _step_supports_amp_scaling = True

    def __init__(self, groups: list[Group], preconditioner: _Preconditioner, **options: Any) -> None:
        plain: dict[str, Any] = {"match_rms": None, "decoupled_weight_decay": False}
        torch_groups = [
            {"params": group.parameters, "lr": group.learning_rate(0), "weight_decay": group.weight_decay}
            for group in groups
        ]
        super().__init__(torch_groups, preconditioner=preconditioner, **plain, **options)
        self.learning_rates = [group.learning_rate for group in groups]
        self.curvature = preconditioner.curvature
        self._written: list[float | None] = [None] * len(groups)
        """The rate that the last step wrote into each group."""
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled or copied; a TypeError says what to do."""
        raise TypeError(
            "The optimizer of lightning_thor.mindspore.thor cannot be pickled or copied: it listens to its network. "
            "Save its state_dict(), and load it into the optimizer that thor(net, ...) makes for the other network."
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As `Thor.step`, at this step's learning rates.

        Raises:
            RuntimeError: a `torch.amp.GradScaler` takes this step, whose scale nn.thor's formulas do not know.
        """
        # A GradScaler sets both for this step, and does not take them back after an error.
        if [name for name in ("grad_scale", "found_inf") if self.__dict__.pop(name, self) is not self]:
            raise RuntimeError(
                "The optimizer of lightning_thor.mindspore.thor takes no GradScaler (precision='16-mixed'): nn.thor's "
                "loss scale is one number. Train with precision='bf16-mixed' or '32-true', multiply the loss yourself "
                "by thor(loss_scale=...), or take ThorCallback and configure_thor, which know the GradScaler's."
            )
        # A group that was added later keeps its own rate.
        for index, learning_rate in enumerate(self.learning_rates):
            if not learning_rate.constant:
                self._write_rate(index, learning_rate(self.curvature.step))
        return super().step(closure)

    def _write_rate(self, index: int, rate: float) -> None:
        group = self.param_groups[index]
        if self._written[index] not in (None, group["lr"]) and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Something, such as a torch scheduler, has set the learning rate to {group['lr']}: it is lost, since "
                "thor(learning_rate=...) has one per step. Give one number, which a scheduler may change, or no "
                "scheduler.",
                stacklevel=3,
            )
        group["lr"] = self._written[index] = rate

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, with the curvature under ``"curvature"``."""
        return {**super().state_dict(), "curvature": self.curvature.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it is another optimizer's, or of another network; nothing was changed.
        """
        if "curvature" not in state_dict:
            raise ValueError(
                "This optimizer state holds no curvature: it is not that of lightning_thor.mindspore.thor. Load a "
                "checkpoint of the same optimizer, or load the model's weights alone."
            )
        before = copy.deepcopy(self.curvature.state_dict())
        self.curvature.load_state_dict(state_dict["curvature"])
        try:
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "curvature"})
        except Exception:
            self.curvature.load_state_dict(before)
            raise
        self._written = [None] * len(self._written)


class _Preconditioner:
    """nn.thor's first operations: unscale and precondition gradients; divide a layer norm's by their square."""

    def __init__(
        self, curvature: Curvature, groups: list[Group], loss_scale: float, batch_size: int, variant: str
    ) -> None:
        self.curvature, self.loss_scale, self.batch_size, self.variant = curvature, loss_scale, batch_size, variant
        self.centralized = {p for group in groups if group.grad_centralization for p in group.parameters if p.dim() > 1}
        modules = curvature.model.modules()
        self.norms = {p for module in modules if isinstance(module, nn.LayerNorm) for p in module.parameters()}
        self.damping = 0.0

    def update(self) -> None:
        self.damping = self.curvature.damping_now()
        is_due = self.curvature.is_due()
        self.curvature.update()
        if is_due and self.variant == "ascend":
            # There nn.thor takes the identity for G⁻¹ of dense layers with two outputs (a special case for BERT's next
            # sentence head). They are found anew, since layers that are included later move them.
            for index, layer in enumerate(self.curvature.layers.values()):
                if isinstance(layer.module, nn.Linear) and layer.module.out_features == 2:
                    G_inverse = self.curvature.factors.blocks(index, "G", "inverse")
                    G_inverse.copy_(torch.eye(G_inverse.shape[-1], dtype=G_inverse.dtype, device=G_inverse.device))

    def forget(self) -> None:
        self.curvature.forget()

    def precondition(self, grads: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        # In float16 what the loss scale keeps above 0 would be lost.
        unscaled = {p: grad.to(wide(grad.dtype)) / self.loss_scale for p, grad in grads.items()}
        for p in self.centralized & unscaled.keys():
            unscaled[p].sub_(unscaled[p].mean(dim=tuple(range(1, p.dim())), keepdim=True))
        directions = self.curvature.precondition(unscaled)
        for p in self.norms & directions.keys():
            directions[p].div_(directions[p].square() / self.batch_size + self.damping**0.5)
        return directions


def _gpu_linear_rows(module: nn.Linear, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """A = aᵀa / in_features, where Ascend (and the paper) divide by the number of rows; G = gᵀg / rows."""
    rows = LINEAR.rows(module, a, g, dtype, None)
    assert rows.a is not None
    return rows._replace(a=rows.a * (rows.n_samples / rows.a.shape[1]) ** 0.5)


def _gpu_conv_rows(module: Convolution, a: Tensor, g: Tensor, dtype: torch.dtype, max_rows: int | None) -> Rows:
    """Patches and gradients averaged over the batch first: one sample, whose rows are the output positions."""
    a, g = batched(module, a, g)
    mean_a, mean_g = a.detach().to(dtype).mean(0, keepdim=True), g.to(dtype).mean(0, keepdim=True)
    return Rows(*patches_and_values(module, mean_a, mean_g, dtype, None))
