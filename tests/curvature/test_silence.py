"""The law that layers which were not observed are told with one cause, and train on by plain momentum."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lightning_thor import Curvature, Thor, configure_thor
from tests.helpers.boring import assert_bitwise

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def in_eval_mode(model: nn.Module, curvature: Curvature) -> None:
    model.eval()
    model(X).square().mean().backward()


def paused(model: nn.Module, curvature: Curvature) -> None:
    with curvature.paused():
        model(X).square().mean().backward()


def by_functions(model: nn.Sequential, curvature: Curvature) -> None:
    h = F.linear(X, model[0].weight, model[0].bias).tanh()
    F.linear(h, model[2].weight, model[2].bias).square().mean().backward()


def by_forward(model: nn.Sequential, curvature: Curvature) -> None:
    """A module's forward is called in the place of the module."""
    model[2].forward(model[0].forward(X).tanh()).square().mean().backward()


def by_vmap_in_the_loss(model: nn.Module, curvature: Curvature) -> None:
    parameters = dict(model.named_parameters())
    torch.vmap(lambda x: torch.func.functional_call(model, parameters, (x,)))(X).square().mean().backward()


def by_gradients_of_vmap(model: nn.Module, curvature: Curvature) -> None:
    parameters = dict(model.named_parameters())

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (x,)).square().mean()

    grads = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    for name, p in parameters.items():
        p.grad = grads[name].mean(0)


class Wrapped(Tensor):
    """A tensor that computes by itself: all that torch does with it is done with the tensor inside."""

    @staticmethod
    def __new__(cls, inside: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=inside.device)

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        def unwrap(x: object) -> object:
            return x.inside if isinstance(x, Wrapped) else x

        return func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


def with_wrapped_inputs(model: nn.Sequential, curvature: Curvature) -> None:
    model[2](Wrapped(model[1](model[0](Wrapped(X))).detach())).square().mean().backward()
    model[0](Wrapped(X)).square().mean().backward()


def with_other_first_arguments(model: nn.Sequential, curvature: Curvature) -> None:
    for layer in (model[0], model[2]):
        layer.forward = lambda scale, x, own=layer: F.linear(x, own.weight, own.bias) * scale
    model[2](2.0, model[0](1.0, X).tanh()).square().mean().backward()


def with_inputs_changed_in_place(model: nn.Sequential, curvature: Curvature) -> None:
    """Autograd does not notice: autocast let it save copies in lower precision."""
    x = X.clone()
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x)
        x += 1.0
        h = 2.0 * y.float()
        z = model[2](h)
        h += 1.0
    with pytest.warns(UserWarning, match="was changed in place after the layer used it"):
        z.square().mean().backward()


@pytest.mark.parametrize(
    ("passes", "cause"),
    [
        (with_inputs_changed_in_place, "its input was changed in place after it"),
        (with_wrapped_inputs, "its first argument is not its input as a plain tensor"),
        (with_other_first_arguments, "its first argument is not its input as a plain tensor"),
        (in_eval_mode, "called in eval mode alone"),
        (paused, r"called within curvature.paused\(\) alone"),
        (by_functions, "has a gradient, but its module was not called"),
        (by_forward, r"has a gradient, but its module was not called \(call the module, not its forward"),
        (by_gradients_of_vmap, "did not come through its output by loss.backward"),
        (by_vmap_in_the_loss, "did not come through its output by loss.backward.*outside of torch.func and vmap"),
    ],
)
def test_one_cause_is_named_and_the_step_is_one_of_plain_momentum(
    passes: Callable[[nn.Module, Curvature], None], cause: str
) -> None:
    model, plain = net(), net()
    curvature = Curvature(model)
    optimizer = configure_thor(model, lr=0.1, match_rms=None, preconditioner=curvature)
    passes(model, curvature)
    with pytest.warns(UserWarning, match=rf"2 of 2 layers.*until they are. 0, 2: [\w ]*{cause}[^:]*$"):
        optimizer.step()
    sgd = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, nesterov=True)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        p.grad = q.grad
    sgd.step()
    assert_bitwise(list(model.parameters()), list(plain.parameters()))


def test_a_loss_of_forces_alone_is_named_where_it_gives_the_last_layer_no_gradient_at_its_output() -> None:
    model, x = net(), X.clone().requires_grad_()
    optimizer = configure_thor(model, preconditioner=Curvature(model))
    (forces,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    forces.square().mean().backward()
    with pytest.warns(UserWarning, match=r"1 of 2 layers.* 2: its gradient.*\(a loss of its output's derivatives"):
        optimizer.step()


def test_the_curvature_of_another_model_is_refused() -> None:
    model = net()
    optimizer = configure_thor(model, preconditioner=Curvature(net()))
    model(X).square().mean().backward()
    with pytest.raises(RuntimeError, match="none has a gradient: the optimizer steps on"):
        optimizer.step()


def test_a_training_goes_on_after_a_resume_where_all_layers_with_curvature_are_frozen_since() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    curvature = Curvature(model, update_every_n_steps=1)
    state = curvature.state_dict()
    for layer in model:
        layer.weight.requires_grad_(False)
    curvature.load_state_dict(state)
    optimizer = Thor(model.parameters(), preconditioner=curvature)
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(4, 3)).square().mean().backward()
    with pytest.warns(UserWarning, match="0, 1: frozen since"):
        optimizer.step()
    assert [name for name, p in model.state_dict().items() if not torch.equal(p, before[name])] == ["0.bias", "1.bias"]


def test_an_output_that_the_loss_does_not_use_is_told_from_a_module_that_is_not_called() -> None:
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)])
    curvature = Curvature(model)
    model[1](X)
    model[0](X).square().mean().backward()
    with torch.no_grad():
        model[2](X)
    with pytest.warns(
        UserWarning,
        match="1: called, but the loss does not.* 2: its module was not called, or under torch.no_grad alone",
    ):
        curvature.update()
