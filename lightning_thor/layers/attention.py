"""Notes what `nn.MultiheadAttention` multiplies by its weights, which it does without calling a module.

Its forward hands bare parameters to `F.multi_head_attention_forward`. While a pass is noted, that function is
replaced by its own code over other globals, in which the three functions that multiply by a weight note their inputs
and outputs first. So torch computes what it always does, in every variant, and nothing of it is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROLES = ("q_proj", "k_proj", "v_proj", "out_proj")


Note = Callable[[str, Tensor, Tensor, Callable[[Tensor], Tensor]], None]
"""Called with the role of a weight, its input, its output, and what brings either to ``[batch, positions, width]``."""


_CODE: CodeType = F.multi_head_attention_forward.__code__


# The out projection is the only weight that the function's own code multiplies by; two helpers do the others.
IS_SUPPORTED = {"linear", "_in_projection_packed", "_in_projection", "has_torch_function"} <= set(_CODE.co_names)
"""False if this torch's attention is written in another way than 2.5 to 2.13's."""


class RecordProducts(TorchFunctionMode):
    """A context in which calls of `F.multi_head_attention_forward` are noted; everything else passes through.

    Args:
        note: called in forward, before the output is used.
    """

    def __init__(self, note: Note) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Tensor subclasses may have an attention of their own.
        if func is F.multi_head_attention_forward and all(cls in (Tensor, torch.nn.Parameter) for cls in types):
            # Under torch.compile the code over other globals is a graph break: dynamo would guard on torch's own.
            func = torch.compiler.disable(_noted(self.note, args[0]))
        return func(*args, **(kwargs or {}))


def _noted(note: Note, query: Tensor) -> Callable[..., Any]:
    """`F.multi_head_attention_forward`, noting; ``query`` is ``[positions, batch, width]`` or has no batch."""
    batch = query.shape[1] if query.dim() == 3 else 1

    def arranged(x: Tensor) -> Tensor:
        # [positions, batch, width], or the first two as one
        return (x if x.dim() == 3 else x.unflatten(0, (query.shape[0], batch))).transpose(0, 1)

    def projections_noted(projections: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def noting(q: Tensor, k: Tensor, v: Tensor, *weights: Any) -> tuple[Tensor, ...]:
            outputs = projections(q, k, v, *weights)
            for role, a, output in zip(ROLES, (q, k, v), outputs, strict=False):
                note(role, a, output, arranged)
            return outputs

        return noting

    def linear(a: Tensor, *weights: Any) -> Tensor:
        output = F.linear(a, *weights)
        note("out_proj", a, output, arranged)
        return output

    own = vars(F)
    names = {
        **own,
        "linear": linear,
        "_in_projection_packed": projections_noted(own["_in_projection_packed"]),
        "_in_projection": projections_noted(own["_in_projection"]),
        # Another mode (a default device) would be handed the original, and still sees every operation inside.
        "has_torch_function": lambda tensors: False,
    }
    original: Any = F.multi_head_attention_forward
    function = FunctionType(_CODE, names, original.__name__, original.__defaults__, original.__closure__)
    function.__kwdefaults__ = original.__kwdefaults__
    return function
