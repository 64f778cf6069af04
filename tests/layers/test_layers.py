"""Which layers have curvature, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from lightning_thor import Curvature, Thor
from lightning_thor.layers.discovery import discover_layers
from tests.helpers.boring import assert_bitwise


def found(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    layers, left_out = discover_layers(model, block_size=128, precondition_bias=False)
    return list(layers), left_out


def frozen_scale() -> nn.Module:
    norm = nn.LayerNorm(3)
    norm.bias.requires_grad_(False)
    return norm


def pruned(module: nn.Module) -> nn.Module:
    return prune.random_unstructured(module, "bias", amount=0.5)


class ChannelsFirst(nn.LayerNorm):
    """As several vision libraries have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class LayerNorm(nn.Module):
    """Has the name of a type of torch's, as many libraries have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


class GroupNorm(nn.GroupNorm):
    """Likewise, as a subclass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2.0 * x)


class Standardized(nn.Conv2d):
    """Overrides what torch's own forward calls."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Pooled(nn.Module):
    """Has parameters of these names beside another module, as a model has its positions or a token of its own."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.activation = nn.ReLU()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(2)))


def with_a_forward_of_its_own(module: nn.Module) -> nn.Module:
    before = module.forward
    module.forward = lambda x: before(2.0 * x)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Bilinear(2, 2, 2), "no curvature for Bilinear: its weight has two inputs"),
        (nn.InstanceNorm2d(2, affine=True), "no curvature for InstanceNorm2d"),
        (LayerNorm(), f"no curvature for {__name__}.LayerNorm"),
        (GroupNorm(1, 2), f"{__name__}.GroupNorm has a forward of its own, which may not be GroupNorm's"),
        (Pooled("query"), "no curvature for Pooled's own query"),
        (Pooled("a", "b", "c", "d"), "no curvature for Pooled's own a, b, c and 1 more"),
        (nn.Embedding(3, 2, sparse=True), "sparse or frequency-scaled gradient"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "sparse or frequency-scaled gradient"),
        (nn.LazyLinear(3), "lazy and not initialised: run one forward pass before fit"),
        (orthogonal(nn.Linear(2, 2)), "its weight is not a plain parameter (parametrized, or not affine)"),
        (nn.Linear(2, 2).requires_grad_(False), "frozen"),
        (frozen_scale(), "frozen in part"),
        (pruned(nn.LayerNorm(3)), "its bias is not a plain parameter (parametrized, or a buffer)"),
        (nn.Linear(2, 0), "empty weight"),
        (ChannelsFirst(2), "ChannelsFirst has a forward of its own, which may not be LayerNorm's"),
        (Standardized(2, 2, 3), "Standardized has a _conv_forward of its own, which may not be Conv2d's"),
        (
            with_a_forward_of_its_own(nn.BatchNorm1d(2)),
            "BatchNorm1d has a forward of its own, which may not be BatchNorm1d's",
        ),
    ],
)
def test_what_has_no_curvature_is_named_with_its_reason(layer: nn.Module, reason: str) -> None:
    names, left_out = found(nn.ModuleDict({"layer": layer, "other": nn.Linear(2, 2)}))
    assert names == ["other"]
    assert left_out["layer"] == reason


def test_a_transposed_convolution_has_no_reduced_statistics() -> None:
    curvature = Curvature(nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Conv2d(3, 2, 3)), statistics="reduce")
    assert (list(curvature.layers), curvature.left_out) == (["1"], {"0": "no curvature for ConvTranspose2d"})


def test_norms_that_share_a_shift_alone_have_no_curvature() -> None:
    norms = nn.ModuleList([nn.LayerNorm(3), nn.LayerNorm(3), nn.LayerNorm(3)])
    norms[1].bias = norms[0].bias
    assert found(norms) == (["2"], dict.fromkeys(["0", "1"], "shares its bias with another layer"))
    norms[1].weight = norms[0].weight
    assert found(norms) == (["0", "2"], {})


def share(model: nn.Sequential) -> None:
    model[2].bias = model[0].bias


def prune_biases(model: nn.Sequential) -> None:
    for layer in model[::2]:
        pruned(layer)


