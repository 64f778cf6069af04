"""Folders of shards that torch.distributed.checkpoint writes."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.optim import Optimizer


def load_optimizer(path: Path, key: str, module: nn.Module, optimizer: Optimizer) -> None:
    """Load the state of an optimizer of a sharded module; all ranks must call it.

    Args:
        path: the folder.
        key: of the optimizer in it.
        module: of its parameters; torch loads no state of those that are frozen.
        optimizer: has state already, of the kind that was saved.
    """
    # They take a second to import.
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {key: get_optimizer_state_dict(module, optimizer)}
    load(state, checkpoint_id=path)
    set_optimizer_state_dict(module, optimizer, state[key], options=StateDictOptions(cpu_offload=True))
