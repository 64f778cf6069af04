"""Drawn models, layouts and options: what is finite stays finite, and factors are what a closed form says."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_thor import Curvature, Thor

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
draws = settings(
    max_examples=5000 if os.environ.get("LIGHTNING_THOR_FUZZ") == "1" else 50, suppress_health_check=list(HealthCheck)
)


@st.composite
def convolutions(draw: Any, channels: int, dims: int, kinds: Any = (CONVOLUTIONS, TRANSPOSED)) -> nn.Module:
    """A convolution that takes inputs of 6 in each dimension."""
    groups = draw(st.sampled_from([one for one in (1, 2, 3) if channels % one == 0]))
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kind = draw(st.sampled_from(kinds))[dims]
    options: dict[str, Any] = {"padding": draw(st.integers(0, 2)), "groups": groups, "bias": draw(st.booleans())}
    if kind is CONVOLUTIONS[dims]:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    else:
        assume(dilation * (kernel - 1) + 6 > 2 * options["padding"])
    out = groups * draw(st.integers(1, 3))
    convolution: nn.Module = kind(channels, out, kernel, draw(st.integers(1, 2)), dilation=dilation, **options)
    return convolution


class Positions(nn.Module):
    """Channels last, as a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Attended(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return attended


class Recurred(nn.Module):
    def __init__(self, kind: Any, width: int) -> None:
        super().__init__()
        self.recurrent = kind(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.recurrent(x)[0]
        return states


@st.composite
def models(draw: Any) -> tuple[nn.Sequential, bool, int]:
    """A small model, whether it takes tokens, and else the number of dimensions of its images of three channels."""
    width, layers = draw(st.sampled_from([2, 4, 6])), list[nn.Module]()
    takes_tokens, dims = draw(st.booleans()), draw(st.integers(1, 3))
    activation = draw(st.sampled_from([nn.ReLU(inplace=True), nn.Tanh(), nn.GELU()]))
    if takes_tokens:
        layers.append(nn.Embedding(7, width, padding_idx=draw(st.sampled_from([None, 0]))))
    else:
        convolution = draw(convolutions(3, dims))
        layers += [convolution, activation]
        channels = convolution.out_channels
        norms = [nn.GroupNorm(1, channels), getattr(nn, f"BatchNorm{dims}d")(channels), nn.Identity()]
        layers += [draw(st.sampled_from(norms)), Positions(), nn.Linear(channels, width, bias=draw(st.booleans()))]
    for _ in range(draw(st.integers(1, 2))):
        layers += draw(
            st.sampled_from(
                [
                    [nn.LayerNorm(width), activation],
                    [nn.RMSNorm(width), nn.Linear(width, width, bias=False)],
                    [nn.Linear(width, 2 * width), activation, nn.Linear(2 * width, width)],
                    [Attended(width, draw(st.sampled_from([1, 2])))],
                    [Recurred(draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU])), width)],
                ]
            )
        )
    layers.append(nn.Linear(width, draw(st.integers(1, 9))))
    # Drawn lists hold the same modules each time.
    return nn.Sequential(*copy.deepcopy(layers)), takes_tokens, dims


MAYBE = st.booleans()
CURVATURE_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "block_size": st.sampled_from([None, 1, 2, 3, 5, 64]),
    "max_rows": st.sampled_from([None, 1, 2, 7, 1024]),
    "damping": st.sampled_from([0.2, 1e-6, 1e-2, 1e3]),
    "damping_rule": st.sampled_from(["trace", "pi", "sqrt"]),
    "update_every_n_steps": st.sampled_from([None, 1, 2]),
    "averaging": st.sampled_from([0.0, 0.8, 0.99]),
    "precondition_bias": MAYBE,
    "stagger": MAYBE,
    "trace_rule": st.sampled_from([None, "THOR", "THOR_stop", "THOR_NT", (0.5, 0.1)]),
    "statistics": st.sampled_from(["expand", "masked", "reduce", "thor"]),
    "loss_reduction": st.sampled_from(["mean", "sum"]),
}
OPTIMIZER_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([0.0, 1e-3, 0.1]),
    "momentum": st.sampled_from([0.0, 0.9]),
    "nesterov": MAYBE,
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "decoupled_weight_decay": MAYBE,
    "match_rms": st.sampled_from([None, 0.2]),
    "max_relative_step": st.sampled_from([None, 0.01]),
    "clip_norm": st.sampled_from([None, 1.0]),
    "kl_clip": st.sampled_from([None, 1e-3]),
}


