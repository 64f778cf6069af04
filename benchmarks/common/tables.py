"""Tables for a terminal and for Markdown pages, from the same heads and rows."""

from collections.abc import Iterable, Sequence

from rich.table import Table


def rich_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Table:
    """A table for a terminal, ``rows`` with one cell for each of ``heads``; the first ``words`` columns hold words, the
    others figures, aligned to the right."""
    table = Table(title=title)
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < words else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table, with arguments as of `rich_table`.

    >>> print(markdown_table(["who", "ms"], [["sgd", "1.0"]]))
    | who | ms |
    |---|--:|
    | sgd | 1.0 |
    """
    rule = "|" + "---|" * words + "--:|" * (len(heads) - words)
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])
