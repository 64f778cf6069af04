"""What a step costs, version by version: counts of calls and of launches, and ratios of time.

    python -m benchmarks.history           # prints the table
    python -m benchmarks.history --append  # counts anew: today's row, in the place of one of the same day and version

Calls are those of `benchmarks.step_cost.call_counts`, counted a second time in one process, when what is remembered
from step to step is there; launches those of `benchmarks.launches` for the GPT in natural mode. Ratios are copied from
``benchmarks/results/step_cost.json``, if it was measured since the row before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import launches
from benchmarks.common.environment import RESULTS
from benchmarks.common.tables import markdown_table, rich_table
from benchmarks.step_cost import call_counts
from lightning_thor import __version__

RESULT = RESULTS / "history.json"
KINDS = ("natural, plain", "natural, refresh")
HEADS = (
    "day, commit",
    "calls: plain step",
    "calls: first refresh",
    "launches: plain",
    "launches: refresh",
    "plain / SGD",
    "refresh / SGD",
    "every 10 / SGD",
)


def counted_on() -> dict[str, str]:
    """The versions that counts of calls (Python's) and launches (torch's) depend on."""
    minor = ".".join(platform.python_version_tuple()[:2])
    return {"python": minor, "torch": torch.__version__.partition("+")[0]}


def count_calls() -> dict[str, int]:
    """Count the calls of a process that has trained before."""
    call_counts.count()
    return call_counts.count()


def count_launches() -> dict[str, list[float]]:
    """Count the launches of the GPT's two kinds of natural steps: of forward and backward, and of the step."""
    counts = launches.count(launches.WORKLOADS["gpt"], ["natural"], staggered=False)
    return {kind: [counts[kind].passes, counts[kind].step] for kind in KINDS}


def ratios(results: Mapping[str, Any]) -> dict[str, Any]:
    """The GPT's times over momentum SGD's, from the content of ``step_cost.json``."""
    summary, environment = results["gpt"]["summary"], results["gpt"]["environment"]
    return {
        "date": environment["date"],
        "cpu": environment["cpu"],
        "plain": summary["thor_plain"][1],
        "refresh": summary["thor_refresh"][1],
        "every 10": summary["amortised"]["10"],
    }


def commit() -> str:
    """The commit of the working tree, with a + if the package was changed since; empty outside of a repository."""
    try:
        git = ("git", "-C", str(Path(__file__).parent))
        head = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../lightning_thor"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + "+" * bool(changed)


def row() -> dict[str, Any]:
    """Count everything: today's row."""
    return {
        "date": datetime.date.today().isoformat(),
        "version": __version__,
        "commit": commit(),
        **counted_on(),
        "calls": count_calls(),
        "launches": count_launches(),
        "step_cost": ratios(json.loads((RESULTS / "step_cost.json").read_text(encoding="utf-8"))),
    }


def appended(rows: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows with ``new`` at their end, and without an earlier one of its day and version.

    Times that an earlier row has are left out of the new one: they are of the code of then.
    """
    before = [one for one in rows if (one["date"], one["version"]) != (new["date"], new["version"])]
    measured = [one["step_cost"]["date"] for one in before if "step_cost" in one]
    is_known = "step_cost" in new and new["step_cost"]["date"] in measured
    return [*before, {name: value for name, value in new.items() if not (name == "step_cost" and is_known)}]


def cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """One row under ``HEADS`` for each row, – for what was not counted then."""
    for one in rows:
        calls = one.get("calls", {})
        counts = [f"{calls[name]}" if calls else "–" for name in ("calls of a plain step", "calls of a first refresh")]
        for kind in KINDS:
            passes, step = one.get("launches", {}).get(kind, (None, None))
            counts.append("–" if step is None else f"{passes:.0f} + {step:.0f}")
        times = one.get("step_cost", {})
        shares = [f"{times[name]:.2f}" if times else "–" for name in ("plain", "refresh", "every 10")]
        yield f"{one['date']}, {one['commit']}", *counts, *shares


def block(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/performance.md, from ``benchmarks/results/history.json``."""
    measured = dict.fromkeys(f"{one['date']}, {one['cpu']}" for row in rows if (one := row.get("step_cost")))
    versions = dict.fromkeys(f"Python {one['python']} and torch {one['torch']}" for one in rows if "calls" in one)
    return (
        f"{markdown_table(HEADS, cells(rows))}\n\n"
        f"Calls of a two-layer net's step inside lightning_thor, launches of the GPT of 12 layers, with "
        f"{', '.join(versions)}; times of the GPT of 4 layers, measured: {'; '.join(measured)}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, after today's row was added with ``--append``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", action="store_true", help="count anew, and write today's row")
    args = parser.parse_args(arguments)
    rows = json.loads(RESULT.read_text(encoding="utf-8"))
    if args.append:
        rows = appended(rows, row())
        RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    Console().print(rich_table("The cost of a step, version by version", HEADS, cells(rows)))


if __name__ == "__main__":
    main()
