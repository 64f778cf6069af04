"""Printing by rich, which never ends a fit."""

from __future__ import annotations

from typing import Any

from rich.console import Console, RenderableType


def show(renderable: RenderableType, **options: Any) -> None:
    """Print to standard output; where its encoding lacks a character, as that of a file on Windows may, with a ``?``.

    Args:
        renderable: what rich can print.
        options: of rich's ``Console.print``.
    """
    console = Console()
    with console.capture() as captured:
        console.print(renderable, **options)
    text, encoding = captured.get(), console.encoding
    printable = text.encode(encoding, "replace").decode(encoding)
    # Not by trying: what a console could not write stays in its buffer, and a progress bar's is used again.
    if printable == text:
        console.print(renderable, **options)
    else:
        console.file.write(printable)
