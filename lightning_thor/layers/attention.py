"""Records the products with weights in `nn.MultiheadAttention`, which calls no module for them.

Its forward hands bare parameters to `F.multi_head_attention_forward`. While a pass is recorded, that function is
replaced by its own code over other globals, in which the three functions that multiply by a weight record their inputs
and outputs. So torch computes what it always does, in every variant, and no code of torch is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROLES = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The weights of an attention."""

Note = Callable[[str, Tensor, Tensor, Callable[[Tensor], Tensor] | None], Tensor]
"""Called with the role of a weight, its input, its output, and a function that brings the output's gradient to the
input's dimensions (None: it has them); returns the output to go on with."""

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
        self._positions, self._batch = 0, 1
        """Of the query, which is ``[positions, batch, width]`` or has no batch."""
        self._forward = self._recording_forward()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.multi_head_attention_forward:
            return func(*args, **kwargs)
        # A subclass comes back with the plain tensors that it computes with, if it does not compute in its own way.
        # (Without types there is none. Dynamo does as tensors without a subclass do.)
        for cls in () if torch.compiler.is_dynamo_compiling() else types:
            with self:
                output = cls.__torch_function__(func, types, args, kwargs)
            if output is not NotImplemented:
                return output
        if not all(map(_has_torchs_functions, types)):
            return func(*args, **kwargs)
        query = args[0]
        self._positions, self._batch = query.shape[0], query.shape[1] if query.dim() == 3 else 1
        return self._forward(*args, **kwargs)

    def _noted(self, role: str, a: Tensor, output: Tensor) -> Tensor:
        # Of this call: the gradient may come after others, of other sizes.
        arrange = partial(_batch_first, self._positions, self._batch)
        return self.note(role, arrange(a), output, arrange)

    def _recording_forward(self) -> Callable[..., Any]:
        """`F.multi_head_attention_forward` that records."""

        def recording(projections: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
            def record(q: Tensor, k: Tensor, v: Tensor, *weights: Any) -> tuple[Tensor, ...]:
                outputs = projections(q, k, v, *weights)
                noted = zip(ROLES[:3], (q, k, v), outputs, strict=True)
                return tuple([self._noted(role, a, output) for role, a, output in noted])

            return record

        def linear(a: Tensor, *weights: Any) -> Tensor:
            return self._noted("out_proj", a, F.linear(a, *weights))

        own = vars(F)
        names = {
            **own,
            "linear": linear,
            "_in_projection_packed": recording(own["_in_projection_packed"]),
            "_in_projection": recording(own["_in_projection"]),
            # Another mode (a default device) would be given the original function; it still sees every operation
            # inside.
            "has_torch_function": lambda tensors: False,
        }
        # Dynamo looks names up in the module of this name, if there is one.
        del names["__name__"]
        original: Any = F.multi_head_attention_forward
        function = FunctionType(_CODE, names, original.__name__, original.__defaults__, original.__closure__)
        function.__kwdefaults__ = original.__kwdefaults__
        return function


def _batch_first(positions: int, batch: int, x: Tensor) -> Tensor:
    """``x [positions, batch, width]``, whose first two dimensions may be one, as ``[batch, positions, width]``."""
    return (x if x.dim() == 3 else x.unflatten(0, (positions, batch))).transpose(0, 1)


def _has_torchs_functions(cls: type[Tensor]) -> bool:
    """Whether tensors of this class take torch's own functions: other subclasses may have an attention of their own."""
    own = getattr(cls.__torch_function__, "__func__", None)
    return cls is torch.nn.Parameter or own is Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
