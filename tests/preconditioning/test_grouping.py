"""Laws of groups: directions are those of each layer alone, and more layers take no more operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature, Thor
from lightning_thor.layers.discovery import discover_layers
from lightning_thor.linalg import block_diagonal, memory
from lightning_thor.linalg.memory import adjacent_runs, as_stacked_view
from lightning_thor.optim.update_scaling import scale_to_norms_
from lightning_thor.preconditioning import grouping
from lightning_thor.preconditioning.grouping import DenseGroup, NormGroup, RowChunkedLayer, group_layers
from tests.helpers.formulas import preconditioned
from tests.helpers.watch import Watch


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; all other tests are as on a CPU."""
    monkeypatch.setattr(memory, "UNMERGED_DEVICES", set())
    monkeypatch.setattr(memory, "HOST", set())
    for module in (grouping, block_diagonal):
        monkeypatch.setattr(module, "UNBATCHED_DEVICES", set())


def net() -> nn.Module:
    """Layers in pairs of one form, between them one of another, and one that is alone (padded blocks)."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(32, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 32, bias=False),
        nn.LayerNorm(32, bias=False),
        nn.Linear(32, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 13),
    ).double()


def observed(model: nn.Module, **options: Any) -> tuple[Curvature, dict[nn.Parameter, Tensor]]:
    curvature = Curvature(model, **{"block_size": 8, **options})
    model(torch.randn(20, 32, dtype=torch.float64)).sin().sum().backward()
    curvature.update()
    return curvature, {p: p.grad for p in model.parameters() if p.grad is not None}


@pytest.mark.parametrize("copied", [1, 4], ids=["copied", "one by one"])
@pytest.mark.parametrize("missing", [(), ("6.weight",), ("7.bias", "1.weight"), ("12.weight", "0", "2.weight")])
def test_directions_of_a_group_are_those_of_each_layer(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], copied: int
) -> None:
    monkeypatch.setattr(grouping, "COPIED_LAUNCHES", copied)
    model = net()
    curvature, grads = observed(model)
    kinds = Counter((type(group), len(group.layers)) for group in curvature._groups)
    assert kinds == {
        (DenseGroup, 2): 1,
        (DenseGroup, 3): 1,
        (NormGroup, 2): 2,
        (NormGroup, 1): 1,
        (RowChunkedLayer, 1): 1,
    }
    names = {name: p for name, p in model.named_parameters() if name in missing}
    grads = {p: grad for p, grad in grads.items() if all(p is not one for one in names.values())}
    found = curvature.precondition(grads)
    assert found.keys() == grads.keys()
    for name, layer in curvature.layers.items():
        own = [grads[p] for p in layer.parameters if p in grads]
        whole = len(own) == len(layer.parameters)
        expected = preconditioned(layer, own, *curvature.inverses_of(name)) if whole else own
        given = [found[p] for p in layer.parameters if p in grads]
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-14)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(given, own, strict=True)), "it was not copied"


def test_a_curvature_that_stores_some_inverses_groups_those() -> None:
    """Without the inverses of the others, those stored are adjacent to other ones."""
    curvature, grads = observed(net())
    everything = curvature.precondition(grads)
    stacks, names = curvature.factors, list(curvature.layers)
    stored = {name: curvature.inverses_of(name) for name in names}
    copies = {name: tuple(None if one is None else one.clone() for one in own) for name, own in stored.items()}
    chosen = [index for index, name in enumerate(names) if name not in ("8", "2")]
    stacks.set_inverse_owner(chosen)
    curvature._own_layers = [curvature.layers[names[index]] for index in chosen]
    curvature.__dict__.pop("_groups")
    for index in chosen:
        for into, copy in zip(curvature.inverses_of(names[index]), copies[names[index]], strict=True):
            if into is not None:
                into.copy_(copy)
    found = curvature.precondition(grads)
    assert [len(group.layers) for group in curvature._groups if isinstance(group, DenseGroup)] == [2, 2]
    for index in chosen:
        for p in curvature.layers[names[index]].parameters:
            torch.testing.assert_close(found[p], everything[p], rtol=1e-12, atol=1e-14)


def test_polar_layers_share_no_group_with_others() -> None:
    layers, _ = discover_layers(net(), block_size=8, precondition_bias=False)
    alike = {name: layers[name] for name in ("6", "8", "10")}
    A, G = (torch.eye(8).repeat(3, 1, 4, 1, 1) for _ in range(2))
    groups = group_layers(list(alike.values()), list(zip(A, G, strict=True)), polar_layers={"6", "8"})
    assert [[layer.name for layer in group.layers] for group in groups] == [["6", "8"], ["10"]]


@pytest.mark.parametrize("one_by_one", [set(), {"cpu"}], ids=["as on a GPU", "as on a CPU"])
@pytest.mark.parametrize("entries", [1, 70, 10**9])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_some_rows_at_a_time_are_the_whole_product(
    monkeypatch: pytest.MonkeyPatch, one_by_one: set[str], entries: int, transposed: tuple[bool, bool]
) -> None:
    """Of an embedding, of a layer whose last block is smaller, of one with a diagonal G, and of a convolution, with
    factors that are not symmetric."""
    torch.manual_seed(5)
    for module in (grouping, block_diagonal):
        monkeypatch.setattr(module, "UNBATCHED_DEVICES", one_by_one)
    monkeypatch.setattr(grouping, "ROW_CHUNK_NUMEL", {"cpu": entries})
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(11, 12),
            "padded": nn.Linear(12, 13, bias=False),
            "more": nn.Linear(12, 7, bias=False),
            "diagonal": nn.Linear(12, 9, bias=False),
            "convolution": nn.Conv2d(2, 6, 2, bias=False),
        }
    ).double()
    layers, _ = discover_layers(model, block_size=4, precondition_bias=False, diagonal_G=["diagonal"])
    assert (layers["padded"].G.padding, layers["more"].G.padding) == (3, 1)
    for name, layer in layers.items():
        A, G = layer.A, layer.G
        stored = torch.randn(A.shape, dtype=torch.float64), torch.randn(G.shape, dtype=torch.float64)
        (group,) = group_layers([layer], [stored])
        assert type(group) is (DenseGroup if name == "convolution" and not one_by_one else RowChunkedLayer)
        (p,) = layer.parameters
        grad = torch.randn(p.shape, dtype=torch.float64)
        turned = [one.mT if turn else one for one, turn in zip(stored, transposed, strict=True)]
        right, left = (torch.block_diag(*one[0])[:n, :n] for one, n in zip(turned, (A.width, G.width), strict=True))
        matrix = grad.T if name == "table" else grad.flatten(1)
        product = left @ matrix @ right
        for laid_out in (grad, grad.mT.contiguous().mT):
            found: dict[nn.Parameter, Tensor] = {}
            group.put(found, group.product(group.to_matrices({p: laid_out}), transposed=transposed), {p: laid_out})
            torch.testing.assert_close(found[p], (product.T if name == "table" else product).view_as(p))
            assert found[p].is_contiguous()


@pytest.mark.parametrize("largest", [0, 32 * 32], ids=["large", "small"])
def test_more_layers_of_one_form_take_one_product_each_if_they_are_large_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    monkeypatch.setattr(grouping, "COPIED_NUMEL", largest)

    def operations(n: int) -> Counter[str]:
        model = nn.Sequential(*(part for _ in range(n) for part in (nn.Linear(32, 32), nn.LayerNorm(32)))).double()
        curvature, grads = observed(model)
        curvature.update()  # from the second step on the host knows the unit of gradients
        curvature.precondition(grads)  # batches are made once
        with Watch() as watch:
            found = curvature.precondition(grads)
            scale_to_norms_(list(found.values()), list(found), [0.2] * len(found))
        views = {"view", "transpose", "unbind", "alias", "permute", "as_strided", "select", "unsqueeze", "dot"}
        return Counter({name: count for name, count in watch.called.items() if name not in views})

    few, many = operations(4), operations(9)
    assert many - few == ({} if largest else {"bmm": 5})


def test_runs_are_of_one_storage_and_shape_in_the_order_of_memory() -> None:
    three = torch.zeros(3, 4).unbind()
    other, empty = torch.zeros(4), torch.zeros(0, 4).unbind()
    assert adjacent_runs([three[2], three[0], three[1]]) == [[1, 2, 0]]
    assert adjacent_runs([three[0], three[2]]) == [[0], [1]]
    assert sorted(adjacent_runs([three[0], other])) == [[0], [1]]
    assert adjacent_runs([three[0], three[1][:2]]) == [[0], [1]]
    assert adjacent_runs(torch.zeros(4, 3).T.unbind()) == [[0], [1], [2]]
    assert adjacent_runs(list(empty)) == []
    # In the order of their first index, wherever they lie: the same in every step.
    assert adjacent_runs([three[2], other, three[0], three[1]]) == [[1], [2, 3, 0]]
    as_stacked_view([three[0], three[1]]).fill_(1.0)
    assert torch.stack(three).sum() == 8


def test_steps_where_no_number_can_be_read_are_those_where_all_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two modes, with limits that differ, rates and momenta that change, and one that is not scaled."""

    def trained() -> list[Tensor]:
        torch.manual_seed(4)
        layers = [part for _ in range(5) for part in (nn.Linear(32, 32), nn.Tanh())]
        model = nn.Sequential(*layers, nn.LayerNorm(32), nn.Linear(32, 13)).double()
        params = list(model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": params[10:], "mode": "polar"},
            {"params": params[:3], "max_relative_step": 0.02},
            {"params": params[3:5], "match_rms": None, "clip_norm": 0.1},
            {"params": params[5:10]},
        ]
        curvature = Curvature(model, block_size=8, mode="polar", update_every_n_steps=2)
        thor = Thor(groups, preconditioner=curvature)
        for number in range(6):
            model(torch.randn(20, 32, dtype=torch.float64)).sin().sum().backward()
            for group in thor.param_groups:
                group["lr"], group["momentum"] = 0.03 / (1 + number), 0.8 + 0.01 * number
            thor.step()
            thor.zero_grad()
        return params

    on_a_device = trained()
    monkeypatch.undo()
    torch.testing.assert_close(on_a_device, trained(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.complex64])
