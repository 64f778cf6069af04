"""Laws of `exact_factors`: they are an independent K-FAC's of the whole data set, and nothing else has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_thor import exact_factors

Batches = list[tuple[Tensor, Tensor]]


def net() -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def data(*sizes: int) -> Batches:
    torch.manual_seed(7)
    return [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in sizes]


def given(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def drawn(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits, torch.distributions.Categorical(logits=logits.detach()).sample())


def reference(model: nn.Module, batches: Batches, fisher_type: str) -> list[Tensor]:
    """The reference's matrices of the two weights."""
    curvlinops = pytest.importorskip(
        "curvlinops", reason="the reference K-FAC is not installed (make test installs it)"
    )
    weights = [model[0].weight, model[3].weight]  # type: ignore[index]
    whole = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    operator = curvlinops.KFACLinearOperator(
        model.eval(), nn.CrossEntropyLoss(), weights, whole, fisher_type=fisher_type, check_deterministic=False
    )
    dense = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    return [dense[:20, :20], dense[20:, 20:]]


def kroneckers(factors: dict[str, dict[str, Any]]) -> list[Tensor]:
    return [torch.kron(one["G"][0, 0], one["A"][0, 0]) for one in factors.values()]


def test_with_the_datas_targets_it_is_the_references_empirical_fisher_over_batches_of_any_size() -> None:
    model, batches = net(), data(8, 3, 5)
    found = kroneckers(exact_factors(model, batches, given))
    for ours, theirs in zip(found, reference(model, batches, "empirical"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_with_drawn_targets_it_estimates_the_references_gauss_newton_matrix() -> None:
    model, batches = net(), data(16)
    found = kroneckers(exact_factors(model, batches * 400, drawn))
    for ours, theirs in zip(found, reference(model, batches, "type-2"), strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()  # 6,400 drawn targets


def test_it_is_the_same_where_no_gradients_are_wanted() -> None:
    """As in a validation or a test of Lightning's."""
    model, batches = net(), data(8, 3)
    plain = kroneckers(exact_factors(model, batches, given))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = exact_factors(model, batches, given)
        torch.testing.assert_close(kroneckers(found), plain)


def test_the_model_and_its_gradients_are_left_as_they_were() -> None:
    model = net().train()
    model[1].eval()
    given(model, data(4)[0]).backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    exact_factors(model, data(4, 4), given)
    for name, p in model.named_parameters():
        torch.testing.assert_close((p.detach(), p.grad), before[name], rtol=0, atol=0)
    assert [module.training for module in model] == [True, False, True, True]
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match="got no batch"):
        exact_factors(model, [], given)
    assert model[3].training
