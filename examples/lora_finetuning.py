"""Fine-tuning a language model with LoRA and THOR: ``python -m examples.lora_finetuning --model NAME --text FILE``.

peft freezes the model and puts two small linear layers beside each of its own (Hu et al. 2021, arXiv:2106.09685):
``configure_thor`` takes what trains, `ThorCallback` preconditions it, and the frozen rest costs nothing. Without
``--model`` a tiny one with random weights is trained on bytes, to see that all of it runs. Needs ``pip install
'.[finetuning]'``. The adapter is saved in ``--out``, as peft's ``PeftModel.from_pretrained`` reads it.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_thor import ThorCallback, configure_thor


class Bytes:
    """A tokenizer without a vocabulary: one token for each byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def load(name: str | None) -> tuple[Any, Any]:
    """A causal language model of transformers and its tokenizer, by name or folder; None: a tiny one, random."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config), Bytes()


class FineTuning(L.LightningModule):
    """Trains a peft model on windows of tokens ``[n, length]``; logs ``loss`` and ``val_loss``.

    Args:
        model: what trains in it is taken.
        lr: learning rate.
        options: other options of `lightning_thor.Thor`, such as ``mode``.
    """

    def __init__(self, model: PeftModel, lr: float = 3e-3, **options: Any) -> None:
        super().__init__()
        self.model, self.lr, self.options = model, lr, options

    def loss(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Prompts ``[n, length]`` to texts ``[n, length + 32]``, of the likeliest tokens."""
        generate: Any = self.model.generate
        texts: Tensor = generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=32, do_sample=False
        )
        return texts

    def configure_optimizers(self) -> Any:
        return configure_thor(self, lr=self.lr, **self.options)


def windows(tokens: list[int], length: int) -> Tensor:
    """A text in pieces ``[n, length]``; what remains is left out."""
    if len(tokens) < 20 * length:
        raise ValueError(f"The text has {len(tokens)} tokens: fewer than 20 windows of {length}. Give a longer one.")
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Fine-tune, save the adapter, and let it go on with a text; returns the losses before and after."""
    parser = argparse.ArgumentParser(description="Fine-tuning with LoRA and THOR.")
    parser.add_argument("--model", help="name or folder of a causal language model (default: a tiny random one)")
    parser.add_argument("--text", type=Path, help="to train on (default: the sources of these examples)")
    parser.add_argument("--rank", type=int, default=8, help="of the added layers (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="(default: %(default)s)")
    parser.add_argument("--mode", default="natural", help="of Thor (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/lora"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    L.seed_everything(0, verbose=False)
    model, tokenizer = load(options.model)
    files = [options.text] if options.text else sorted(Path(__file__).parent.glob("*.py"))
    text = windows(tokenizer.encode("".join(file.read_text(encoding="utf-8") for file in files)), options.length)
    text = text[torch.randperm(len(text))]
    held_out, train = text[: len(text) // 10], text[len(text) // 10 :]

    adapted = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear"))
    module = FineTuning(adapted, options.lr, mode=options.mode)
    trainer = L.Trainer(
        max_steps=options.steps, logger=False, enable_checkpointing=False, limit_val_batches=20,
        num_sanity_val_steps=0, callbacks=[ThorCallback()], default_root_dir=options.out,
    )  # fmt: skip
    loader: Any = partial(DataLoader, batch_size=options.batch_size)
    before = trainer.validate(module, loader(held_out), verbose=False)[0]["val_loss"]
    trainer.fit(module, loader(train, shuffle=True))
    after = trainer.validate(module, loader(held_out), verbose=False)[0]["val_loss"]
    adapted.save_pretrained(str(options.out))

    said: Any = trainer.predict(module, loader(held_out[:1]))
    print(f"held-out loss: {before:.3f} before, {after:.3f} after {trainer.global_step} steps")
    print("goes on as:", repr(tokenizer.decode(said[0][0, options.length :].tolist())))
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
