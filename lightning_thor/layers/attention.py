"""Records the products with weights in `nn.MultiheadAttention`, which calls no module for them.

Its forward hands bare parameters to `F.multi_head_attention_forward`. While a pass is recorded, that function is
replaced by its own code over other globals, in which the three functions that multiply by a weight record their inputs
and outputs. So torch computes what it always does, in every variant, and no code of torch is repeated here.
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
"""The weights of an attention."""


Note = Callable[[str, Tensor, Tensor, Callable[[Tensor], Tensor]], None]
"""Called with the role of a weight, its input, its output, and a function that brings either of them to ``[batch,
positions, width]``."""


_CODE: CodeType = F.multi_head_attention_forward.__code__


# The function's own code multiplies by the output projection alone; two helpers multiply by the other weights.
IS_SUPPORTED = {"linear", "_in_projection_packed", "_in_projection", "has_torch_function"} <= set(_CODE.co_names)
"""False if the attention of this version of torch is written differently from torch 2.5's to 2.13's."""


class RecordProducts(TorchFunctionMode):
    """A context that records the products in `F.multi_head_attention_forward`; every other call passes through.

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
            func = torch.compiler.disable(_recording(self.note, args[0]))
        return func(*args, **(kwargs or {}))


def _recording(note: Note, query: Tensor) -> Callable[..., Any]:
    """`F.multi_head_attention_forward` that records; ``query`` is ``[positions, batch, width]`` or has no batch."""
    batch = query.shape[1] if query.dim() == 3 else 1

    def batch_first(x: Tensor) -> Tensor:
        # x is [positions, batch, width], or has the first two as one.
        return (x if x.dim() == 3 else x.unflatten(0, (query.shape[0], batch))).transpose(0, 1)

    def recording(projections: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def record(q: Tensor, k: Tensor, v: Tensor, *weights: Any) -> tuple[Tensor, ...]:
            outputs = projections(q, k, v, *weights)
            for role, a, output in zip(ROLES, (q, k, v), outputs, strict=False):
                note(role, a, output, batch_first)
            return outputs

        return record

    def linear(a: Tensor, *weights: Any) -> Tensor:
        output = F.linear(a, *weights)
        note("out_proj", a, output, batch_first)
        return output

    own = vars(F)
    names = {
        **own,
        "linear": linear,
        "_in_projection_packed": recording(own["_in_projection_packed"]),
        "_in_projection": recording(own["_in_projection"]),
        # Another mode (a default device) would be given the original function; it still sees every operation inside.
        "has_torch_function": lambda tensors: False,
    }
    original: Any = F.multi_head_attention_forward
    function = FunctionType(_CODE, names, original.__name__, original.__defaults__, original.__closure__)
    function.__kwdefaults__ = original.__kwdefaults__
    return function