GROUP_OPTIONS = {name: OPTIMIZER_OPTIONS[name] for name in ("lr", "momentum", "nesterov", "weight_decay", "clip_norm")}
"""Of each further group of parameters, which in a polar training may be natural."""


def strided(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another place in memory."""
    if layout == "gaps":
        return torch.stack([x, torch.full_like(x, 3)], -1)[..., 0]
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x


LAYOUTS = ("contiguous", "gaps", "transposed", "channels last")


def kept(*layers: nn.Module, **changed: Any) -> Any:
    """A case that failed, tried first each time; what is not given is as plain as can be."""
    plain = {
        "drawn": (nn.Sequential(*layers), False, 2), "mode": "natural", "dtype": torch.float32,
        "layouts": ("contiguous", "contiguous"), "of_curvature": {}, "of_optimizer": {}, "of_groups": [], "exponent": 0,
        "n_samples": [2, 1, 3], "frozen": set(), "missing": {}, "fuses": False,
    }  # fmt: skip
    return example(**plain | changed)


def linear() -> tuple[nn.Module, ...]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(3, 2, 3), Positions(), nn.Linear(2, 3)


@draws
# A rate so small that its product with 1 - momentum is 0 was divided by.
@kept(*linear(), mode="polar", of_optimizer={"lr": 5e-324})
# The clip of a step of no length divided by 0.
@kept(*linear(), of_optimizer={"lr": 0.0, "match_rms": None, "kl_clip": 1e-3})
# Cases that the test itself must leave out: steps that nothing scales or clips.
@kept(*linear(), mode="polar", dtype=torch.float16, of_optimizer={"match_rms": None, "kl_clip": 1e-3}, exponent=-4)
@kept(*linear(), dtype=torch.float16, of_optimizer={"match_rms": None, "lr": 0.1}, exponent=-4)
# Finite gradients of which 1.9 are none in float16: what Nesterov's momentum loses before anything else is done.
@kept(*linear(), mode="polar", dtype=torch.float16, exponent=2.7)
# A weight's gradient that is not finite, with a bias of finite gradient in the same matrix.
@kept(*linear(), dtype=torch.float16, of_curvature={"precondition_bias": True}, exponent=3.5)
# Torch's own errors, and its crashes over channels-last images: a GroupNorm, a convolution with strides.
@kept(nn.Conv2d(3, 2, 3, 4), nn.BatchNorm2d(2), Positions(), nn.Linear(2, 3), n_samples=[1, 1, 1])
@kept(
    nn.Conv2d(3, 2, 3), nn.GroupNorm(1, 2), *linear()[1:], frozen={0, 1}, layouts=("channels last", "contiguous")
)  # fmt: skip
@kept(nn.Conv2d(3, 2, 1, 2), Positions(), nn.Linear(2, 3), layouts=("channels last", "contiguous"))
@given(
    drawn=models(),
    mode=st.sampled_from(["natural", "polar", "adam"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    of_curvature=st.fixed_dictionaries({}, optional=CURVATURE_OPTIONS),
    of_optimizer=st.fixed_dictionaries({}, optional=OPTIMIZER_OPTIONS),
    of_groups=st.lists(st.fixed_dictionaries({"natural": MAYBE}, optional=GROUP_OPTIONS), max_size=2),
    exponent=st.sampled_from([0, 0, 0, -20, -4, 4]),
    n_samples=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    frozen=st.sets(st.integers(0, 9), max_size=3),
    missing=st.dictionaries(st.integers(0, 2), st.integers(0, 9)),
    fuses=MAYBE,
)
def test_weights_stay_finite_where_those_of_sgd_do(
    drawn: tuple[nn.Sequential, bool, int], mode: Any, dtype: torch.dtype, layouts: tuple[str, str],
    of_curvature: dict[str, Any], of_optimizer: dict[str, Any], of_groups: list[dict[str, Any]], exponent: int,
    n_samples: list[int], frozen: set[int], missing: dict[int, int], fuses: bool,
) -> None:  # fmt: skip
    """``missing``: of which parameter the gradient is taken away, by step."""
    model, takes_tokens, dims = drawn
    torch.manual_seed(0)
    model.to(dtype)
    for p in model.parameters():
        p.data = strided(p.data, layouts[1])
    params = list(model.parameters())
    for number in frozen & {*range(len(params))}:
        params[number].requires_grad_(False)
    trained = [p for p in params if p.requires_grad]
    assume(trained)
    # torch 2.13 itself crashes, over channels-last images, in the backward pass of a GroupNorm whose input needs no
    # gradient, and of a 1 x 1 convolution with strides.
    needs_none = not takes_tokens and not any(p.requires_grad for p in model[0].parameters())
    crashes = needs_none and any(type(m) is nn.GroupNorm for m in model)
    crashes |= type(model[0]) is nn.Conv2d and model[0].kernel_size == (1, 1) and model[0].stride != (1, 1)
    assume(not (crashes and "channels last" in layouts))
    # Without match_rms a natural step has any length, unless something clips it.
    is_clipped = of_optimizer.get("kl_clip") is not None and mode == "natural" and dtype.itemsize > 2
    if not (is_clipped and of_optimizer.get("match_rms", 0.2) is None):
        of_optimizer.pop("kl_clip", None)
        of_optimizer.pop("match_rms", None)
    if fuses and any(type(m) is nn.Linear and m.weight.requires_grad for m in model):
        name = next(name for name, m in model.named_children() if type(m) is nn.Linear and m.weight.requires_grad)
        of_curvature["fused"] = {name: model.get_submodule(name).out_features}
    curvature = Curvature(model, mode=mode, **of_curvature)
    twin = [p.detach().clone() for p in trained]
    # Options of each group, and of SGD's: momentum comes first in polar mode, Nesterov's too.
    for one in of_groups:
        one |= {"mode": "natural"} if one.pop("natural") and mode == "polar" else {}
    own, others = [], []
    for i, one in enumerate([{}, *of_groups]):
        some = slice(i, None, 1 + len(of_groups))
        whole = {"lr": 6e-3, "momentum": 0.9, "nesterov": True, "mode": mode} | of_optimizer | one
        is_ahead = whole["nesterov"] and whole["mode"] == "polar" and whole["momentum"] > 0
        of_sgd = {"lr": whole["lr"], "momentum": whole["momentum"], "nesterov": is_ahead}
        if trained[some]:
            own.append({"params": trained[some], **one})
            others.append({"params": twin[some], **of_sgd})
    optimizer = Thor(own, mode=mode, preconditioner=curvature, **of_optimizer)
    sgd = torch.optim.SGD(others, lr=1.0)
    ghosts = dict(zip(trained, twin, strict=True))
    partners = {p: [p] for p in trained}
    if of_curvature.get("precondition_bias"):  # a layer's parameters are one matrix
        for module in model.modules():
            of_layer = [p for p in module.parameters(recurse=False) if p in ghosts]
            partners |= dict.fromkeys(of_layer, of_layer)
    for step, n in enumerate(n_samples):
        x = torch.randint(7, (n, 5)) if takes_tokens else strided(torch.randn(n, 3, *[6] * dims), layouts[0])
        x = x if takes_tokens else x.mul(10.0**exponent).to(dtype)
        try:
            out = model(x).to(torch.promote_types(dtype, torch.float32))
        except (RuntimeError, ValueError) as error:
            # torch's own layers: in half precision, and norms of a single value.
            assume(not any(words in str(error) for words in ("not implemented for", "Expected more than 1 value")))
            raise
        loss = out.square().mean() if of_curvature.get("loss_reduction") != "sum" else out.square().mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        for p in trained[missing.get(step, len(trained)) :][:1]:
            p.grad = None
        for p, ghost in ghosts.items():
            ghost.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        sgd.step()
        for p in trained:
            is_lost = any(not bool(ghosts[other].isfinite().all()) for other in partners[p])
            assert is_lost or bool(p.isfinite().all()), (step, tuple(p.shape))
    for batch in curvature.factors.batches.values():
        assert bool(batch.average.isfinite().all())
        assert bool(batch.inverse.isfinite().all())
    curvature.close()


def blocks_of(matrix: Tensor, blocks: Any) -> Tensor:
    """The diagonal blocks of ``matrix [groups, width, width]`` as a factor has them."""
    padded = F.pad(matrix, (0, blocks.padding, 0, blocks.padding))
    cut = padded.unflatten(1, (blocks.n_blocks, -1)).unflatten(3, (blocks.n_blocks, -1))
    return cut.diagonal(dim1=1, dim2=3).movedim(-1, 1)


@draws
@given(
    data=st.data(), dims=st.sampled_from([0, 1, 2]), n=st.integers(1, 3), block_size=st.sampled_from([None, 1, 3, 8])
)
def test_A_and_G_are_those_of_a_closed_form(data: Any, dims: int, n: int, block_size: int | None) -> None:
    """In float64: rows of patches by `torch.nn.functional.unfold`, and of the gradients of each sample's loss."""
    torch.manual_seed(0)
    with_bias, layout = data.draw(st.booleans()), data.draw(st.sampled_from(LAYOUTS))
    if dims:
        module = data.draw(convolutions(data.draw(st.sampled_from([2, 3])), dims, [CONVOLUTIONS]))
        x = torch.randn(n, module.in_channels, *[6] * dims)
    else:
        module = nn.Linear(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), bias=data.draw(st.booleans()))
        x = torch.randn(n, *data.draw(st.lists(st.integers(1, 4), max_size=2)), module.in_features)
    module, x = module.double(), strided(x.double(), layout)
    curvature = Curvature(
        nn.Sequential(module), block_size=block_size, averaging=0.0, max_rows=None, precondition_bias=with_bias
    )
    out = curvature.model(x)
    weights = torch.randn(out.shape[1:], dtype=x.dtype)
    losses = (out.sin() * weights).sum(tuple(range(1, out.dim()))) if dims else (out.sin() * weights).sum(-1)
    (g,) = torch.autograd.grad(losses.sum(), out, retain_graph=True)
    losses.mean().backward()
    curvature.update()
    if dims:
        padding = [p for p in reversed(module.padding) for _ in range(2)]
        mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
        planes = F.pad(x, padding, mode=mode)
        ones = (1,) * (2 - dims)
        planes = planes if dims == 2 else planes[:, :, None]
        arguments = [(*ones, *one) for one in (module.kernel_size, module.dilation, module.stride)]
        kernel, dilation, stride = arguments
        rows = F.unfold(planes, kernel, dilation=dilation, stride=stride)
        rows = rows.unflatten(1, (module.groups, -1)).permute(1, 2, 0, 3).flatten(2)
        g = g.flatten(2).unflatten(1, (module.groups, -1)).permute(1, 2, 0, 3).flatten(2)
    else:
        rows, g = x.reshape(1, -1, x.shape[-1]).mT, g.reshape(1, -1, g.shape[-1]).mT
    if with_bias and module.bias is not None:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    A, G = rows @ rows.mT / rows.shape[-1], g @ g.mT / (n if dims else g.shape[-1])
    layer, unit = curvature.layers["0"], curvature.gradient_unit
    torch.testing.assert_close(curvature.factors.blocks(0, "A", "average"), blocks_of(A, layer.A))
    torch.testing.assert_close(curvature.factors.blocks(0, "G", "average") * unit**2, blocks_of(G, layer.G))
    curvature.close()
