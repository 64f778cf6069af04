"""What is preconditioned, as it is printed when a fit starts: one line, a table, and what stays plain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from rich.cells import cell_len
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.layers.base import Layer
from lightning_thor.layers.discovery import NOT_TRAINED, name_some, unwrapped_name
from lightning_thor.linalg.block_diagonal import BlockPartition
from lightning_thor.preconditioning.modes import MODES
from lightning_thor.trainer.console import show

N_ROWS = 14
"""Rows of the folded table, at most."""
N_LINES = 20
"""Lines of the folded table, at most: with what stands around it, it fits a screen of 30 lines."""
LEAST_ROOM = 16
"""Columns for names, at least."""
TIE_WIDTH = 22
"""Columns for factors, at least, where there is a name below them."""
N_NAMES = 3
"""Names, or folded names, in a line about layers that stay plain."""


@dataclass(frozen=True)
class _Row:
    """One line of the table: a layer, or layers that are equal but for their names."""

    name: str
    weight: str
    curvature: str
    n_bytes: int
    n_layers: int
    n_weights: int
    tied_to: str = ""
    style: str = ""


def print_curvature(curvature: Curvature, *, full: bool = False) -> None:
    """Print `curvature_report` of ``curvature`` to standard output."""
    show(curvature_report(curvature, full=full, width=Console().width))


def curvature_report(curvature: Curvature, *, full: bool = False, width: int = 80) -> Group:
    """Say what ``curvature`` preconditions, in a line and a table, and what it does not.

    Args:
        curvature: of a model.
        full: list every layer, where otherwise equal ones are one row, and the smallest ones one row together.
        width: of the screen, in columns: a name that does not fit is broken between its parts, or cut off.

    Returns:
        A renderable of rich.
    """
    parts: list[Text | Table] = [Text(_headline(curvature), style="bold")]
    if curvature.has_low_coverage:
        parts.append(Text("Less than half of the weights: a warning says what to do.", style="yellow"))
    if curvature.layers:
        parts += [curvature_table(curvature, full=full, width=width), Text(_legend(curvature), style="dim")]
    parts += [Text(line, style="dim") for line in _plain_lines(curvature, full=full)]
    return Group(*parts)


def _headline(curvature: Curvature) -> str:
    total = sum(curvature.n_bytes(name) for name in curvature.layers)
    n_elsewhere = len(curvature.layers) - len(curvature.factors.has_inverse)
    where = f" on this rank (others store the inverses of {n_elsewhere})" if n_elsewhere else ""
    frozen, not_here, plain = _left_out(curvature)
    whose = " in this optimizer" if not_here else ""
    return (
        f"THOR curvature: {_count(len(curvature.layers))} preconditioned, {_percent(curvature.coverage)} of the "
        f"weights{whose}, {_size(total)}{where}"
        + (f"; {len(plain)} left plain: {name_some(fold_names(list(plain)), N_NAMES)}" if plain else "")
        + (f"; {len(not_here)} not in this optimizer" if not_here else "")
        + (f"; {len(frozen)} frozen" if frozen else "")
    )


def _left_out(curvature: Curvature) -> tuple[list[str], list[str], dict[str, str]]:
    """Layers that are frozen; that this optimizer does not have; and the reasons of those that it trains plainly."""
    frozen, not_here = ([name for name, why in curvature.left_out.items() if why == one] for one in NOT_TRAINED)
    return frozen, not_here, {name: why for name, why in curvature.left_out.items() if why not in NOT_TRAINED}


def _legend(curvature: Curvature) -> str:
    sides = [one for layer in curvature.layers.values() for one in (layer.A, layer.G) if one is not None]
    return (
        "N × n²: N diagonal blocks of n × n"
        + ("; diagonal: one number per row" if any(map(_is_diagonal, sides)) else "")
        + f". Memory: sums, factors and inverses. Biases and plain layers take {MODES[curvature.mode].fallback}."
    )


def _plain_lines(curvature: Curvature, *, full: bool) -> list[str]:
    """One line for each reason for which layers have no curvature; those that this optimizer does not train last."""
    frozen, not_here, plain = _left_out(curvature)
    by_reason: dict[str, list[str]] = {}
    for name, reason in plain.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"Plain: {_names(names, full)}: {reason}." for reason, names in by_reason.items()]
    for words, names in (("Not in this optimizer", not_here), ("Frozen", frozen)):
        lines += [f"{words}, {_count(len(names))}: {_names(names, full)}."] if names else []
    return lines


def _names(names: list[str], full: bool) -> str:
    return name_some(names, len(names)) if full else name_some(fold_names(names), N_NAMES)


def curvature_table(curvature: Curvature, *, full: bool = True, width: int | None = None) -> Table:
    """Tabulate the layers of ``curvature``: the shape of the weight, its factors, and their memory.

    Args:
        curvature: of a model.
        full: a row for each weight, a module that is tied to an earlier one has one of its own; otherwise equal layers
            are one row, all norms of a type too, and the smallest rows are one together.
        width: of the screen; None breaks no name.

    Returns:
        A table of rich, with columns for layer, weight, curvature and memory.
    """
    rows = [row for name, layer in curvature.layers.items() for row in _rows_of(curvature, name, layer)]
    if not full:
        rows = _fitting(_folded(rows, curvature), width)
    lines = _cells(rows, width)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("layer", no_wrap=True)
    # Where a column does not fit, rich takes from all that have no least width.
    for column, cells in zip(("weight", "curvature", "memory"), [*zip(*lines, strict=True)][1:], strict=False):
        right: Literal["left", "right"] = "right" if column == "memory" else "left"
        table.add_column(column, justify=right, no_wrap=True, min_width=_widest(cells))
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*map(escape, line), style=row.style)
    return table


def _cells(rows: Sequence[_Row], width: int | None) -> list[tuple[str, str, str, str]]:
    """The columns of each row. With a ``width`` names are broken, and shortened at need, so that all else fits."""
    factors, sizes = [row.curvature for row in rows], [_size(row.n_bytes) for row in rows]
    tie_width = TIE_WIDTH if any(row.tied_to for row in rows) else 0
    beside = _widest(["weight", *(row.weight for row in rows)]) + _widest(["memory", *sizes]) + 2 * 3
    widest, room = max(_widest(["curvature", *factors]), tie_width), 10**6
    if width is not None:
        if width - beside - widest < LEAST_ROOM:
            factors = [one.replace(", ", ",\n") for one in factors]
            widest = max(_widest(["curvature", *factors]), tie_width)
        room = max(width - beside - widest, LEAST_ROOM)
    lines = []
    for row, shown, size in zip(rows, factors, sizes, strict=True):
        name = _broken_at_dots(row.name, room, f" ×{row.n_layers}" if row.n_layers > 1 else "")
        indent = "  " if shown else ""
        tie = _broken_at_dots(f"tied to {row.tied_to}", 10**6 if width is None else widest - len(indent))
        ties = [indent + line for line in tie.split("\n")] if row.tied_to else []
        lines.append((name, row.weight, "\n".join(([shown] if shown else []) + ties), size))
    return lines


def _rows_of(curvature: Curvature, name: str, layer: Layer) -> Iterable[_Row]:
    # Slicing a sharded parameter is a collective, and only one rank prints.
    shape = layer.slice_of(torch.empty(layer.parameters[0].shape, device="meta")).shape
    words = "×".join(map(str, shape)) + (" + bias" if layer.with_bias else "")
    factors = f"G {_blocks(layer.G)}" if layer.A is None else f"A {_blocks(layer.A)}, G {_blocks(layer.G)}"
    factors += ", polar" if name in curvature.polar_layers else ""
    yield _Row(name or "(root)", words, factors, curvature.n_bytes(name), 1, shape.numel(), layer.tied_to or "")
    for use in layer.uses[1:]:
        yield _Row(use.name, words, "", 0, 1, 0, name)


def _folded(rows: Iterable[_Row], curvature: Curvature) -> list[_Row]:
    """Equal layers as one row each; norms and others without A by type alone."""
    types = {unwrapped_name(name): type(module).__name__ for name, module in curvature.model.named_modules()}
    groups: dict[tuple[str, ...], list[_Row]] = {}
    for row in rows:
        layer = curvature.layers.get("" if row.name == "(root)" else row.name)
        is_norm = layer is not None and layer.A is None
        key: tuple[str, ...] = (types.get(row.name, ""),) if is_norm else (row.weight, row.curvature, row.tied_to)
        groups.setdefault(key, []).append(row)
    folded = []
    for key, group in groups.items():
        if len(key) == 1 and len(group) > 1:
            folded.append(_together(group, key[0], _range(row.weight for row in group)))
            continue
        by_name = {row.name: row for row in group}
        for pattern, names in _patterns(by_name):
            folded.append(_together([by_name[name] for name in names], pattern, group[0].weight))
    return folded


def _together(rows: Sequence[_Row], name: str, weight: str) -> _Row:
    n_bytes, n_weights = sum(row.n_bytes for row in rows), sum(row.n_weights for row in rows)
    return _Row(name, weight, rows[0].curvature, n_bytes, len(rows), n_weights, rows[0].tied_to)


def _fitting(rows: list[_Row], width: int | None) -> list[_Row]:
    """As many of the rows with the most weights as fit a screen, in order, and one for all others."""
    found = rows
    for n_rows in range(N_ROWS, 0, -1):
        found = _largest(rows, n_rows)
        if sum(1 + max(cell.count("\n") for cell in line) for line in _cells(found, width)) <= N_LINES:
            break
    return found


def _largest(rows: list[_Row], n_rows: int) -> list[_Row]:
    """The rows with the most weights, in order, and one for all others; a line for a single one is not worth it."""
    if len(rows) <= n_rows + 1:
        return rows
    shown = sorted(range(len(rows)), key=lambda index: -rows[index].n_weights)[:n_rows]
    others = [row for index, row in enumerate(rows) if index not in shown]
    n_layers, n_weights = sum(row.n_layers for row in others), sum(row.n_weights for row in others)
    share = _percent(n_weights / max(sum(row.n_weights for row in rows), 1))
    size = sum(row.n_bytes for row in others)
    rest = _Row(f"{n_layers} smaller layers", f"{share} of these", 'summary="full"', size, 1, n_weights, style="dim")
    return [*(rows[index] for index in sorted(shown)), rest]


# ── names ──


def fold_names(names: Sequence[str]) -> list[str]:
    """Names of modules, with those that differ in one part as one.

    >>> fold_names(["h.0.attn.q", "h.0.attn.k", "h.1.attn.q", "h.1.attn.k", "head"])
    ['h.0–1.attn.{q,k}', 'head']
    """
    return [pattern for pattern, _ in _patterns(names)]


def _patterns(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Folded names, each with the names that it stands for: all combinations of its parts, and no other name."""
    folded: dict[tuple[tuple[str, ...], ...], list[str]] = {tuple((p,) for p in n.split(".")): [n] for n in names}
    for position in range(max(map(len, folded), default=0)):
        # Those that differ in this part alone; numbers go with numbers.
        alike: dict[tuple[object, ...], list[tuple[tuple[str, ...], ...]]] = {}
        for parts in folded:
            here = parts[position][0].isdigit() if position < len(parts) else None
            alike.setdefault((*parts[:position], here, *parts[position + 1 :]), []).append(parts)
        before, folded = folded, {}
        for first, *others in alike.values():
            together = [*first]
            for other in others:
                together[position] += other[position]
            folded[tuple(together)] = [name for parts in (first, *others) for name in before[parts]]
    return [(".".join(map(_alternatives, parts)), own) for parts, own in folded.items()]


