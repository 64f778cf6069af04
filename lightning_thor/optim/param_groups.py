"""``configure_thor``: a module's parameters, in groups, as one `Thor` optimizer."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_thor.optim.options import FOREIGN_OPTIONS, unknown_options
from lightning_thor.optim.thor import Thor

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def configure_thor(module: nn.Module, lr: float = 6e-3, *, weight_decay: float = 0.0, **options: Any) -> Thor:
    """A `Thor` optimizer of everything in ``module`` that is trained, for ``return`` in ``configure_optimizers``.

    Weights of two or more dimensions decay; biases, norms and scalars do not. (A group that ``add_param_group`` adds
    later, as Lightning's ``BackboneFinetuning`` does, decays as a whole if it has no ``weight_decay`` of its own.)
    Under a Trainer, `ThorCallback` supplies the curvature; outside, pass ``preconditioner=Curvature(module)``.

    Args:
        module: frozen parameters (``requires_grad=False``) are left out.
        lr: learning rate.
        weight_decay: of the weights that decay.
        options: the other arguments of `Thor`.

    Raises:
        ValueError: nothing in ``module`` is trained, or an option is out of its range.
        TypeError: ``module`` is no module, or an option that `Thor` does not have.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    >>> [(len(g["params"]), g["weight_decay"]) for g in configure_thor(net, weight_decay=0.1).param_groups]
    [(1, 0.1), (3, 0.0)]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            "configure_thor takes the module itself, configure_thor(self, lr=...), whose layers it must see; got "
            f"a {type(module).__name__}. Parameters alone go into Thor(parameters, lr=...)."
        )
    known = inspect.signature(Thor).parameters
    if unknown := options.keys() - known:
        raise TypeError(f"configure_thor does not know {unknown_options(unknown, known)}. {FOREIGN_OPTIONS}")
    trained = {p: name for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad=True: nothing to train.")
    of_norms = {p for m in module.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    # A lazy parameter has no dimensions yet.
    is_matrix = {p: not name.endswith("bias") if is_lazy(p) else p.dim() >= 2 for p, name in trained.items()}
    decayed = [p for p in trained if is_matrix[p] and p not in of_norms]
    plain = [p for p in trained if not is_matrix[p] or p in of_norms]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # Its default is that of groups without one of their own, which Lightning's BackboneFinetuning adds.
    optimizer = Thor([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay, **options)
    optimizer.numbered = tuple(module.parameters())
    return optimizer
