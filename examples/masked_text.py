"""Pieces of a text in which a token in seven is hidden and has to be found."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from examples.batches import Batch, batch_loader, read_text

NO_TARGET = -100
"""The label of positions that have nothing to find: transformers and torch leave them out of the loss."""
NEEDED = "MaskedTextData needs transformers' tokenizers: pip install 'lightning-thor[transformers]'"


class MaskedTextData(L.LightningDataModule):
    """Pieces of a text with hidden tokens: the first 95 % of it train, the rest validates.

    A batch is ``(input_ids [N, context], labels [N, context])``, int64, once it has passed ``on_after_batch_transfer``:
    every piece stands between [CLS] and [SEP], and labels are `NO_TARGET` where nothing is hidden. In training other
    tokens are hidden each time, in validation always the same.

    Args:
        root: a text file (UTF-8), or a folder that holds ``input.txt``.
        vocab_size: of the tokenizer, at most.
        context: tokens per piece, with [CLS] and [SEP].
        batch_size: pieces per batch, on each device.
        tokenizer: file of a ``tokenizers`` tokenizer with [CLS], [SEP] and [MASK]. If it is missing, a WordPiece one is
            made from the text and written there, by one process.
        val_pieces: validation pieces, at most.

    Raises:
        FileNotFoundError: there is no such text.
        ImportError: transformers is missing.
        ValueError: the text is too short for one piece, or an option is out of its range.
    """

    def __init__(
        self,
        root: str,
        vocab_size: int = 30522,
        context: int = 512,
        batch_size: int = 12,
        tokenizer: str = "runs/bert_pretraining/tokenizer.json",
        val_pieces: int = 512,
    ) -> None:
        super().__init__()
        if context < 3:
            raise ValueError(f"MaskedTextData: context must be at least 3, [CLS], a token and [SEP]; got {context}.")
        self.root = Path(root)
        self.vocab_size = vocab_size
        self.context = context
        self.batch_size = batch_size
        self.tokenizer_file = Path(tokenizer)
        self.val_pieces = val_pieces

    def prepare_data(self) -> None:
        if self.tokenizer_file.is_file():
            return
        made = wordpiece_of(read_text(self.root, "MaskedTextData"), self.vocab_size)
        self.tokenizer_file.parent.mkdir(parents=True, exist_ok=True)
        made.save(str(self.tokenizer_file))

    def setup(self, stage: str | None = None) -> None:
        self.tokenizer = load_tokenizer(self.tokenizer_file)
        text = read_text(self.root, "MaskedTextData")
        cut = len(text) * 95 // 100
        self.train = self.pieces(text[:cut])
        # The same hidden tokens in every epoch and run.
        self.val = self.hide(self.pieces(text[cut:])[: self.val_pieces], torch.Generator().manual_seed(0))

    def pieces(self, text: str) -> Tensor:
        """``text`` in pieces of ``context`` tokens, one after the other: int64 ``[pieces, context]``."""
        encoded = self.tokenizer.encode_batch(text.splitlines(), add_special_tokens=False)
        tokens = torch.tensor([token for line in encoded for token in line.ids], dtype=torch.int64)
        length = self.context - 2
        count = len(tokens) // length
        if count == 0:
            raise ValueError(
                f"A split of the text has {len(tokens)} tokens, a piece takes context - 2 = {length}. Give a longer "
                "text, or a smaller context."
            )
        edges = [torch.full((count, 1), self.tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        return torch.cat([edges[0], tokens[: count * length].view(count, length), edges[1]], dim=1)

    def hide(self, tokens: Tensor, generator: torch.Generator | None = None) -> Batch:
        """`hide_tokens` with this tokenizer's numbers."""
        mask, size = self.tokenizer.token_to_id("[MASK]"), self.tokenizer.get_vocab_size()
        return hide_tokens(tokens, mask, size, generator)

    def train_dataloader(self) -> DataLoader[Batch]:
        return batch_loader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return batch_loader(*self.val, batch_size=self.batch_size, shuffle=False)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Hide tokens of a training batch where it already is: on the accelerator, if there is one."""
        return self.hide(batch[0]) if len(batch) == 1 else batch


def hide_tokens(tokens: Tensor, mask: int, vocab_size: int, generator: torch.Generator | None = None) -> Batch:
    """Hide 15 % of each row's tokens, at least one, first and last never (Devlin et al. 2019, arXiv:1810.04805).

    Of the hidden ones 80 % become ``mask``, 10 % a random token, and 10 % stay.

    Args:
        tokens: int64 ``[N, context]``; it is not changed.
        mask: number of [MASK].
        vocab_size: random tokens are below it.
        generator: on the device of ``tokens``; None is torch's own.

    Returns:
        Inputs and labels, ``[N, context]`` each; labels are `NO_TARGET` except where a token is hidden.
    """
    inner = tokens.shape[1] - 2
    count = max(1, round(0.15 * inner))
    draws = torch.rand((3, *tokens.shape), device=tokens.device, generator=generator)
    order = draws[0, :, 1:-1].topk(count).indices + 1
    hidden = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, order, True)
    random = (draws[2] * vocab_size).long().clamp_max(vocab_size - 1)
    replaced = torch.where(draws[1] < 0.8, mask, torch.where(draws[1] < 0.9, random, tokens))
    return torch.where(hidden, replaced, tokens), torch.where(hidden, tokens, NO_TARGET)


def wordpiece_of(text: str, vocab_size: int) -> Any:
    """A WordPiece tokenizer of lower-case words, as BERT's, with at most ``vocab_size`` tokens of ``text``."""
    try:
        from tokenizers import BertWordPieceTokenizer
    except ImportError as error:
        raise ImportError(NEEDED) from error
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(text.splitlines(), vocab_size=vocab_size, show_progress=False)
    return tokenizer


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a file; a ValueError if it lacks one of BERT's special tokens."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(NEEDED) from error
    tokenizer = Tokenizer.from_file(str(path))
    missing = [name for name in ("[CLS]", "[SEP]", "[MASK]") if tokenizer.token_to_id(name) is None]
    if missing:
        raise ValueError(f"The tokenizer {path} has no {', '.join(missing)}: remove the file, and one is made.")
    return tokenizer
