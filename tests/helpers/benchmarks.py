"""The commands of the benchmarks, and a made-up machine for made-up figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
ENVIRONMENT = {"device": "cpu", "cpu": "A processor", "threads": 2, "torch": "9.9", "malloc": "", "date": "2026-01-02"}


def run_module(name: str, *arguments: str) -> str:
    """Run ``python -m name`` in the repository's root; returns its output."""
    ended = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "220"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
