"""Trainings of language models on several ranks: tied tables, attention, transformers' own layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_thor.optim.fading import MEAN_SQUARE
from tests.helpers.distributed_workers import HALVES, ROWS, Module, Result, fit, in_buckets

VOCABULARY, LENGTH, WIDTH = 11, 6, 8
UNEQUAL = (10, 22)


def text(number: int) -> tuple[Tensor, Tensor]:
    """Always the same 32 texts and their next tokens, both ``[32, 6]``, for one number."""
    generator = torch.Generator().manual_seed(2000 + number)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


class Text(nn.Module):
    """A table, an attention and a multilayer perceptron, and the table again as the output layer.

    Registered in another order than they run.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=self.head.weight.dtype)
        logits: Tensor = self.head(self.norm(self.layer(self.table(tokens), mask, is_causal=True)))
        return logits


class T5(nn.Module):
    """transformers' T5: one table for encoder, decoder and output.

    Its relative positions do not train: it looks them up once for all texts of a rank, so their gradients have no parts
    by text, and what is the square of a sum on one rank is a sum of squares on two.
    """

    def __init__(self) -> None:
        super().__init__()
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(6)
        self.model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
                decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=True,
            )
        )  # fmt: skip
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("relative_attention_bias" not in name)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens.flip(1), decoder_input_ids=tokens).logits
        return logits


class TextModule(Module):
    """Trains ``net`` on texts.

    Args:
        summed: take the sum over tokens as the loss, not the mean: DDP's gradient then is the whole batch's, over the
            number of ranks, whatever their parts; which is another scale, and no other direction.
    """

    def __init__(self, net: nn.Module, parts: tuple[int, ...], summed: bool = False) -> None:
        super().__init__(parts, net=net)
        self.reduction = "sum" if summed else "mean"

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        return text(number)

    def loss(self, inputs: Tensor, targets: Tensor, number: int) -> Tensor:
        return F.cross_entropy(self.net(inputs).flatten(0, 1), targets.flatten(), reduction=self.reduction)


def with_gradients_times(state: Result, n: int) -> Result:
    """A training's state as if its gradients had been so many times as large: only what notes their size differs."""
    groups = [{**group, "gradient_rms": n * group["gradient_rms"]} for group in state["optimizer"]["param_groups"]]
    return {**state, "optimizer": {**state["optimizer"], "param_groups": groups}}


def without_running_means(state: Result) -> Result:
    """A training's state but for the running means of squared gradients, which have the unit of the gradients."""
    optimizer = state["optimizer"]
    states = {n: {k: v for k, v in own.items() if k != MEAN_SQUARE} for n, own in optimizer["state"].items()}
    return {**state, "optimizer": {**optimizer, "state": states}}


def train(
    folder: Path, net: nn.Module, parts: tuple[int, ...], *, summed: bool = False, strategy: Any = None
) -> Result:
    """Two epochs on as many ranks as there are parts; in buckets, unless a strategy is given."""
    return fit(
        folder,
        TextModule(net, parts, summed),
        devices=len(parts),
        strategy=strategy or (in_buckets() if len(parts) > 1 else None),
        loss_reduction="sum" if summed else "mean",
    )


TRAININGS: dict[str, Callable[[Path], Result]] = {
    "text": lambda folder: train(folder, Text(), HALVES),
    "unequal_text": lambda folder: train(folder, Text(), UNEQUAL, summed=True),
    "unequal_text_ddp": lambda folder: train(folder, Text(), UNEQUAL, summed=True, strategy="ddp"),
}
if importlib.util.find_spec("transformers") is not None:
    TRAININGS["unequal_t5"] = lambda folder: train(folder, T5(), UNEQUAL, summed=True)
FOUR: dict[str, Callable[[Path], Result]] = {
    "four_texts": lambda folder: train(folder, Text(), (3, 9, 13, 7), summed=True),
}