def test_updates_of_any_memory_order_and_type_are_brought_to_scale(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    shapes = [(4, 3), (4, 3), (), (2, 3, 5, 5), (7,)]
    updates = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    updates[0:2] = torch.stack(updates[0:2]).unbind()
    updates[3] = updates[3].to(memory_format=torch.channels_last)
    wanted = [0.5, 2.0, 0.1, 3.0, 1.0]
    for at_most, sizes in (
        (False, wanted),
        (True, [min(n, float(update.abs().double().norm())) for n, update in zip(wanted, updates, strict=True)]),
    ):
        scaled = [torch.empty_like(update).copy_(update) for update in updates]
        scaled[0:2] = torch.stack(updates[0:2]).unbind()
        scale_to_norms_(scaled, scaled, wanted, at_most=at_most)
        for update, new, norm in zip(updates, scaled, sizes, strict=True):
            expected = update * (norm / float(update.abs().double().norm()))
            torch.testing.assert_close(new, expected.to(dtype))


@pytest.mark.parametrize("chunk_numel", [None, 50], ids=["whole", "in chunks"])
@pytest.mark.parametrize(("n_parts", "width"), [(1, 17), (2, 17), (3, 16), (3, 22), (5, 3)])
def test_each_fused_part_has_blocks_of_its_own_also_where_its_last_one_is_smaller(
    monkeypatch: pytest.MonkeyPatch, n_parts: int, width: int, chunk_numel: int | None
) -> None:
    """Beside ``G⁻¹ grad A⁻¹`` of each part, with dense block-diagonal matrices."""
    if chunk_numel is not None:
        monkeypatch.setitem(grouping.ROW_CHUNK_NUMEL, "cpu", chunk_numel)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, n_parts * width, bias=False)).double()
    curvature, grads = observed(model, fused={"0": n_parts})
    weight = model[0].weight
    A, G = curvature.inverses_of("0")
    assert A is not None
    expected = [
        torch.block_diag(*blocks)[:width, :width] @ grad @ torch.block_diag(*A[0])
        for blocks, grad in zip(G, grads[weight].chunk(n_parts), strict=True)
    ]
    torch.testing.assert_close(curvature.precondition(grads)[weight], torch.cat(expected), rtol=1e-10, atol=1e-12)
