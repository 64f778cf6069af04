"""Laws of torch's recurrent layers: they have the curvature of the same network written with linear layers."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lightning_thor import Curvature, Thor
from lightning_thor.layers.discovery import discover_layers
from lightning_thor.layers.recurrent import IS_SUPPORTED, StepGradients, WithoutLibraries

pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason="needs torch 2.8 or newer")
WIDTH, HIDDEN = 5, 6
GATES: dict[type[nn.Module], int] = {nn.RNN: 1, nn.LSTM: 4, nn.GRU: 3}

State = tuple[Tensor, ...]


def step(kind: type[nn.Module], x: Tensor, of_hidden: Callable[[Tensor], Tensor], state: State) -> State:
    """The state after one step in time, from the input's part of the gates."""
    (hidden, *cell), recurrent = state, of_hidden(state[0])
    if kind is nn.RNN:
        return ((x + recurrent).tanh(),)
    if kind is nn.GRU:
        (r, z, n), (hr, hz, hn) = x.chunk(3, -1), recurrent.chunk(3, -1)
        update = (z + hz).sigmoid()
        return ((1 - update) * (n + (r + hr).sigmoid() * hn).tanh() + update * hidden,)
    i, f, g, o = (x + recurrent).chunk(4, -1)
    new_cell = f.sigmoid() * cell[0] + i.sigmoid() * g.tanh()
    return o.sigmoid() * new_cell.tanh(), new_cell


class ByLinears(nn.Module):
    """One layer and direction by two linear layers: ``[batch, time, width]`` to ``[batch, time, hidden]``."""

    def __init__(self, kind: type[nn.Module], width: int, module: Any, suffix: str) -> None:
        super().__init__()
        rows = GATES[kind] * HIDDEN
        self.kind, self.is_reverse = kind, suffix.endswith("reverse")
        self.ih, self.hh = nn.Linear(width, rows), nn.Linear(HIDDEN, rows)
        for name in ("ih", "hh"):
            linear = getattr(self, name)
            linear.weight.data.copy_(getattr(module, f"weight_{name}_{suffix}").data)
            linear.bias.data.copy_(getattr(module, f"bias_{name}_{suffix}").data)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.ih(x.flip(1) if self.is_reverse else x)
        state = (gates.new_zeros(len(x), HIDDEN),) * 2
        states = []
        for t in range(gates.shape[1]):
            state = step(self.kind, gates[:, t], self.hh, state)
            states.append(state[0])
        outputs = torch.stack(states, 1)
        return outputs.flip(1) if self.is_reverse else outputs


