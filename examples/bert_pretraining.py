"""Pretraining of Hugging Face's BERT on any text: a word in seven is hidden and has to be found."""

from typing import Any

import lightning as L
from torch import Tensor

from examples.batches import Batch
from examples.masked_text import NO_TARGET, MaskedTextData


class BertPretraining(L.LightningModule):
    """transformers' ``BertForMaskedLM``, from nothing; logs ``train_loss``, ``val_loss`` (nats per hidden token) and
    ``val_acc``, the share of hidden tokens found.

    Only words are predicted, not whether one sentence follows another. It has no ``configure_optimizers``: LightningCLI
    adds one; in Python a subclass has one, such as that of `lightning_thor.recipes.bert_large`.

    Args:
        vocab_size: tokens of the model; the tokenizer may have fewer, not more.
        layers: transformer blocks.
        width: of the residual stream; a multiple of ``heads``.
        heads: attention heads per block.
        inner: width of the perceptrons' hidden layer.
        context: longest piece, in tokens.
        dropout: of the residual branches and of the attention.

    Raises:
        ImportError: transformers is missing.
        ValueError: when training starts, the data has more tokens or longer pieces than the model.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        layers: int = 24,
        width: int = 1024,
        heads: int = 16,
        inner: int = 4096,
        context: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertForMaskedLM
        except ImportError as error:
            raise ImportError(
                "BertPretraining needs transformers: pip install 'lightning-thor[transformers]'"
            ) from error
        self.vocab_size = vocab_size
        self.context = context
        config = BertConfig(
            vocab_size=vocab_size,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=inner,
            max_position_embeddings=context,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.bert: Any = BertForMaskedLM(config)

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, MaskedTextData):
            return
        size = data.tokenizer.get_vocab_size()
        if size > self.vocab_size:
            raise ValueError(
                f"The tokenizer {data.tokenizer_file} has {size} tokens, the model only vocab_size={self.vocab_size}. "
                f"Set --model.vocab_size {size}; or remove the file and set --data.vocab_size {self.vocab_size}."
            )
        if data.context > self.context:
            raise ValueError(
                f"MaskedTextData gives pieces of context={data.context} tokens, but the model takes at most "
                f"context={self.context}. Set both to one value: --data.context and --model.context."
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        input_ids, labels = batch
        loss: Tensor = self.bert(input_ids=input_ids, labels=labels).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        input_ids, labels = batch
        out = self.bert(input_ids=input_ids, labels=labels)
        # Every piece hides as many tokens, so batches weigh by their pieces.
        found = (out.logits.argmax(-1) == labels).sum() / (labels != NO_TARGET).sum()
        self.log("val_loss", out.loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.log("val_acc", found, prog_bar=True, batch_size=len(labels), sync_dist=True)
