"""How the block size was chosen, as it is printed and saved."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from rich.table import Table

from lightning_thor.block_size.choose import BlockSplit
from lightning_thor.layers.discovery import name_some
from lightning_thor.trainer.console import show
from lightning_thor.trainer.pictures import SPLIT, split_figure


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
