"""What is preconditioned, as it is printed when a fit starts: one line, a table, and what stays plain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.cells import cell_len
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_thor.curvature.curvature import Curvature
from lightning_thor.layers.base import Layer
from lightning_thor.layers.discovery import LOW_COVERAGE_ADVICE, name_some, uncompiled_name
from lightning_thor.linalg.block_diagonal import BlockPartition
from lightning_thor.preconditioning.modes import MODES

N_ROWS = 14
"""Rows of the folded table: with what stands around it, it fits a screen of 30 lines."""
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


def print_curvature(curvature: Curvature, *, full: bool = False, quiet: bool = False) -> None:
    """Print `curvature_report` of ``curvature`` to standard output, or nothing if ``quiet``."""
    console = Console(quiet=quiet)
    console.print(curvature_report(curvature, full=full, width=console.width))


def curvature_report(curvature: Curvature, *, full: bool = False, width: int = 80) -> Group:
    """Say what ``curvature`` preconditions, in a line and a table, and what it does not.

    Args:
        curvature: of a model.
        full: list every layer, where otherwise equal ones are one row, and the smallest ones one row together.
        width: of the screen, in columns: a name that does not fit is broken between its parts.

    Returns:
        A renderable of rich.
    """
    parts: list[Text | Table] = [Text(_headline(curvature), style="bold")]
    if curvature.has_low_coverage:
        parts.append(Text(f"Less than half of the weights. {LOW_COVERAGE_ADVICE}", style="yellow"))
    if curvature.layers:
        parts += [curvature_table(curvature, full=full, width=width), Text(_legend(curvature), style="dim")]
    parts += [Text(line, style="dim") for line in _plain_lines(curvature, full=full)]
    return Group(*parts)


def _headline(curvature: Curvature) -> str:
    total = sum(curvature.n_bytes(name) for name in curvature.layers)
    n_elsewhere = len(curvature.layers) - len(curvature.factors.has_inverse)
    where = f" on this rank (others store the inverses of {n_elsewhere})" if n_elsewhere else ""
    plain = [name for name, reason in curvature.left_out.items() if reason != "frozen"]
    n_frozen = len(curvature.left_out) - len(plain)
    return (
        f"THOR curvature: {_count(len(curvature.layers))} preconditioned, {_percent(curvature.coverage)} of the "
        f"weights, {_size(total)}{where}"
        + (f"; {len(plain)} left plain: {name_some(fold_names(plain), N_NAMES)}" if plain else "")
        + (f"; {n_frozen} frozen" if n_frozen else "")
    )


def _legend(curvature: Curvature) -> str:
    sides = [one for layer in curvature.layers.values() for one in (layer.A, layer.G) if one is not None]
    return (
        "N × n²: N diagonal blocks of n × n"
        + ("; diagonal: one number per row" if any(map(_is_diagonal, sides)) else "")
        + f". Memory: factors and inverses. Biases and plain layers take {MODES[curvature.mode].fallback}."
    )


def _plain_lines(curvature: Curvature, *, full: bool) -> list[str]:
    """One line for each reason for which layers have no curvature; frozen ones last."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in curvature.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    frozen = by_reason.pop("frozen", [])
    lines = [f"Plain: {_names(names, full)}: {reason}." for reason, names in by_reason.items()]
    return lines + ([f"Frozen, {_count(len(frozen))}: {_names(frozen, full)}."] if frozen else [])


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
    left_over: list[_Row] = []
    if not full:
        rows, left_over = _largest(_folded(rows, curvature))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("weight", no_wrap=True)
    table.add_column("curvature", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    cells = [
        (f"{row.name} ×{row.n_layers}" if row.n_layers > 1 else row.name, row.weight, row.curvature, _size(row.n_bytes))
        for row in rows
    ]
    others = [max((_width(one[column]) for one in cells), default=0) for column in (1, 2, 3)]
    room = None if width is None else max(width - sum(others) - 2 * len(others), 12)
    for name, *rest in cells:
        table.add_row(escape(name if room is None else _broken_at_dots(name, room)), *rest)
    if left_over:
        n_layers, n_weights = sum(row.n_layers for row in left_over), sum(row.n_weights for row in left_over)
        share = _percent(n_weights / max(n_weights + sum(row.n_weights for row in rows), 1))
        size = _size(sum(row.n_bytes for row in left_over))
        table.add_row(f"{n_layers} smaller layers", f"{share} of these", 'summary="full"', size, style="dim")
    return table


def _rows_of(curvature: Curvature, name: str, layer: Layer) -> Iterable[_Row]:
    # Slicing a sharded parameter is a collective, and only one rank prints.
    shape = layer.slice_of(torch.empty(layer.parameters[0].shape, device="meta")).shape
    words = "×".join(map(str, shape)) + (" + bias" if layer.with_bias else "")
    factors = f"G {_blocks(layer.G)}" if layer.A is None else f"A {_blocks(layer.A)}, G {_blocks(layer.G)}"
    factors += ", polar" if name in curvature.polar_layers else ""
    factors += f"\n  tied to {layer.tied_to}" if layer.tied_to is not None else ""
    yield _Row(name or "(root)", words, factors, curvature.n_bytes(name), 1, shape.numel())
    for use in layer.uses[1:]:
        yield _Row(use.name, words, f"tied to {name}", 0, 1, 0)


def _folded(rows: Iterable[_Row], curvature: Curvature) -> list[_Row]:
    """Equal layers as one row each; norms and others without A by type alone."""
    types = {uncompiled_name(name): type(module).__name__ for name, module in curvature.model.named_modules()}
    groups: dict[tuple[str, ...], list[_Row]] = {}
    for row in rows:
        layer = curvature.layers.get("" if row.name == "(root)" else row.name)
        is_norm = layer is not None and layer.A is None
        key: tuple[str, ...] = (types.get(row.name, ""),) if is_norm else (row.weight, row.curvature)
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
    return _Row(name, weight, rows[0].curvature, n_bytes, len(rows), n_weights)


def _largest(rows: list[_Row]) -> tuple[list[_Row], list[_Row]]:
    """The rows with the most weights, in order, and the others; a single one is not worth a line that says so."""
    if len(rows) <= N_ROWS + 1:
        return rows, []
    shown = sorted(range(len(rows)), key=lambda index: -rows[index].n_weights)[:N_ROWS]
    return [rows[index] for index in sorted(shown)], [row for index, row in enumerate(rows) if index not in shown]


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


def _broken_at_dots(name: str, room: int) -> str:
    """A name in lines of at most ``room`` characters, broken before dots alone.

    >>> _broken_at_dots("encoder.layer.0.dense", 14)
    'encoder.layer\\n  .0.dense'
    """
    lines = [""]
    for index, part in enumerate(name.split(".")):
        more = f".{part}" if index else part
        if lines[-1] and len(lines[-1]) + len(more) > room:
            lines.append("  ")
        lines[-1] += more
    return "\n".join(lines)


# ── numbers ──


def _is_diagonal(blocks: BlockPartition) -> bool:
    return blocks.size == 1 and blocks.width > 1


def _blocks(blocks: BlockPartition) -> str:
    """>>> _blocks(BlockPartition(1, 256, 2, 128)), _blocks(BlockPartition(1, 10, 10, 1))
    ('2 × 128²', 'diagonal')
    """
    return "diagonal" if _is_diagonal(blocks) else f"{blocks.groups * blocks.n_blocks} × {blocks.size}²"


def _width(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))


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
