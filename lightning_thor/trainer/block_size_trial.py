"""``block_size="auto"``: a trial of the first training batch under a Trainer, which leaves the fit as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_thor.block_size.choose import BlockSplit, choose_block_size
from lightning_thor.distributed import dtensor
from lightning_thor.trainer.packages import is_lightnings
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