def _alternatives(parts: tuple[str, ...]) -> str:
    """>>> _alternatives(("0", "1", "2", "5")), _alternatives(("q", "k")), _alternatives(tuple("abcdef"))
    ('0–2,5', '{q,k}', '{a,b,…,f}')
    """
    if len(parts) == 1:
        return parts[0]
    if not parts[0].isdigit():
        return "{" + ",".join(parts if len(parts) <= 4 else (*parts[:2], "…", parts[-1])) + "}"
    runs: list[list[int]] = []
    for number in sorted(map(int, parts)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _broken_at_dots(name: str, room: int, suffix: str = "") -> str:
    """A name and what follows it in lines of at most ``room`` characters, broken before dots alone; longer parts are
    cut off.

    >>> _broken_at_dots("encoder.layer.0.dense", 14), _broken_at_dots("encoder.intermediate_of_all", 14, " ×2")
    ('encoder.layer\\n  .0.dense', 'encoder\\n  .interme… ×2')
    """
    lines, parts = [""], name.split(".")
    for index, part in enumerate(parts):
        more, end = f".{part}" if index else part, suffix if index == len(parts) - 1 else ""
        if lines[-1] and len(lines[-1] + more + end) > room:
            lines.append("  ")
        left = room - len(lines[-1] + end)
        lines[-1] += (more if len(more) <= left else f"{more[: left - 1]}…") + end
    return "\n".join(lines)


# ── numbers ──


def _is_diagonal(blocks: BlockPartition) -> bool:
    return blocks.size == 1 and blocks.width > 1


def _blocks(blocks: BlockPartition) -> str:
    """>>> _blocks(BlockPartition(1, 256, 2, 128)), _blocks(BlockPartition(1, 10, 10, 1))
    ('2 × 128²', 'diagonal')
    """
    return "diagonal" if _is_diagonal(blocks) else f"{blocks.groups * blocks.n_blocks} × {blocks.size}²"


def _widest(cells: Iterable[str]) -> int:
    return max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)


def _count(n_layers: int) -> str:
    return f"{n_layers} layer" if n_layers == 1 else f"{n_layers} layers"


def _range(shapes: Iterable[str]) -> str:
    """>>> _range(["64", "256", "64"]), _range(["64", "64"])
    ('64–256', '64')
    """
    found = sorted(set(shapes), key=lambda shape: (len(shape), shape))
    return found[0] if len(found) == 1 else f"{found[0]}–{found[-1]}"


def _percent(share: float) -> str:
    """>>> _percent(0.994), _percent(0.0004), _percent(0.9999), _percent(1.0)
    ('99 %', 'under 1 %', '99 %', '100 %')
    """
    return f"{int(100 * share)} %" if share >= 0.01 or share == 0 else "under 1 %"


def _size(n_bytes: int) -> str:
    """>>> _size(512), _size(3 * 2**20)
    ('512 B', '3.0 MiB')
    """
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
