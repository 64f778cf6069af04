"""The state of `Thor`: parameters numbered as the model numbers them, and states that it cannot take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_thor.optim.adam import FIRST, SECOND, STEP
from lightning_thor.optim.fading import MEAN_SQUARE
from lightning_thor.preconditioning.modes import NATURAL

MOMENTUM = "momentum_buffer"
"""Key of a parameter's state, named as in `torch.optim.SGD`."""

Groups = Sequence[Mapping[str, Any]]
"""The parameter groups of an optimizer."""


def numbered_as_in(parameters: Sequence[nn.Parameter], groups: Groups, state: dict[str, Any]) -> dict[str, Any]:
    """Number parameters by their places among those of the model, instead of by their places in the groups.

    Args:
        parameters: all of the model, in its order.
        groups: of the optimizer.
        state: what `torch.optim.Optimizer.state_dict` returned; its groups are changed.

    Returns:
        The state; as it was if a parameter is none of the model's, or a hook replaced numbers by names.
    """
    numbers = {p: number for number, p in enumerate(parameters)}
    params = [p for group in groups for p in group["params"]]
    own = [number for group in state["param_groups"] for number in group["params"]]
    if not all(p in numbers for p in params) or own != list(range(len(params))):
        return state
    number_of = {old: numbers[p] for old, p in zip(own, params, strict=True)}
    for group in state["param_groups"]:
        group["params"] = [number_of[number] for number in group["params"]]
    return {**state, "state": {number_of.get(key, key): value for key, value in state["state"].items()}}


def check_state(state: Mapping[str, Any], groups: Groups) -> None:
    """Check that a state is of a `Thor` with the modes of these groups.

    Args:
        state: to be loaded.
        groups: of the optimizer that is to load it.

    Raises:
        ValueError: the state is of another optimizer, or a group's of another mode.
    """
    if not any("match_rms" in group for group in state["param_groups"]):
        options = sorted({key for group in state["param_groups"] for key in group} - {"params"})
        raise ValueError(
            f"This state is of another optimizer than Thor (with the options {', '.join(options)}): load the "
            "checkpoint's weights alone, model.load_state_dict(torch.load(path)['state_dict']), and fit without "
            "ckpt_path."
        )
    for saved_group, group in zip(state["param_groups"], groups, strict=False):
        its_mode = saved_group.get("mode", NATURAL.name)  # there was no other before there were modes
        if its_mode != group["mode"]:
            raise ValueError(
                f"This state is of Thor(mode={its_mode!r}), this optimizer of mode={group['mode']!r}, which has "
                f"another momentum. Resume with Thor(mode={its_mode!r}), or start a new fit from the "
                "checkpoint's weights alone."
            )


def check_momenta(state: Mapping[str, Any], groups: Groups) -> None:
    """Check that momenta have the shapes of the parameters in their places: torch's fused kernel goes by the parameter
    alone, and would read and write beyond a smaller momentum.

    Args:
        state: to be loaded, as hooks left it.
        groups: of the optimizer that is to load it.

    Raises:
        ValueError: which one does not fit, and what to do.
    """
    saved_groups = [group["params"] for group in state["param_groups"]]
    if [len(params) for params in saved_groups] != [len(group["params"]) for group in groups]:
        return  # torch's own error
    numbers = [number for params in saved_groups for number in params]
    for number, p in zip(numbers, [p for group in groups for p in group["params"]], strict=True):
        saved = state["state"].get(number, {})
        if missing := {FIRST, SECOND, STEP} - saved.keys() if saved.keys() & {FIRST, SECOND} else ():
            raise _unfit(number, f"lacks {', '.join(sorted(missing))}")
        mean = saved.get(MEAN_SQUARE, 0.0)
        if not (isinstance(mean, float) and 0.0 <= mean < math.inf):
            raise _unfit(number, f"has {mean!r} for its {MEAN_SQUARE}")
        for key in saved.keys() & {MOMENTUM, FIRST, SECOND}:
            value = saved[key]
            if not isinstance(value, Tensor):
                raise _unfit(number, f"has {value!r} for its {key}")
            if not is_lazy(p) and value.shape != p.shape:
                raise _unfit(number, f"has a {key} of {list(value.shape)}, but the parameter is {list(p.shape)}")


def _unfit(number: Any, fault: str) -> ValueError:
    return ValueError(
        f"This state's parameter {number} {fault}: it is damaged, or of a model whose parameters are others, or the "
        "same in another order, by which optimizers know them. Build the model as in the run that was saved, or start "
        "a new fit from the checkpoint's weights alone."
    )
