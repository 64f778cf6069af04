"""Laws of embeddings with a forward of their own: they train as a plain embedding with the same done outside of it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_thor import Curvature, Thor
from lightning_thor.layers.discovery import discover_layers

VOCABULARY, WIDTH, LENGTH, OFFSET, SCALE = 11, 6, 5, 2, 4.0


class Scaled(nn.Embedding):
    """As Gemma's and BART's tables of tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * SCALE


class Shifted(nn.Embedding):
    """As OPT's and BART's tables of positions."""

    def forward(self, tokens: Tensor, offset: int = OFFSET) -> Tensor:
        return super().forward(torch.arange(tokens.shape[1]).expand(tokens.shape) + offset)


class ScaledByFunction(nn.Embedding):
    """Calls no base."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight) * SCALE


class ScaledByOperator(nn.Embedding):
    """Calls what `F.embedding` calls."""

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.embedding(self.weight, tokens) * SCALE


class Sliced(nn.Embedding):
    """As Whisper's table of positions."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[: tokens.shape[1]]


class Text(nn.Module):
    """A language model: its tables do what they do themselves (``inside``), or the model does it."""

    def __init__(self, *, inside: bool, is_tied: bool, scaled: type[nn.Embedding] = Scaled) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = inside
        self.table = (scaled if inside else nn.Embedding)(VOCABULARY, WIDTH)
        self.positions = (Shifted if inside else nn.Embedding)(LENGTH + OFFSET, WIDTH)
        self.hidden, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if is_tied:
            self.head.weight = self.table.weight

    def embed(self, tokens: Tensor) -> Tensor:
        if self.inside:
            embedded: Tensor = self.table(tokens) + self.positions(tokens)
            return embedded
        places = torch.arange(tokens.shape[1]).expand(tokens.shape) + OFFSET
        return self.table(tokens) * SCALE + self.positions(places)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.embed(tokens)).tanh())
        return logits


def train(model: nn.Module, call: Any = None, **options: Any) -> Curvature:
    curvature = Curvature(model, update_every_n_steps=2, **options)
    optimizer = Thor(model.parameters(), lr=0.02, mode=curvature.mode, preconditioner=curvature)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        tokens = torch.randint(VOCABULARY, (6, LENGTH + 1), generator=generator)
        logits = (model if call is None else call)(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return curvature


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_it_trains_as_a_plain_one(is_tied: bool, mode: str) -> None:
    model, other = (Text(inside=inside, is_tied=is_tied).double() for inside in (True, False))
    curvature = train(model, mode=mode)
    assert list(curvature.layers) == ["table", "positions", "hidden", "head"]
    train(other, mode=mode)
    assert_alike(model, other)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("scaled", [ScaledByFunction, ScaledByOperator])
def test_it_may_call_the_function_itself(scaled: type[nn.Embedding], compiles: bool) -> None:
    model = Text(inside=True, is_tied=True, scaled=scaled).double()
    other = Text(inside=False, is_tied=True).double()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
    assert list(train(model, call).layers) == ["table", "positions", "hidden", "head"]
    train(other)
    assert_alike(model, other)


@pytest.mark.parametrize("is_tied", [False, True])
def test_in_a_compiled_model_it_does_so_too(is_tied: bool) -> None:
    model, other = (Text(inside=inside, is_tied=is_tied).double() for inside in (True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch's compiler warns of Python 3.13.0
        train(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    train(other)
    assert_alike(model, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing_it_does_so_too(use_reentrant: bool) -> None:
    model, other = (Text(inside=inside, is_tied=False).double() for inside in (True, False))
    first = torch.zeros((), dtype=torch.float64, requires_grad=True)  # a reentrant checkpoint needs such an input

    def call(tokens: Tensor) -> Tensor:
        embedded = checkpoint(lambda tokens, _: model.embed(tokens), tokens, first, use_reentrant=use_reentrant)
        logits: Tensor = model.head(model.hidden(embedded).tanh())
        return logits

    train(model, call)
    train(other)
    assert_alike(model, other)


def test_a_state_of_a_version_without_its_curvature_goes_on() -> None:
    state = train(Text(inside=True, is_tied=False)).state_dict()
    for name in ("table", "positions"):
        del state["layers"][name]
    curvature = Curvature(Text(inside=True, is_tied=False), update_every_n_steps=2)
    curvature.load_state_dict(state)
    del state["layers"]["hidden"]
    with pytest.raises(ValueError, match="hidden"):
        curvature.load_state_dict(state)


def test_one_that_looks_up_nothing_by_its_base_is_left_out() -> None:
    model = nn.ModuleDict({"positions": Sliced(LENGTH, WIDTH), "head": nn.Linear(WIDTH, 2)})
    layers, left_out = discover_layers(model, block_size=None, precondition_bias=True)
    assert list(layers) == ["head"]
    assert left_out == {"positions": "Sliced has a forward of its own, which may not be Embedding's"}


def test_one_that_looks_up_another_table_than_its_own_takes_its_plain_gradient_and_the_reason_is_told() -> None:
    """As quantisation-aware training does."""

    class Rounded(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.embedding(tokens, self.weight + (self.weight.round(decimals=1) - self.weight).detach())

    model = nn.ModuleDict({"table": Rounded(VOCABULARY, WIDTH), "head": nn.Linear(WIDTH, 2)})
    curvature = Curvature(model)
    model["head"](model["table"](torch.arange(VOCABULARY))).sin().mean().backward()
    with pytest.warns(UserWarning, match="table: no product with it was seen .*the weight itself .*not another"):
        curvature.update()
    table = model["table"].weight
    torch.testing.assert_close(curvature.precondition({table: table.grad})[table], table.grad, rtol=0, atol=0)
