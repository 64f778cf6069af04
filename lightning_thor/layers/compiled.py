"""Pairs of a compiled graph: operations in it that hand a layer's input and its output's gradient on in backward.

`torch.compile` traces neither hooks of tensors nor autograd nodes. So a layer's output passes through a function whose
backward is an operation that the compiler does not look into. It is given the pair each time that the graph runs, and
passes the gradient on, so that it is neither left out nor moved before those of later layers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import CodeType
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

Receiver = Callable[[Tensor, Tensor], None]
"""Called in backward with a layer's input and its output's gradient."""

Hook = TypeVar("Hook", bound=Callable[..., Any])

TRACES_MODES = torch.__version__ >= "2.6"
"""Whether the compiler takes a mode of torch's functions that a hook enters. Where it does not, weights that are used
inside a module without a call are not observed in compiled graphs."""

_receivers: WeakValueDictionary[int, Receiver] = WeakValueDictionary()
_numbers = count()


def number_of(receiver: Receiver) -> Tensor:
    """A number by which a graph finds ``receiver``, as long as something else holds that: 0-dimensional, on the CPU; an
    input of the graph, which so serves all models of its shapes."""
    number = next(_numbers)
    _receivers[number] = receiver
    return torch.tensor(number, device="cpu")


def can_pass_on(a: Any, output: Any) -> bool:
    """Whether `pass_on` takes a layer's input and output: both plain tensors."""
    if not isinstance(a, Tensor) or not isinstance(output, Tensor):
        return False
    plain = type(a) in (Tensor, nn.Parameter) and type(output) in (Tensor, nn.Parameter)
    return plain and a.layout is torch.strided


def pass_on(output: Tensor, a: Tensor, number: Tensor) -> Tensor:
    """A layer's output, whose gradient goes to a receiver, with the input, whenever it is computed.

    Args:
        output: of the layer; it requires a gradient.
        a: its input.
        number: see `number_of`.

    Returns:
        A copy of the output, which inductor does without.
    """
    passed: Tensor = _PassOn.apply(output, a.detach(), number)  # type: ignore[no-untyped-call]
    return passed


class _PassOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, a: Tensor, number: Tensor) -> Tensor:
        ctx.save_for_backward(a, number)
        # Not a view: an operation in place may follow.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        # A graph that is run as it was traced (backend="eager") may have a create_graph pass: a gradient penalty's.
        return g if torch.is_grad_enabled() else torch.ops.lightning_thor.hand_over(*ctx.saved_tensors, g), None, None


def _run(a: Tensor, number: Tensor, g: Tensor) -> Tensor:
    receiver = _receivers.get(int(number))
    if receiver is not None:
        receiver(a, g)
    return g.clone()


# Not `torch.library.custom_op`, in whose operations autograd cannot be asked for the node of a weight.
_library = torch.library.Library("lightning_thor", "DEF")
# A replay of a CUDA graph would call no function: where the tag is unknown, the number on the CPU prevents such graphs.
_tags = [getattr(torch.Tag, tag) for tag in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, tag)]
_library.define("hand_over(Tensor a, Tensor number, Tensor g) -> Tensor", tags=_tags)
_library.impl("hand_over", _run, "CompositeExplicitAutograd")
torch.library.register_fake("lightning_thor::hand_over", lambda a, number, g: torch.empty_like(g), lib=_library)


def guard_hooks() -> None:
    """Let compiled code notice that hooks come and go, once in a process.

    By default a graph that was compiled without hooks is taken for all modules of its shapes, whatever hooks they have.
    Graphs that were compiled before this call are compiled again at their next one.
    """
    from torch._dynamo import config  # takes a second, like all of dynamo

    torch.compiler.allow_in_graph(pass_on)
    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def not_alone(hook: Hook) -> Hook:
    """Let dynamo trace ``hook`` as part of a module's call only, and run it as it is where a graph broke at that call;
    returns the same function."""
    from torch._dynamo import decorators

    # Not public: where it is missing, dynamo compiles such hooks, of a few modules, and then gives up on them.
    skip_code: Callable[[CodeType], None] = getattr(decorators, "skip_code", lambda code: None)
    skip_code(hook.__code__)
    return hook
