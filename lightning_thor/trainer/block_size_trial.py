"""``block_size="auto"``: a trial of the first training batch, which leaves the fit as it was, and the report of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_thor.block_size.choose import BlockSplit, choose_block_size
from lightning_thor.distributed import dtensor
from lightning_thor.layers.discovery import name_some
from lightning_thor.trainer.console import show
from lightning_thor.trainer.packages import is_lightnings
from lightning_thor.trainer.pictures import SPLIT, split_figure
from lightning_thor.trainer.thors import scaler_of, takes_iterator

ADVICE = 'Give block_size a number instead of "auto"; lightning_thor.choose_block_size finds one outside of a Trainer.'


def try_block_sizes(
    trainer: pl.Trainer, pl_module: pl.LightningModule, parameters: list[nn.Parameter], **options: Any
) -> BlockSplit:
    """Call `choose_block_size` with the first batch of the training data and the module's own ``training_step``.

    The step runs on a copy of the module, with random states that are restored, loggers that log nothing and iterators
    of its own, so the following fit is bitwise the fit without it. A sharded module, of which a copy would be a second
    model in memory, runs itself: its attributes, buffers and gradients are restored, but not what the step adds to
    lists or other containers. All ranks take rank 0's choice, and all must call this, since shards and synchronised
    batch norms wait for the others.

    Args:
        trainer: in ``on_fit_start``.
        pl_module: on its device.
        parameters: of the Thor optimizer.
        **options: of `choose_block_size`.

    Returns:
        Rank 0's choice.

    Raises:
        ValueError: manual optimization, a ``training_step`` without a loss or with batches of its own, data that can be
            read only once, or a module that cannot be copied.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            f'block_size="auto" tries {type(pl_module).__name__}.training_step, which in manual optimization would '
            f"train. {ADVICE}"
        )
    if takes_iterator(pl_module):
        raise ValueError(
            f'block_size="auto" tries {type(pl_module).__name__}.training_step on a batch, but it takes '
            f"dataloader_iter. {ADVICE}"
        )
    with isolate_rng(), _silent(trainer), _trial_of(pl_module, trainer) as trial:
        batch = _first_batch(trainer)
        copies = dict(zip(pl_module.parameters(), trial.parameters(), strict=True))

        def loss_of_a_batch() -> Tensor:
            with isolate_rng():  # the same dropout in each pass
                return _loss(trainer, trial, batch)

        own_parameters = [copies[p] for p in parameters if p in copies]
        own = choose_block_size(trial, loss_of_a_batch, parameters=own_parameters, **options)
    split: BlockSplit = trainer.strategy.broadcast(own)
    return split


def _loss(trainer: pl.Trainer, trial: pl.LightningModule, batch: Any) -> Tensor:
    arguments = (batch, 0) if is_param_in_hook_signature(trial.training_step, "batch_idx", min_args=2) else (batch,)
    with trainer.precision_plugin.train_step_context():
        output = trial.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f'block_size="auto" needs the loss of the first training batch, and {type(trial).__name__}.training_step '
            f"returned {type(loss).__name__}. {ADVICE}"
        )
    scaler = scaler_of(trainer)
    scaled: Tensor = loss if scaler is None else scaler.scale(loss)  # unscaled, float16 gradients would underflow
    return scaled


def _first_batch(trainer: pl.Trainer) -> Any:
    # None until Lightning needs it, after on_fit_start unless something needed the number of steps.
    loaders = trainer.train_dataloader
    if loaders is None:
        loaders = trainer.fit_loop._data_source.dataloader()
    loaders = getattr(loaders, "iterables", loaders)  # of a CombinedLoader
    batch = trainer.precision_plugin.convert_input(tree_map(_first_of, loaders))
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)