class Unrolled(nn.Module):
    """All layers and directions of a recurrent module."""

    def __init__(self, kind: type[nn.Module], module: Any) -> None:
        super().__init__()
        directions = ("", "_reverse")[: 2 if module.bidirectional else 1]
        self.layers = nn.ModuleList(
            nn.ModuleList(
                ByLinears(kind, WIDTH if number == 0 else HIDDEN * len(directions), module, f"l{number}{direction}")
                for direction in directions
            )
            for number in range(module.num_layers)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for directions in self.layers:
            x = torch.cat([direction(x) for direction in directions], -1)  # type: ignore[union-attr]
        return x, None


class Classifier(nn.Module):
    """A label for each position of a sequence, ``[batch, time, width]``."""

    def __init__(self, recurrent: nn.Module, n_features: int) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(n_features, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.recurrent(x)[0])
        return logits


def train(model: nn.Module, n_steps: int = 6, compiled: Any = None, **options: Any) -> Curvature:
    """Train on random sequences; returns the curvature."""
    curvature = Curvature(model, update_every_n_steps=2, max_rows=None, **options)
    optimizer = Thor(model.parameters(), lr=0.02, mode=curvature.mode, preconditioner=curvature)
    generator = torch.Generator().manual_seed(3)
    for _ in range(n_steps):
        x = torch.randn(4, 7, WIDTH, dtype=torch.float64, generator=generator)
        labels = torch.randint(3, (28,), generator=generator)
        nn.functional.cross_entropy((model if compiled is None else compiled)(x).flatten(0, 1), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return curvature


def pairs_of_linears(model: Classifier, others: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """The weights of a torch's module and of the same layers written with linear ones."""
    module: Any = model.recurrent
    pairs = []
    for one in others:
        assert isinstance(one, Unrolled)
        for number, directions in enumerate(one.layers):
            for direction, linears in enumerate(directions):  # type: ignore[arg-type]
                suffix = f"l{number}{'_reverse' if direction else ''}"
                for name in ("ih", "hh"):
                    pairs.append((getattr(module, f"weight_{name}_{suffix}"), getattr(linears, name).weight))
    return pairs


@pytest.mark.parametrize("mode", ["natural", "polar", "adam"])
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("deep", [{}, {"num_layers": 2, "bidirectional": True}])
def test_a_recurrent_module_trains_as_its_linear_layers(kind: Any, deep: dict[str, Any], mode: str) -> None:
    torch.manual_seed(0)
    module = kind(WIDTH, HIDDEN, batch_first=True, **deep).double()
    model = Classifier(module, HIDDEN * (2 if deep else 1)).double()
    other = Classifier(Unrolled(kind, module), HIDDEN * (2 if deep else 1)).double()
    other.head.load_state_dict(model.head.state_dict())
    train(model, mode=mode)
    train(other, mode=mode, fused={"recurrent.*": GATES[kind]})
    pairs = pairs_of_linears(model, [other.recurrent])
    assert len(pairs) == (8 if deep else 2)
    for found, expected in [*pairs, (model.head.weight, other.head.weight)]:
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_each_weight_is_a_layer_whose_gates_are_apart() -> None:
    model = nn.LSTM(WIDTH, HIDDEN, num_layers=2, proj_size=4)
    layers, left_out = discover_layers(model, block_size=None, precondition_bias=True)
    assert not left_out
    assert {name: (layer.G.groups, layer.G.width, layer.A.width) for name, layer in layers.items() if layer.A} == {
        "weight_ih_l0": (4, 6, 5),
        "weight_hh_l0": (4, 6, 4),
        "weight_hr_l0": (1, 4, 6),
        "weight_ih_l1": (4, 6, 4),
        "weight_hh_l1": (4, 6, 4),
        "weight_hr_l1": (1, 4, 6),
    }


def exported(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, dict[str, Any]]:
    """A and G of one batch."""
    curvature = Curvature(model, averaging=0.0, block_size=None, max_rows=None)
    loss().backward()
    curvature.update()
    found = curvature.export()
    curvature.close()
    model.zero_grad()
    return found


def assert_same_factors(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]], names: Any) -> None:
    """A are equal, and G up to a factor: samples are counted in another way."""
    for name, other in names.items():
        torch.testing.assert_close(found[name]["A"], expected[other]["A"])
        G, expected_G = found[name]["G"], expected[other]["G"]
        torch.testing.assert_close(G / G.norm(), expected_G / expected_G.norm())


class ByItsBase(nn.GRU):
    """As pytorch-forecasting's, which packs sequences that have lengths."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:  # type: ignore[override]
        if lengths is None:
            return super().forward(2.0 * x)
        packed = nn.utils.rnn.pack_padded_sequence(2.0 * x, lengths, batch_first=True, enforce_sorted=False)
        output, state = super().forward(packed)
        return nn.utils.rnn.pad_packed_sequence(output, batch_first=True)[0], state


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 5, 3])], ids=["whole", "lengths"])
def test_a_subclass_that_calls_its_base_has_the_factors_of_the_base(lengths: Tensor | None) -> None:
    torch.manual_seed(0)
    module, plain = ByItsBase(3, 4, batch_first=True), nn.GRU(3, 4, batch_first=True)
    plain.load_state_dict(module.state_dict())
    x, weights = torch.randn(3, 5, 3), torch.randn(3, 5, 4)
    whole = 2.0 * x
    if lengths is not None:
        whole = nn.utils.rnn.pack_padded_sequence(whole, lengths, batch_first=True, enforce_sorted=False)  # type: ignore[assignment]

    def output_of_plain() -> Tensor:
        output = plain(whole)[0]
        return output if lengths is None else nn.utils.rnn.pad_packed_sequence(output, batch_first=True)[0]

    found = exported(module, lambda: (module(x, lengths)[0] * weights).mean())
    expected = exported(plain, lambda: (output_of_plain() * weights).mean())
    assert_same_factors(found, expected, {name: name for name in ("weight_ih_l0", "weight_hh_l0")})


class OfItsOwn(nn.GRU):
    def forward(self, *args: Any) -> Any:  # type: ignore[override]
        return nn.GRU.forward(self, *(2.0 * x for x in args))


def test_a_subclass_with_a_forward_of_its_own_is_left_out() -> None:
    layers, left_out = discover_layers(OfItsOwn(3, 2), block_size=None, precondition_bias=False)
    assert not layers
    reason = "OfItsOwn has a forward of its own, which may not be GRU's"
    assert left_out == dict.fromkeys(["weight_ih_l0", "weight_hh_l0"], reason)
    with pytest.warns(UserWarning, match=f"those of 1 .{reason}"):
        Curvature(nn.Sequential(nn.Linear(2, 3), OfItsOwn(3, 4)))


def with_a_half_as_long_weight(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight_hh_l0", Half())


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize(
    "change",
    [
        lambda module: nn.utils.weight_norm(module, "weight_hh_l0"),
        lambda module: nn.utils.spectral_norm(module, "weight_hh_l0"),
        lambda module: nn.utils.prune.l1_unstructured(module, "weight_hh_l0", 0.5),  # type: ignore[attr-defined]
        with_a_half_as_long_weight,
    ],
    ids=["weight_norm", "spectral_norm", "pruned", "parametrized"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_is_computed_from_others_is_left_out_with_its_reason(change: Callable[[Any], Any]) -> None:
    change(module := nn.LSTM(WIDTH, HIDDEN))
    module.register_parameter("weight_of_its_own", nn.Parameter(torch.ones(7)))
    layers, left_out = discover_layers(module, block_size=None, precondition_bias=False)
    assert list(layers) == ["weight_ih_l0"]
    assert left_out == {"weight_hh_l0": "its weight is not a plain parameter (parametrized, or not affine)"}


def test_weights_that_two_layers_of_a_module_share_are_one() -> None:
    module = nn.LSTM(HIDDEN, HIDDEN, num_layers=2)
    module.weight_hh_l1 = module.weight_hh_l0
    layers, left_out = discover_layers(module, block_size=None, precondition_bias=False)
    assert (list(layers), left_out) == (["weight_ih_l0", "weight_hh_l0", "weight_ih_l1"], {})


def observed(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, tuple[int, Tensor]]:
    """By weight: the number of rows, and the product of their gradients and inputs."""
    seen: dict[str, tuple[int, Tensor]] = {}
    curvature = Curvature(model, update_every_n_steps=1)

    def observe(name: str, a: Tensor, g: Tensor) -> None:
        a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        n, product = seen.get(name, (0, torch.zeros((), dtype=a.dtype)))
        seen[name] = n + len(a), product + g.T @ a

    curvature._accumulator.observe = observe  # type: ignore[method-assign]
    loss().backward()
    curvature.close()
    return seen


@pytest.mark.parametrize(
    "options", [{"proj_size": 3}, {"bias": False}, {"dropout": 0.5, "num_layers": 2}, {"bidirectional": True}, {}]
)
@pytest.mark.parametrize("without_batch", [False, True])
def test_the_rows_of_all_variants_give_the_gradients(options: dict[str, Any], without_batch: bool) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(WIDTH, HIDDEN, **options).double()
    x = torch.randn(7, *([] if without_batch else [4]), WIDTH, dtype=torch.float64)

    def loss() -> Tensor:
        outputs, (hidden, cell) = model(x)
        total: Tensor = outputs.sin().sum() + hidden.cos().sum() + cell.square().sum()
        return total

    seen = observed(model, loss)
    assert seen.keys() == {name for name, _ in model.named_parameters() if "weight" in name}
    for name, (n, gradient) in seen.items():
        assert n == x[..., 0].numel()
        torch.testing.assert_close(gradient, getattr(model, name).grad)


def test_packed_sequences_have_a_row_for_each_step_that_there_is() -> None:
    torch.manual_seed(0)
    model = nn.GRU(WIDTH, HIDDEN, num_layers=2, batch_first=True).double()
    x, lengths = torch.randn(3, 6, WIDTH, dtype=torch.float64), torch.tensor([4, 6, 1])

    def loss() -> Tensor:
        outputs: PackedSequence = model(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]
        return outputs.data.sin().sum()

    for name, (n, gradient) in observed(model, loss).items():
        assert n == 11
        torch.testing.assert_close(gradient, getattr(model, name).grad)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells_and_decoders_that_go_on_from_their_state_count_each_step_once(cell: Any) -> None:
    """A call begins at its inputs: behind them are the calls before, with the same weights."""
    kind = {nn.RNNCell: nn.RNN, nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU}[cell]
    torch.manual_seed(0)
    module, one = kind(WIDTH, HIDDEN).double(), cell(WIDTH, HIDDEN).double()
    one.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    x = torch.randn(7, 4, WIDTH, dtype=torch.float64)

    def by_cell() -> Tensor:
        state, outputs = None, []
        for now in x:
            state = one(now, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs).sin().sum()

    def by_decoder() -> Tensor:
        state, outputs = None, []
        for now in x:
            output, state = module(now[None], hx=state)
            outputs.append(output)
        return torch.cat(outputs).sin().sum()

    whole = exported(module, lambda: module(x)[0].sin().sum())
    assert_same_factors(exported(module, by_decoder), whole, {name: name for name in whole})
    assert_same_factors(exported(one, by_cell), whole, {name.removesuffix("_l0"): name for name in whole})


def test_the_last_state_alone_is_enough() -> None:
    """Of the backward direction only the first of its steps made the output that the loss looks at."""
    torch.manual_seed(0)
    module = nn.LSTM(WIDTH, HIDDEN, bidirectional=True, batch_first=True).double()
    x = torch.randn(4, 7, WIDTH, dtype=torch.float64)
    found = exported(module, lambda: module(x)[0][:, -1].sin().sum())
    assert found.keys() == {name for name, _ in module.named_parameters() if "weight" in name}
    assert all(torch.isfinite(factors["G"]).all() for factors in found.values())


def step_gradients() -> list[StepGradients]:
    """All that there are."""
    # Not isinstance, which asks dead weak proxies of others for their class.
    return [x for x in gc.get_objects() if type(x) is StepGradients]


def test_gradient_passes_that_are_no_training_leave_no_trace() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(WIDTH, HIDDEN).double()
    x = torch.randn(7, 4, WIDTH, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return module(x)[0].sin().sum()

    plain = exported(module, loss)

    def with_a_penalty() -> Tensor:
        torch.autograd.grad(module(x)[0].square().sum(), x)
        outputs = loss()
        torch.autograd.grad(outputs, x, create_graph=True)
        assert not any(one._found for one in step_gradients())
        return outputs

    found = exported(module, with_a_penalty)
    for name, factors in plain.items():
        torch.testing.assert_close(found[name]["A"], factors["A"])
        torch.testing.assert_close(found[name]["G"], factors["G"])


def test_flags_of_libraries_that_are_frozen_matter_not(monkeypatch: pytest.MonkeyPatch) -> None:
    flag = "__allow_nonbracketed_mutation_flag"  # of torch.backends.disable_global_flags
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, flag, False)
    with pytest.raises(RuntimeError, match="not allowed to set"):
        torch.backends.cudnn.enabled = False
    assert observed(module := nn.LSTM(WIDTH, HIDDEN), lambda: module(torch.randn(7, 4, WIDTH))[0].sum())


def test_libraries_are_on_again_and_nothing_stays_behind() -> None:
    before = torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    module = nn.LSTM(WIDTH, HIDDEN)
    curvature = Curvature(module, update_every_n_steps=1)
    with pytest.raises(RuntimeError):
        module(torch.randn(7, 4, WIDTH + 1))
    assert (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled) == before
    of_others = step_gradients()
    outputs = module(torch.randn(7, 4, WIDTH))[0]
    of_one_weight, _ = (weakref.ref(x) for x in step_gradients() if x not in of_others)
    outputs.sum().backward()
    assert (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled) == before
    del outputs
    gc.collect()
    assert of_one_weight() is None
    curvature.close()
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def libraries() -> tuple[bool, bool]:
    return torch._C._get_cudnn_enabled(), torch._C._get_mkldnn_enabled()


def test_staggered_its_weights_have_their_turn_together() -> None:
    """Or torch would be without its libraries in as many steps as there are weights."""
    model = Classifier(nn.LSTM(WIDTH, HIDDEN, batch_first=True, bidirectional=True), 2 * HIDDEN).double()
    curvature = Curvature(model, update_every_n_steps=5, stagger=True)
    optimizer = Thor(model.parameters(), preconditioner=curvature)
    turns = []
    for _ in range(11):
        turns.append({name for number, name in enumerate(curvature.layers) if curvature._schedule.is_due(number)})
        model(torch.randn(4, 7, WIDTH, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    of_the_head, of_the_others = {"head"}, curvature.layers.keys() - {"head"}
    assert turns[0] == set(curvature.layers)
    assert (
        sorted(turns[1:6], key=len) == sorted(turns[6:], key=len) == [set(), set(), set(), of_the_head, of_the_others]
    )


def test_a_pass_that_the_user_interrupts_leaves_libraries_on_when_the_fit_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch calls no hooks then."""
    before, module = libraries(), nn.LSTM(WIDTH, HIDDEN)
    curvature = Curvature(module, update_every_n_steps=1)
    monkeypatch.setattr("torch._VF.lstm", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        module(torch.randn(7, 4, WIDTH))
    curvature.close()
    assert libraries() == before == (True, True)


def test_libraries_are_on_when_the_last_of_several_threads_has_ended() -> None:
    first, second = WithoutLibraries(), WithoutLibraries()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert libraries() == (False, False)
    second.__exit__()
    assert libraries() == (True, True)


def test_a_loss_that_is_kept_holds_no_inputs() -> None:
    module = nn.LSTM(WIDTH, HIDDEN)
    curvature = Curvature(module, update_every_n_steps=1)
    loss = module(torch.randn(7, 4, WIDTH))[0].sum()
    held = [one._on_gradients.__closure__ for one in step_gradients()]
    inputs = [cell.cell_contents for cells in held for cell in cells or () if isinstance(cell.cell_contents, dict)]
    n_before = sum(isinstance(x, Tensor) for some in inputs for x in some.values())
    loss.backward(retain_graph=True)
    assert n_before == sum(isinstance(x, Tensor) for some in inputs for x in some.values()) == 8
    loss.backward()
    assert not any(isinstance(x, Tensor) for some in inputs for x in some.values())
    curvature.close()


def test_a_copy_of_the_module_is_silent() -> None:
    module = nn.GRU(WIDTH, HIDDEN)
    curvature = Curvature(module, update_every_n_steps=1)
    copy.deepcopy(module)(torch.randn(7, 4, WIDTH))[0].sum().backward()
    assert not curvature._accumulator.has_pairs


def test_checkpointed_activations_are_told_and_left_out() -> None:
    """What autograd saves can then be read once only, by autograd itself."""
    torch.manual_seed(0)
    model = Classifier(nn.LSTM(WIDTH, HIDDEN, batch_first=True), HIDDEN).double()
    curvature = Curvature(model, update_every_n_steps=1)
    x = torch.randn(4, 7, WIDTH, dtype=torch.float64)
    model.head(checkpoint(model.recurrent, x, use_reentrant=False)[0]).sum().backward()  # type: ignore[index]
    assert model.recurrent.weight_hh_l0.grad is not None
    with pytest.warns(UserWarning, match="recurrent.weight_ih_l0.*: what autograd saves"):
        curvature.update()


def test_a_checkpointed_pass_that_is_paused_is_made_again_as_it_was() -> None:
    model = Classifier(nn.LSTM(WIDTH, HIDDEN, batch_first=True), HIDDEN)
    curvature = Curvature(model, update_every_n_steps=1)
    with curvature.paused():
        loss = checkpoint(model, torch.randn(4, 7, WIDTH), use_reentrant=False).sum()  # type: ignore[union-attr]
    loss.backward()
    assert model.recurrent.weight_hh_l0.grad is not None


def test_functions_of_the_module_are_transformed_and_exported_as_without_curvature() -> None:
    """Such as gradients of each sample, which torch makes of its libraries' recurrent layers alone."""
    module = nn.LSTM(WIDTH, HIDDEN, batch_first=True)
    curvature = Curvature(module, update_every_n_steps=1)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        outputs, _ = torch.func.functional_call(module, weights, (x[None],))
        return outputs.sin().sum()

    x = torch.randn(4, 7, WIDTH)
    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    assert torch.export.export(module, (x,))
    module(x)[0].sin().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(of_each[name].sum(0), p.grad)
    curvature.close()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_a_compiled_model_it_runs_as_it_is(backend: str) -> None:
    torch.manual_seed(0)
    model = Classifier(nn.GRU(WIDTH, HIDDEN, batch_first=True), HIDDEN).double()
    other = copy.deepcopy(model)
    train(model)
    train(other, compiled=torch.compile(other, backend=backend))
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_state_of_a_version_without_recurrent_curvature_goes_on() -> None:
    """Recurrent weights begin theirs at the next step, the head goes on with its own."""
    torch.manual_seed(0)
    model = Classifier(nn.LSTM(WIDTH, HIDDEN, batch_first=True), HIDDEN).double()
    state = train(model, n_steps=3).state_dict()
    of_the_head = copy.deepcopy(state["layers"]["head"])
    state["layers"] = {"head": of_the_head}
    curvature = Curvature(copy.deepcopy(model), update_every_n_steps=100, max_rows=None)
    curvature.load_state_dict(state)
    assert curvature.step == 3
    assert {curvature.layers[name].parameters[0] for name in curvature.layers if name != "head"} == set(
        curvature.due_parameters()
    )
    found = curvature.state_dict()["layers"]
    assert all(torch.equal(found["head"][key], value) for key, value in of_the_head.items())
    assert not found["recurrent.weight_hh_l0"]["updates"].any()
    del state["layers"]["head"]
    with pytest.raises(ValueError, match="head"):
        curvature.load_state_dict(state)


@pytest.mark.parametrize("is_staggered", [False, True])
def test_so_does_the_state_of_a_version_that_kept_less_of_its_schedule(is_staggered: bool) -> None:
    torch.manual_seed(0)
    model = Classifier(nn.LSTM(WIDTH, HIDDEN, batch_first=True), HIDDEN).double()
    model.recurrent.requires_grad_(False)
    state = train(model, n_steps=3, stagger=is_staggered).state_dict()
    assert len(state["refresh_costs"]) == is_staggered
    model.recurrent.requires_grad_(True)
    oldest = {key: value for key, value in state.items() if key not in ("pending", "refresh_costs")}
    for saved in (state, oldest):
        other = Classifier(nn.LSTM(WIDTH, HIDDEN, batch_first=True), HIDDEN).double()
        curvature = Curvature(other, update_every_n_steps=9, stagger=is_staggered, max_rows=None)
        curvature.load_state_dict(saved)
        assert (curvature.step, curvature.is_due()) == (3, True)
        other(torch.randn(4, 7, WIDTH, dtype=torch.float64)).square().mean().backward()
        curvature.update()
        assert all(factors["n_windows"] for factors in curvature.export().values())


def test_of_a_state_only_the_weights_come_back_that_were_unfrozen_there() -> None:
    def half_frozen() -> Classifier:
        model = Classifier(nn.LSTM(WIDTH, HIDDEN, batch_first=True), HIDDEN).double()
        model.recurrent.requires_grad_(False)
        return model

    model = half_frozen()
    curvature = Curvature(model)
    model.recurrent.weight_ih_l0.requires_grad_(True)
    assert curvature.include() == ["recurrent.weight_ih_l0"]
    other = Curvature(half_frozen())
    other.load_state_dict(curvature.state_dict())
    assert list(other.layers) == ["recurrent.weight_ih_l0", "head"]
    assert other.left_out == {"recurrent.weight_hh_l0": "frozen"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_under_autocast_its_statistics_are_near_those_of_float32(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Classifier(kind(WIDTH, HIDDEN, batch_first=True), HIDDEN)
    x = torch.randn(4, 7, WIDTH)

    def loss() -> Tensor:
        return model(x).float().sin().sum()

    def autocast_loss() -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return loss()

    whole, rounded = exported(model, loss), exported(model, autocast_loss)
    assert whole.keys() == rounded.keys() == {"recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "head"}
    for name, factors in whole.items():
        for side in ("A", "G"):
            torch.testing.assert_close(
                rounded[name][side], factors[side], rtol=0.1, atol=0.03 * float(factors[side].max())
            )


def test_it_has_none_where_torch_does_not_say_what_autograd_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.8."""
    monkeypatch.setattr("lightning_thor.layers.recurrent.IS_SUPPORTED", False)
    curvature = Curvature(Classifier(nn.LSTM(WIDTH, HIDDEN), HIDDEN))
    assert list(curvature.layers) == ["head"]
    assert "needs torch 2.8 or newer" in curvature.left_out["recurrent.weight_hh_l0"]
