"""How the block size was chosen: a rich table, a picture and JSON."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lightning_thor.block_size.choose import BlockSplit
from lightning_thor.layers.discovery import name_some

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report_split(split: BlockSplit, folder: str | Path | None, *, quiet: bool = False) -> None:
    """Print `split_table` of ``split`` unless ``quiet``; save ``thor_split.json`` in ``folder`` and, where matplotlib
    is installed, ``thor_split.png``, unless it is None."""
    console = Console(quiet=quiet)
    console.print(split_table(split))
    if folder is None:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "thor_split.json").write_text(json.dumps(split.as_dict(), indent=1) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        line = f"{path / 'thor_split.json'} holds the figures; with matplotlib there would be a picture too."
        console.print(line, soft_wrap=True)
        return
    split_figure(split).savefig(path / "thor_split.png")
    console.print(f"The two curves: {path / 'thor_split.png'}, thor_split.json", soft_wrap=True)


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


def split_figure(split: BlockSplit) -> Figure:
    """Draw both curves of ``split`` over the block size, their crossing and the choice."""
    from matplotlib.figure import Figure

    share_colour, speed_colour, quiet = "#1b6ca8", "#c8553d", "#555555"
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(split.candidates, split.shares, "o-", color=share_colour, label="factors that lose less than 1 %")
    axes.plot(split.candidates, split.speeds, "s-", color=speed_colour, label="speed of inversion (size 1 is 1)")
    axes.axvline(split.crossing, color=quiet, linewidth=1, linestyle=":")
    axes.axvline(split.block_size, color=quiet, linewidth=6, alpha=0.2)
    axes.set_xscale("log", base=2)
    # The widest factor may be hardly wider than the last power of two: their labels would overlap.
    ticks = [size for size in split.candidates if size == split.candidates[-1] or size * 1.4 < split.candidates[-1]]
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, max(1.0, *split.speeds) * 1.05)
    axes.set_xlabel("block size")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    of = f"{split.n_factors} factors on {split.device}"
    title = f"Block size {split.block_size}: the curves cross at {split.crossing:.0f} ({of})"
    axes.set_title(title, loc="left", fontsize=11)
    return figure


def _bar(share: float, width: int = 12) -> str:
    """>>> _bar(0.5, 4), _bar(1.0, 4), _bar(0.0, 4)
    ('━━  ', '━━━━', '    ')
    """
    return ("━" * round(share * width)).ljust(width)