def _first_of(loader: Any) -> Any:
    """The first batch of ``loader``, whose own iterator and random state stay as they are."""
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    holders = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    states = [(generator, generator.get_state()) for generator in found if isinstance(generator, torch.Generator)]
    try:
        own = copy.copy(loader)  # a loader with persistent workers keeps its iterator
        iterator = iter(own)
    except TypeError as error:
        raise ValueError(
            f'block_size="auto" cannot look at the first batch of a {type(loader).__name__}: {error}. {ADVICE}'
        ) from error
    if iterator is own:
        raise ValueError(
            f'block_size="auto" would take the first batch away from a {type(loader).__name__}, which can be read '
            f"only once. {ADVICE}"
        )
    batch = next(iterator, None)
    for generator, state in states:
        generator.set_state(state)
    if batch is None:
        raise ValueError(f'block_size="auto" needs a training batch, and the data loader has none. {ADVICE}')
    return batch


@contextmanager
def _trial_of(pl_module: pl.LightningModule, trainer: pl.Trainer) -> Iterator[pl.LightningModule]:
    """A copy of the module, or a sharded module itself, whose ``log`` does nothing."""
    is_sharded = any(dtensor.is_sharded(p) for p in pl_module.parameters())
    try:
        trial = pl_module if is_sharded else copy.deepcopy(pl_module)
    except Exception as error:
        raise ValueError(
            f'block_size="auto" tries a copy of {type(pl_module).__name__}, which cannot be copied '
            f"({type(error).__name__}: {error}). {ADVICE}"
        ) from error
    trial.trainer = trainer
    before = [(module, dict(vars(module))) for module in trial.modules()]
    for module, _ in before:
        if is_lightnings(module, "LightningModule"):
            for name in ("log", "log_dict"):
                setattr(module, name, lambda *_, **__: None)
    try:
        yield trial
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def _silent(trainer: pl.Trainer) -> Iterator[None]:
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


# ── the report ──


def report_split(split: BlockSplit, folder: str | Path | None, *, quiet: bool = False) -> None:
    """Print `split_table` of ``split`` unless ``quiet``; save ``thor_split.json`` in ``folder`` and, where matplotlib
    is installed, ``thor_split.png``, unless it is None. What cannot be saved is a warning."""
    if not quiet:
        show(split_table(split))
    if folder is None:
        return
    try:
        saved = _save(split, Path(folder))
    except Exception as error:  # of the disk, or of matplotlib
        rank_zero_warn(f"How the block size was chosen was not saved in {folder} ({type(error).__name__}: {error}).")
        return
    if not quiet:
        show(saved, soft_wrap=True)


def _save(split: BlockSplit, path: Path) -> str:
    """Returns what to say of it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / SPLIT).write_text(json.dumps(split.as_dict(), indent=1) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        return f"{path / SPLIT} holds the figures; with matplotlib there would be a picture too."
    split_figure(split).savefig(path / "thor_split.png")
    return f"The two curves: {path / 'thor_split.png'}, {SPLIT}"


def split_table(split: BlockSplit) -> Table:
    """Tabulate both curves of ``split`` over the candidates, as bars and numbers, with the choice marked."""
    caption = (
        f"{split.n_factors} factors on {split.device}; the curves cross at {split.crossing:.0f}. "
        "Kept: a factor loses less than 1 % of its spectral norm"
    )
    if split.left_out:
        caption += f". Not looked at: {name_some([f'{key} ({why})' for key, why in split.left_out.items()])}"
    table = Table(title=f"THOR block size: {split.block_size}", caption=caption)
    table.add_column("block size", justify="right")
    table.add_column("factors kept")
    table.add_column("speed of inversion")
    table.add_column("time", justify="right", no_wrap=True)
    fastest = max(split.speeds)
    rows = zip(split.candidates, split.shares, split.speeds, split.seconds, strict=True)
    for candidate, share, speed, seconds in rows:
        table.add_row(
            f"→ {candidate}" if candidate == split.block_size else str(candidate),
            f"{_bar(share)} {share:4.0%}",
            f"{_bar(speed / fastest)} {speed:5.3f}",
            f"{seconds * 1e3:.3g} ms",
            style="bold" if candidate == split.block_size else "",
        )
    return table


def _bar(share: float, width: int = 12) -> str:
    """>>> _bar(0.5, 4), _bar(1.0, 4), _bar(0.0, 4)
    ('━━  ', '━━━━', '    ')
    """
    return ("━" * round(share * width)).ljust(width)
