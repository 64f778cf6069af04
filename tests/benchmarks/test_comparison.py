"""The table of docs/comparison.md: it names every argument of nn.thor, every promise of the paper, and real tests."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from lightning_thor.mindspore.optimizer import thor
from lightning_thor.mindspore.param_groups import KEYS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "comparison.md"


def table() -> list[list[str]]:
    """The rows, without the head, as cells."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def links(cell: str) -> list[tuple[str, str]]:
    """``[the name of a test](its file)`` as function name and file; the words of a name stand for its underscores."""
    return [
        (f"test_{words.replace(' ', '_')}", file) for words, file in re.findall(r"\[([^]]+)\]\(\.\./([^)]+)\)", cell)
    ]


def test_every_row_has_five_cells_and_names_a_test_that_exists() -> None:
    for row in table():
        assert len(row) == 5, row
        ours, held_by = row[3:]
        assert links(held_by) or ours == "not yet", f"{row[0]}: no test"
        for name, file in links(held_by):
            assert re.fullmatch(r"tests/[\w/]+\.py", file), f"{row[0]}: {file} is no file of tests"
            assert (ROOT / file).is_file(), f"{row[0]}: {file} does not exist"
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"{row[0]}: {file} has no {name}"


def test_every_argument_and_group_key_of_nn_thor_has_a_row() -> None:
    named = {name for row in table() for name in re.findall(r"`(\w+)`", row[0])}
    assert named == set(inspect.signature(thor).parameters) - {"variant"} | set(KEYS)


def test_every_promise_of_the_paper_has_a_row() -> None:
    first = "\n".join(row[0] for row in table())
    for promise in (
        "THOR (",
        "THOR_stop",
        "THOR_NT",
        "growing interval",
        "split",
        "ResNet-50",
        "BERT",
        "several devices",
    ):
        assert promise in first