def parametrize_biases(model: nn.Sequential) -> None:
    for layer in model[::2]:
        register_parametrization(layer, "bias", nn.Tanh())


@pytest.mark.parametrize("change", [share, prune_biases, parametrize_biases])
def test_a_bias_that_is_no_parameter_of_one_layer_alone_stays_plain(change: Callable[[nn.Sequential], None]) -> None:
    found = []
    for precondition_bias in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        change(model)
        curvature = Curvature(model, precondition_bias=precondition_bias)
        optimizer = Thor(model.parameters(), preconditioner=curvature)
        for _ in range(3):
            model(torch.randn(8, 4, generator=torch.Generator().manual_seed(1))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach() for p in model.parameters()])
    assert_bitwise(*found)


def test_a_bias_that_a_module_around_the_layer_holds_too_is_the_layers() -> None:
    """As transformers' ``BertLMPredictionHead`` does."""
    head = nn.Module()
    head.decoder = nn.Linear(4, 2)
    head.bias = head.decoder.bias
    assert Curvature(head, precondition_bias=True).layers["decoder"].with_bias


def test_modules_without_parameters_are_not_mentioned() -> None:
    assert found(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3, affine=False), nn.Dropout())) == ([], {})


def test_a_subclass_of_a_supported_layer_is_supported() -> None:
    class Mine(nn.Linear):
        pass

    assert found(nn.Sequential(Mine(2, 2)))[0] == ["0"]


def test_the_model_itself_can_be_the_layer() -> None:
    assert found(nn.Linear(2, 2))[0] == [""]


def test_a_transformer_layer_has_no_matrix_without_curvature() -> None:
    names, left_out = found(nn.TransformerDecoderLayer(8, 2, 16))
    projections = ["q_proj", "k_proj", "v_proj", "out_proj"]
    attentions = [f"{attention}.{name}" for attention in ("self_attn", "multihead_attn") for name in projections]
    assert names == [*attentions, "linear1", "linear2", "norm1", "norm2", "norm3"]
    assert left_out == {}


class Scaled(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def parametrized_attention() -> nn.Module:
    attention = nn.MultiheadAttention(8, 2)
    weight_norm(attention, "in_proj_weight")
    return attention


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (Scaled(8, 2), "Scaled has a forward that is not torch's, as it is known here"),
        (nn.MultiheadAttention(8, 2).requires_grad_(False), "frozen"),
        (parametrized_attention(), "its weight is not a plain parameter (parametrized, or not affine)"),
    ],
)
def test_what_has_no_curvature_in_an_attention_is_named_weight_by_weight(attention: nn.Module, reason: str) -> None:
    names, left_out = found(nn.ModuleDict({"attention": attention}))
    projections = [f"attention.{name}_proj" for name in ("q", "k", "v")]
    assert {left_out.get(name) for name in projections} == {reason}
    assert not set(projections) & set(names)


def test_attention_of_a_torch_that_is_written_otherwise_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_thor.layers.attention.IS_SUPPORTED", False)
    names, left_out = found(nn.MultiheadAttention(8, 2))
    assert names == []
    assert list(left_out) == ["q_proj", "k_proj", "v_proj", "out_proj"]


def test_everything_else_takes_plain_momentum_in_the_same_optimizer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4)).double()
    curvature = Curvature(model)
    optimizer = Thor(model.parameters(), lr=0.1, momentum=0.0, match_rms=None, preconditioner=curvature)
    y = model[0](torch.randn(6, 4, dtype=torch.float64))
    model[1](y, y).square().mean().backward()
    before = model[1].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), before - 0.1 * model[1].weight.grad)


def test_blocks_of_grouped_convolutions() -> None:
    layers, _ = discover_layers(nn.Conv2d(8, 12, 3, groups=4), block_size=128, precondition_bias=True)
    assert layers[""].A.shape == (4, 1, 19, 19)  # 2 channels x 3 x 3, and the bias
    assert layers[""].G.shape == (4, 1, 3, 3)


def test_layers_on_several_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"several devices.*cpu, meta"):
        Curvature(model)
