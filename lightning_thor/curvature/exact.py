"""The factors of a whole data set at fixed weights, where a training only has an average over its last batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.curvature.curvature import Curvature


def exact_factors(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], **options: Any
) -> dict[str, dict[str, Any]]:
    """Compute A and G of each layer over all batches, in evaluation mode, as `Curvature.export` returns them.

    With the data's own targets the result is the empirical Fisher matrix's. With targets that are drawn from the
    model's predictions it estimates, without bias, the Fisher matrix itself, which for cross-entropy and squared error
    is the generalized Gauss-Newton matrix (Kunstner et al. 2019, arXiv:1905.12558)::

        def loss(model, batch):
            logits = model(batch[0])
            return F.cross_entropy(logits, torch.distributions.Categorical(logits=logits.detach()).sample())

    The model and its gradients are left as they were. Where several processes train together all must call this. In
    training, between the micro-batches of a step, call it ``with curvature.paused()`` (under a Trainer of
    ``callback.curvature``): otherwise that curvature observes these passes too.

    Args:
        model: its parameters must be on their device already.
        batches: read once.
        loss: of the model and a batch: the mean over its samples.
        **options: of `Curvature`. Factors are whole (``block_size=None``) and of all rows (``max_rows=None``) unless
            you say otherwise.

    Returns:
        As of `Curvature.export`.

    Raises:
        ValueError: there is no batch, or an option is out of its range.
    """
    with torch.inference_mode(False):
        curvature = Curvature(model, **({"block_size": None, "max_rows": None} | options | {"averaging": 0.0}))
    curvature.is_listening = lambda: True
    modes = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in model.parameters()}
    n_batches = 0
    try:
        model.eval()
        model.zero_grad()
        with torch.inference_mode(False), torch.enable_grad():
            for n_batches, batch in enumerate(batches, start=1):  # noqa: B007 - its last value is asked for
                model.zero_grad(set_to_none=False)  # None would mean that what was observed is to be forgotten
                loss(model, batch).backward()
        if not n_batches:
            raise ValueError("exact_factors got no batch.")
        curvature.update()
        return curvature.export()
    finally:
        curvature.close()
        for module, was_training in modes.items():
            module.training = was_training
        for p, gradient in gradients.items():
            p.grad = gradient
