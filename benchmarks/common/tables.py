"""Tables for a terminal and for Markdown pages, from the same heads and rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDEST = 10_000
"""Columns of a screen on which any table fits."""


@dataclass(frozen=True)
class RichTable:
    """A table where it fits the screen; on a narrower one a paragraph for each row, in which no cell is broken."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=self.title)
        for index, head in enumerate(self.heads):
            table.add_column(head, justify="left" if index < self.words else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        if Measurement.get(console, options.update(max_width=WIDEST), table).maximum <= options.max_width:
            yield table
            return
        yield Text(self.title, style="italic")
        for row in self.rows:
            yield Text(", ".join(filter(None, row[: self.words])), style="bold")
            figures = zip(self.heads[self.words :], row[self.words :], strict=True)
            yield Text(_filled([f"{head}: {cell}" for head, cell in figures if cell], options.max_width))


def rich_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> RichTable:
    """A table for a terminal, ``rows`` with one cell for each of ``heads``; the first ``words`` columns hold words, the
    others figures, aligned to the right."""
    return RichTable(title, heads, [tuple(row) for row in rows], words)


def _filled(parts: Sequence[str], width: int) -> str:
    """The parts in lines of at most ``width`` characters, where they fit, each indented by two."""
    lines = [""]
    for index, part in enumerate(parts):
        more = part + ("," if index < len(parts) - 1 else "")
        if lines[-1] and len(lines[-1]) + 1 + len(more) + 2 > width:
            lines.append("")
        lines[-1] += f" {more}" if lines[-1] else more
    return "\n".join(f"  {line}" for line in lines)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table, with arguments as of `rich_table`.

    >>> print(markdown_table(["who", "ms"], [["sgd", "1.0"]]))
    | who | ms |
    |---|--:|
    | sgd | 1.0 |
    """
    rule = "|" + "---|" * words + "--:|" * (len(heads) - words)
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])
