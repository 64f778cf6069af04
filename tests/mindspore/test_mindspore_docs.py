"""docs/mindspore.md: its programs run, and its tables have a row for every argument and key."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from lightning_thor.mindspore.optimizer import thor
from lightning_thor.mindspore.param_groups import KEYS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "mindspore.md").read_text(encoding="utf-8")
THERE, LOOP, TRAINER = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)


def run(program: str) -> None:
    exec(compile(program, "docs/mindspore.md", "exec"), {"__name__": "__main__"})


def test_the_program_after_runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    run(LOOP)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]


def test_the_program_under_a_trainer_runs() -> None:
    run(TRAINER)


def test_the_program_before_is_python_and_says_the_same_of_thor() -> None:
    compile(THERE, "before", "exec")
    (before,), (after,) = (
        re.findall(r"opt = (?:nn\.)?thor\((.*?)\n\)", program, re.DOTALL) for program in (THERE, LOOP)
    )
    plain = re.sub(r"Tensor\((.*?), ms\.float32\)", r"\1", before)
    assert plain == after


def test_every_argument_and_every_key_has_a_row() -> None:
    first_cells = re.findall(r"^\| (.*?) \| .* \|$", TEXT, re.MULTILINE)
    rows = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    arguments = set(inspect.signature(thor).parameters) - {"variant", "params"}
    assert rows == arguments | set(KEYS)
