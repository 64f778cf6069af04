"""A small GPT that predicts the next character of a text."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.batches import Batch
from examples.char_data import CharData


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each after a layer norm: ``[N, T, width]`` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm_attention(x))
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out

    def attend(self, x: Tensor) -> Tensor:
        """Mix the positions up to each one, ``[N, T, width]`` to the same."""
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each [N, heads, T, width/heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class CharGPT(L.LightningModule):
    """A pre-norm GPT; logs ``train_loss``, ``val_loss`` and ``test_loss``, in nats per character.

    It has no ``configure_optimizers``: LightningCLI adds one, and in Python a subclass has one (see
    ``ImageClassifier``).

    Args:
        vocab_size: number of different symbols; the text may have fewer, not more. 65 is tiny Shakespeare's.
        layers: transformer blocks.
        width: of the residual stream; a multiple of ``heads``.
        heads: attention heads per block.
        context: longest window, in characters.
        warmup_steps: the learning rate rises linearly over so many first steps, whatever the optimizer; they must end
            within the first epoch, since schedulers of LightningCLI act at its end. 0 for none.

    Raises:
        ValueError: ``width`` is not a multiple of ``heads``; or, when training starts, the data has more symbols or
            longer windows than the model.
    """

    def __init__(
        self,
        vocab_size: int = 65,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        context: int = 128,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"CharGPT: width must be a multiple of heads, got width={width} and heads={heads}.")
        self.vocab_size = vocab_size
        self.context = context
        self.warmup_steps = warmup_steps
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.apply(initialise_)

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, CharData):
            return
        if len(data.symbols) > self.vocab_size:
            raise ValueError(
                f"{data.root} has {len(data.symbols)} different symbols, the model only vocab_size={self.vocab_size}. "
                f"Set --model.vocab_size {len(data.symbols)}, or CharGPT(vocab_size={len(data.symbols)})."
            )
        if data.context > self.context:
            raise ValueError(
                f"CharData gives windows of context={data.context} characters, but the model takes at most "
                f"context={self.context}. Set both to one value: --data.context and --model.context."
            )

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of every next character: int64 ``[N, T]``, T at most ``context``, to ``[N, T, vocab_size]``."""
        positions = torch.arange(characters.shape[1], device=characters.device)
        x = self.token(characters) + self.position(positions)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over all positions of all windows, nats per character."""
        characters, next_characters = batch
        return F.cross_entropy(self(characters).flatten(0, 1), next_characters.flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step < self.warmup_steps:
            for optimizer in self.trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("initial_lr", group["lr"]) * (step + 1) / self.warmup_steps

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, batch_size=len(batch[0]), sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)


def initialise_(module: nn.Module) -> None:
    """Small normal weights and zero biases, as GPT-2 has them: the first loss is then close to log(vocab_size)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
