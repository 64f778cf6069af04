"""Laws of compiled models: they train with the statistics of eager ones, in whole graphs, two of them at most."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_thor import Curvature, configure_thor
from tests.helpers.observing import assert_same, factors, observing, told_by

LATER = [pytest.mark.slow, pytest.mark.long]
BACKENDS = [pytest.param("eager", marks=LATER), "aot_eager", pytest.param("inductor", marks=LATER)]
GENERATOR = torch.Generator().manual_seed(4)
X = torch.randn(12, 6, dtype=torch.float64, generator=GENERATOR)
IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=GENERATOR)
TOKENS = torch.randint(9, (4, 5), generator=GENERATOR)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """As in a new process."""
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    """Graphs compiled since the test began."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def whole(model: nn.Module, backend: str = "aot_eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


class Reused(nn.Module):
    """One layer that is called twice, and in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh_()
        y = self.layer(y)
        y += x
        return self.head(y)


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.table(tokens)))


class Checkpointed(nn.Module):
    """Some layers run again in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6))
        self.head, self.use_reentrant = nn.Linear(6, 2), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=self.use_reentrant))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, groups=2), nn.GroupNorm(2, 6)
    )


class Encoder(nn.Module):
    """Attentions of torch, which call no module for their projections."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.attention(x, x, x.sin())[0]


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (mlp, X),
    "convolutions": (convolutions, IMAGES),
    "reused": (Reused, X),
    "tied": (Tied, TOKENS),
    "attention": (Encoder, X.view(3, 4, 6)),
    "attention of other widths": (lambda: Encoder(kdim=6, vdim=6), X.view(3, 4, 6)),
    "checkpointed": (lambda: Checkpointed(False), X.clone().requires_grad_()),
    "checkpointed, reentrant": (lambda: Checkpointed(True), X.clone().requires_grad_()),
}


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    make, x = MODELS[name]
    return make().double(), x


def plain(model: Any, x: Tensor) -> None:
    model(x).sin().mean().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_compiled_model_has_the_statistics_of_an_eager_one(name: str, backend: str) -> None:
    model, x = model_of(name)
    found = observing(copy.deepcopy(model), lambda model: plain(whole(model, backend), x))
    assert_same(found, observing(model, lambda model: plain(model, x)))
    assert found.left_out == {}


def test_where_the_compiler_takes_no_modes_weights_that_are_not_called_are_not_observed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before torch 2.6, whose compiler ends with an error where a hook enters one."""
    monkeypatch.setattr("lightning_thor.layers.hooks.TRACES_MODES", False)
    model, x = model_of("attention")
    curvature = Curvature(model, update_every_n_steps=1)
    plain(whole(model), x)
    with pytest.warns(UserWarning, match="8 of 12 layers with curvature were not observed"):
        curvature.update()
    observed = [name for name, n in zip(curvature.layers, curvature.factors.updates.tolist(), strict=True) if n]
    assert observed == [name for name in curvature.layers if "proj" not in name]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", ["the model", "another of its class", "its curvature"])
def test_whatever_was_compiled_before(first: str, backend: str) -> None:
    """Graphs without hooks are not taken for models with hooks, nor a curvature's graphs for another one."""
    model, x = model_of("linear")
    compiled, eager = whole(model, backend), copy.deepcopy(model)
    if first == "the model":
        plain(compiled, x)
    elif first == "another of its class":
        plain(whole(copy.deepcopy(model), backend), x)
    else:
        observing(model, lambda model: plain(compiled, x))
    model.zero_grad()
    found = observing(model, lambda model: plain(compiled, x))
    assert_same(found, observing(eager, lambda model: plain(model, x)))


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"stagger": True}, marks=LATER), {"trace_rule": (1e9, 0.0)}], ids=str
)
def test_two_graphs_at_most(options: dict[str, Any]) -> None:
    """One that hands pairs over and one that does not, through refreshes, probes, pauses and another fit."""
    for _ in range(2):
        # More layers than dynamo would compile the code of a hook for.
        model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(9))).double()
        curvature, compiled = Curvature(model, update_every_n_steps=3, **options), whole(model)
        observed = []
        for _ in range(8):
            with curvature.paused():
                plain(compiled, X)
            assert not curvature.factors.counts.any()
            plain(compiled, X)
            observed.append(int((curvature.factors.counts[:, 0] > 0).sum()))
            curvature.update()
        assert observed == ([9] + [3] * 7 if "stagger" in options else [9, 0, 0, 9, 0, 0, 9, 0])
    assert graphs() == 2


