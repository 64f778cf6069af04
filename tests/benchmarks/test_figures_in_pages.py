"""README.md and the pages of docs: they hold what was measured, and name commands that exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from tests.helpers.benchmarks import ROOT, step_cost


def test_the_pages_of_this_repository_hold_what_was_measured() -> None:
    assert readme.main(["--check"]) == 0


def test_every_command_in_the_documents_exists() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "Makefile",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    commands = set(re.findall(r"python -m (benchmarks[.\w]*\w)", text))
    assert {"benchmarks.step_cost", "benchmarks.time_to_target", "benchmarks.communication"} < commands
    for name in commands:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
        assert spec is not None, name
        assert spec.origin is not None
        assert 'if __name__ == "__main__":' in Path(spec.origin).read_text(encoding="utf-8"), name


def made_up_demo() -> dict[str, Any]:
    run = {"epochs_to_target": 2.0, "seconds_to_target": 1.5, "accuracy": [0.5, 0.98], "step_seconds": [0.01, 0.01]}
    never = run | {"epochs_to_target": None, "seconds_to_target": None, "accuracy": [0.5, 0.9]}
    return {
        "epochs": 7,
        "target": 0.97,
        "torch": "9.9",
        "threads": 1,
        "optimizers": {"THOR": {"lr": 0.02, "runs": [run]}, "AdamW": {"lr": 0.5, "runs": [never]}},
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the figures of two blocks, a README that has markers for them, and a page that has none."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    step_cost_file = tmp_path / "benchmarks" / "results" / "step_cost.json"
    step_cost_file.write_text(json.dumps({"mlp": step_cost()}), encoding="utf-8")
    (tmp_path / "docs" / "demo.json").write_text(json.dumps(made_up_demo()), encoding="utf-8")
    text = (
        "# Title\n<!-- step_cost:begin -->\nstale figures\n<!-- step_cost:end -->\nbetween \\1\n"
        "<!-- step_parts:begin --><!-- step_parts:end -->\n"
        "<!-- demo:begin --><!-- demo:end -->\nend\n"
    )
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    (tmp_path / "docs" / "tutorials").mkdir()
    for page in readme.PAGES[1:]:
        (tmp_path / page).write_text("# A page\n", encoding="utf-8")
    return tmp_path


def test_the_blocks_are_filled_and_all_else_stays(root: Path) -> None:
    assert readme.main([], root=root) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Title\n<!-- step_cost:begin -->\n| workload |")
    assert (
        r"| a made-up \g<0> network | 1000.0 | 1.50 (1.50–1.50) | 2.00 (2.00–2.00) | 4.00 (4.00–4.00) "
        "| 2.20 | 2.02 | 2.50 | 10.00 / 10.00 / 10.00 | 1.0 / 2.0 / 3.5 | 1.50 |"
    ) in text
    # The floor at the interval 10: 1 + 0.1 for each step, and a tenth of 0.1 + 0.1.
    shares = "0.200 (≥ 0.100) | " * 4
    assert rf"| a made-up \g<0> network | {shares}2.20 | 1.12 | – |" in text
    assert "A processor, 2 threads, torch 9.9, 2026-01-02" in text
    assert "| THOR, lr 0.02 | 2.00 | 1.50 | 98.0% | 10.0 |" in text
    assert "| AdamW, lr 0.5 | not reached by 1 of 1 | not reached by 1 of 1 | 90.0% | 10.0 |" in text
    assert "\nbetween \\1\n" in text
    assert text.endswith("<!-- demo:end -->\nend\n")
    assert "stale" not in text


def test_check_writes_nothing_and_tells_by_its_exit_status(root: Path) -> None:
    before = (root / "README.md").read_text(encoding="utf-8")
    assert readme.main(["--check"], root=root) == 1
    assert (root / "README.md").read_text(encoding="utf-8") == before
    assert readme.main([], root=root) == 0
    assert readme.main(["--check"], root=root) == 0
    figures = made_up_demo() | {"epochs": 8}
    (root / "docs" / "demo.json").write_text(json.dumps(figures), encoding="utf-8")
    assert readme.main(["--check"], root=root) == 1


def test_a_page_of_the_docs_is_filled_and_checked_as_the_readme_is(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert readme.main([], root=root) == 0
    page = root / "docs" / "choosing.md"
    page.write_text("# Choosing\n<!-- demo:begin -->\nstale\n<!-- demo:end -->\n", encoding="utf-8")
    assert readme.main(["--check"], root=root) == 1
    advice = "docs/choosing.md does not hold the measured figures. Run: python -m benchmarks.readme\n"
    assert capsys.readouterr().out == advice
    assert readme.main([], root=root) == 0
    assert "| THOR, lr 0.02 | 2.00 |" in page.read_text(encoding="utf-8")


def test_a_readme_without_markers_is_up_to_date(root: Path) -> None:
    (root / "README.md").write_text("# Title\n", encoding="utf-8")
    assert readme.main(["--check"], root=root) == 0


def test_a_marker_without_its_figures_is_an_error(root: Path) -> None:
    (root / "docs" / "demo.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"<!-- demo:begin -->, but there is no docs/demo\.json"):
        readme.main(["--check"], root=root)


def test_a_marker_without_its_end_is_an_error(root: Path) -> None:
    (root / "README.md").write_text("<!-- demo:begin -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="0 times <!-- demo:end -->"):
        readme.main([], root=root)
