"""Models that nobody here wrote: transformers' own, small and random, train with every matrix preconditioned."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_thor import Curvature, ThorCallback, configure_thor
from lightning_thor.layers.discovery import discover_layers
from lightning_thor.trainer.start_report import curvature_table
from tests.helpers.boring import callback_of, trainer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is not installed (the dev extra has it)")
from transformers.pytorch_utils import Conv1D  # noqa: E402

VOCABULARY, LENGTH, STEPS = 40, 12, 20


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4,
        num_channels=1, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=24, d_kv=12, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def text_batch(generator: torch.Generator) -> dict[str, Tensor]:
    tokens = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
    return {"input_ids": tokens, "labels": tokens.roll(1)}


def image_batch(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(1, 8, 8, generator=generator),
        "labels": torch.randint(5, (), generator=generator),
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], dict[str, Tensor]]]] = {
    "GPT-2": (gpt2, text_batch),
    "BERT": (bert, text_batch),
    "ViT": (vit, image_batch),
    "T5": (t5, text_batch),
}
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, Conv1D)


class Batches(Dataset[dict[str, Tensor]]):
    def __init__(self, make: Callable[[torch.Generator], dict[str, Tensor]]) -> None:
        generator = torch.Generator().manual_seed(5)
        self.samples = [make(generator) for _ in range(4 * STEPS)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


class Wrapped(L.LightningModule):
    def __init__(self, model: nn.Module, make: Callable[[torch.Generator], dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.make = model, make
        self.got_gradients: set[nn.Parameter] = set()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.got_gradients |= {p for p in self.parameters() if p.grad is not None}

    def configure_optimizers(self) -> Any:
        return configure_thor(self, lr=1e-3, weight_decay=0.01)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Batches(self.make), batch_size=4)


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_preconditioned_and_the_table_says_so(name: str, tmp_path: Path) -> None:
    make_model, make_batch = MODELS[name]
    torch.manual_seed(0)
    module = Wrapped(make_model(), make_batch)
    fit = trainer(tmp_path, ThorCallback(update_every_n_steps=5, summary=False), max_epochs=1)
    fit.fit(module)
    assert fit.global_step == STEPS
    curvature = callback_of(fit).curvature
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    table = curvature_table(curvature)
    said = dict(zip(table.columns[0].cells, table.columns[2].cells, strict=True))
    used = {use.name: layer for layer in curvature.layers.values() for use in layer.uses}
    updates = dict(zip(curvature.layers, curvature.factors.updates.tolist(), strict=True))
    matrices = {
        module_name: layer
        for module_name, layer in module.named_modules()
        if isinstance(layer, MATRICES) and layer.weight in module.got_gradients
    }
    assert len(matrices) >= 10
    for module_name, layer in matrices.items():
        assert used[module_name].parameters[0] is layer.weight
        assert updates[used[module_name].name] == 4, module_name
        assert "A " in str(said[module_name]) or str(said[module_name]).startswith("tied")
    directions = curvature.precondition({p: torch.randn_like(p) for p in module.got_gradients})
    assert directions.keys() == module.got_gradients


class Doubled(Conv1D):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)  # type: ignore[no-any-return]


def test_a_conv1d_with_a_forward_of_its_own_is_left_out() -> None:
    _, left_out = discover_layers(Doubled(3, 2), block_size=None, precondition_bias=False)
    assert left_out == {"": "Doubled has a forward of its own, which may not be Conv1D's"}


def test_the_table_of_gpt2_is_its_output_layer_and_both_are_one_matrix() -> None:
    model = gpt2()
    layers, left_out = discover_layers(model, block_size=128, precondition_bias=False)
    assert layers["transformer.wte"].tied_to == "lm_head"
    assert left_out == {}


@pytest.mark.parametrize("precondition_bias", [False, True])
@pytest.mark.parametrize("fused", [None, {"": 3}])
def test_conv1d_is_a_linear_layer_whose_weight_is_mirrored(fused: Any, precondition_bias: bool) -> None:
    torch.manual_seed(0)
    mirrored = Conv1D(6, 5).double()
    linear = nn.Linear(5, 6).double()
    linear.weight.data, linear.bias.data = mirrored.weight.detach().T.clone(), mirrored.bias.detach().clone()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    found = []
    for model in (mirrored, linear):
        curvature = Curvature(model, block_size=4, precondition_bias=precondition_bias, fused=fused)
        model(x).sin().mean().backward()
        curvature.update()
        directions = curvature.precondition({p: p.grad for p in model.parameters()})
        found.append([directions[model.weight], directions[model.bias]])
    assert found[0][0].is_contiguous()
    torch.testing.assert_close(found[0][0].T, found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
