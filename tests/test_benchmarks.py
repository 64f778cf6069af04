"""The benchmarks: what they measure and write, and that README.md holds what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import readme, step_cost

ROOT = Path(__file__).parents[1]
SECONDS = 120
ENVIRONMENT = {"device": "cpu", "cpu": "A processor", "threads": 2, "torch": "9.9", "malloc": "", "date": "2026-01-02"}


def python_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m ...`` in the repository's root."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


# ── step_cost ──


@pytest.mark.slow
def test_the_step_cost_is_printed_and_merged_into_its_file(tmp_path: Path) -> None:
    out = tmp_path / "results" / "step_cost.json"
    out.parent.mkdir()
    out.write_text(json.dumps({"gpt": made_up_step_cost()["mlp"]}), encoding="utf-8")
    options = ("--workload", "mlp", "--rounds", "4", "--threads", "1", "--out", str(out))
    ended = python_module("benchmarks.step_cost", *options)
    assert ended.returncode == 0, ended.stderr
    assert "MLP 784-512-512-512-10, batch 128" in ended.stdout
    results = json.loads(out.read_text(encoding="utf-8"))
    assert list(results) == ["gpt", "mlp"]  # what was measured before stays
    measured = results["mlp"]
    assert measured["environment"]["threads"] == 1
    assert measured["environment"]["torch"] == torch.__version__
    # Every second step is a refresh, half of the four rounds.
    assert sum(measured["refreshes"]) == 2
    assert all(len(values) == 4 and min(values) > 0 for values in measured["seconds"].values())
    n_parameters = 784 * 512 + 512 + 2 * (512 * 512 + 512) + 512 * 10 + 10
    assert measured["parameter_bytes"] == 4 * n_parameters
    assert measured["state_bytes"]["sgd"] == 4 * n_parameters
    assert measured["state_bytes"]["adamw"] > 8 * n_parameters
    assert measured["state_bytes"]["thor"] > 4 * n_parameters
    # The table of the terminal and the README's come from this file and agree.
    assert step_cost_row(results, "mlp")[1] in ended.stdout


def step_cost_row(results: dict[str, Any], name: str) -> tuple[str, ...]:
    (row,) = step_cost.cells({name: results[name]})
    return row


def test_a_refresh_and_a_plain_step_are_told_apart() -> None:
    """Exactly the steps in which the curvature was inverted count as refreshes."""
    small = step_cost.Workload(
        lambda: nn.Sequential(nn.Linear(4, 3)), lambda: (torch.randn(8, 4), torch.randint(3, (8,))), "small"
    )
    measured = step_cost.measure(small, rounds=6, device=torch.device("cpu"))
    assert measured["refreshes"] == [True, False] * 3
    assert {len(values) for values in measured["seconds"].values()} == {6}


def test_ratios_are_taken_within_a_round_and_weighed_by_the_interval() -> None:
    # A machine that is ten times slower in the second half: the ratios do not see it.
    slow = [1.0, 1.0, 10.0, 10.0]
    measured = {
        "seconds": {
            "sgd": slow,
            "adamw": [1.5 * s for s in slow],
            "thor": [4.0 * slow[0], 2.0 * slow[1], 4.0 * slow[2], 2.0 * slow[3]],
        },
        "refreshes": [True, False, True, False],
        "state_bytes": {"sgd": 10, "adamw": 20, "thor": 35},
        "parameter_bytes": 10,
    }
    summary = step_cost.summarise(measured, interval=10)
    assert summary["adamw"] == [1.5, 1.5, 1.5]
    assert summary["thor_plain"] == [2.0, 2.0, 2.0]
    assert summary["thor_refresh"] == [4.0, 4.0, 4.0]
    assert summary["amortised"] == pytest.approx((9 * 2.0 + 4.0) / 10)
    assert summary["state_over_parameters"] == {"sgd": 1.0, "adamw": 2.0, "thor": 3.5}


def test_too_few_rounds_are_refused() -> None:
    measured = {
        "seconds": {name: [1.0] for name in step_cost.OPTIMIZERS},
        "refreshes": [True],
        "state_bytes": {},
        "parameter_bytes": 1,
    }
    with pytest.raises(ValueError, match=r"thor_plain.*take more rounds than 1"):
        step_cost.summarise(measured)


# ── readme ──


def made_up_step_cost() -> dict[str, Any]:
    measured: dict[str, Any] = {
        "seconds": {"sgd": [0.01] * 4, "adamw": [0.011] * 4, "thor": [0.02, 0.012] * 2},
        "refreshes": [True, False] * 2,
        "state_bytes": {"sgd": 10, "adamw": 20, "thor": 35},
        "parameter_bytes": 10,
    }
    result = {
        "words": "a made-up \\g<0> network",
        "environment": ENVIRONMENT,
        "summary": step_cost.summarise(measured),
        **measured,
    }
    return {"mlp": result}


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
    """A repository with the figures of two blocks, and a README that has markers for them."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    step_cost_file = tmp_path / "benchmarks" / "results" / "step_cost.json"
    step_cost_file.write_text(json.dumps(made_up_step_cost()), encoding="utf-8")
    (tmp_path / "docs" / "demo.json").write_text(json.dumps(made_up_demo()), encoding="utf-8")
    text = (
        "# Title\n<!-- step_cost:begin -->\nstale figures\n<!-- step_cost:end -->\nbetween \\1\n"
        "<!-- demo:begin --><!-- demo:end -->\nend\n"
    )
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_blocks_are_filled_and_all_else_stays(root: Path) -> None:
    assert readme.main([], root=root) == 0
    text = (root / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Title\n<!-- step_cost:begin -->\n| workload |")
    assert r"| a made-up \g<0> network | 10.0 | 1.10 (1.10–1.10) | 1.20 (1.20–1.20) | 2.00 (2.00–2.00) | 1.28 |" in text
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


def test_the_readme_of_this_repository_holds_what_was_measured() -> None:
    ended = python_module("benchmarks.readme", "--check")
    assert ended.returncode == 0, ended.stdout + ended.stderr