class Broken(nn.Module):
    """Dynamo cannot compile it as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        torch._dynamo.graph_break()
        return y.tanh()


def test_where_graphs_break_statistics_are_those_of_an_eager_model_too() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(*(Broken() for _ in range(12))).double()
    found = observing(copy.deepcopy(model), lambda model: plain(torch.compile(model, backend="aot_eager"), X))
    assert_same(found, observing(model, lambda model: plain(model, X)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_under_autocast_and_of_some_rows(precision: torch.dtype, backend: str) -> None:
    averages = []
    for compiled in (True, False):
        torch.manual_seed(3)
        model = mlp()
        curvature = Curvature(model, block_size=None, averaging=0.0, max_rows=7)
        run = whole(model, backend) if compiled else model
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            y = run(X.float())
        y.float().sin().mean().backward()
        curvature.update()
        assert curvature.left_out == {}
        averages.append(factors(curvature))
    bound = 1e-5 if precision == torch.float32 else 0.02  # the compiler rounds less often
    torch.testing.assert_close(*averages, rtol=bound, atol=bound)


def look_first(model: Any, x: Tensor) -> None:
    y = model(x)
    torch.autograd.grad(1000 * y.mean(), list(model.parameters()), retain_graph=True)
    y.sin().mean().backward()


def of_some_leaves(model: Any, x: Tensor) -> None:
    model(x).sin().mean().backward(inputs=list(model.parameters()))


def in_two_backwards(model: Any, x: Tensor) -> None:
    y = model(x).sin()
    y[:, 0].sum().div(y.numel()).backward(retain_graph=True)
    y[:, 1:].sum().div(y.numel()).backward()


# Inductor may compute an input again for a second backward pass, which then counts as another pair.
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("train", [look_first, of_some_leaves, in_two_backwards], ids=lambda f: f.__name__)
def test_the_pairs_are_those_of_the_weights_gradients(train: Callable[[Any, Tensor], None], backend: str) -> None:
    model, x = model_of("linear")
    with torch._functorch.config.patch(donated_buffer=False):  # which torch asks for where a graph is kept
        found = observing(copy.deepcopy(model), lambda model: train(whole(model, backend), x))
    assert_same(found, observing(model, lambda model: plain(model, x)))


def test_a_pass_that_makes_a_graph_of_its_own_leaves_no_trace() -> None:
    """Compilers refuse it, but for one that runs the graph as it was traced."""
    model, x = nn.Sequential(nn.Linear(6, 3)).double(), X.clone().requires_grad_()
    curvature = Curvature(model)
    (gradient,) = torch.autograd.grad(whole(model, "eager")(x).square().mean(), x, create_graph=True)
    assert gradient.requires_grad
    assert not curvature.factors.counts.any()


def test_a_compiled_step_of_training_is_the_eager_one() -> None:
    """The optimizer's own step breaks the graph."""

    def trained(backend: str | None) -> list[Tensor]:
        torch.manual_seed(1)
        model = Reused().double()
        optimizer = configure_thor(model, preconditioner=Curvature(model, update_every_n_steps=2))

        def step() -> None:
            model(X).sin().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        run = step if backend is None else torch.compile(step, backend=backend)
        for _ in range(4):
            run()
        return list(model.parameters())

    torch.testing.assert_close(trained("aot_eager"), trained(None), rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_frozen_breaks_no_graph() -> None:
    model, x = model_of("linear")
    curvature, compiled = Curvature(model), whole(model)
    model[0].requires_grad_(False)  # type: ignore[index]
    plain(compiled, x)
    assert (curvature.factors.counts[:, 0] > 0).tolist() == [False, True, True, True]


def test_what_a_hook_of_the_user_does_to_an_output_is_not_the_layers() -> None:
    """A hook that was registered before the curvature's."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).double()
    for layer in model:
        layer.register_forward_hook(lambda module, args, output: 2.0 * output.tanh())
    found = observing(copy.deepcopy(model), lambda model: plain(whole(model), IMAGES))
    assert_same(found, observing(model, lambda model: plain(model, IMAGES)))
    assert found.left_out == {}


class Gelu(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


def test_what_a_compiled_subclass_does_to_its_product_leaves_it_out() -> None:
    """The graph shows what the module returned alone; eager mode sees the product."""
    torch.manual_seed(3)
    model = nn.Sequential(Gelu(6, 8), nn.Linear(8, 3)).double()
    curvature = Curvature(model)
    plain(whole(model), X)
    assert len(told_by(curvature)) == 1
    assert curvature.left_out.keys() == {"0"}


def test_an_input_that_is_no_plain_tensor_breaks_the_graph_and_is_observed() -> None:
    torch.manual_seed(3)
    model = mlp().double()
    nested = torch.nested.nested_tensor([X[:5], X[5:]], layout=torch.jagged)

    def train(model: Any) -> None:
        model(nested).values().sin().mean().backward()

    found = observing(copy.deepcopy(model), lambda model: train(torch.compile(model, backend="aot_eager")))
    assert_same(found, observing(model, train))
