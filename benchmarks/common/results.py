"""The JSON file of finished trainings, so that a stopped benchmark continues where it was."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Results:
    """A JSON file: a summary per workload, and finished trainings by key, written after each training.

    Another process may write to the file too (another workload), so each change is made to its present content.

    Args:
        path: of the file, which need not exist yet.
        environment: where trainings run now, see `benchmarks.common.environment`.
    """

    def __init__(self, path: Path, environment: Mapping[str, str | int]) -> None:
        self.path = path
        self.environment = dict(environment)
        # A training belongs to its machine; the date alone makes no difference.
        self.machine = {key: value for key, value in environment.items() if key != "date"}
        self.content: dict[str, dict[str, Any]] = {"summary": {}, "runs": {}}
        self._read()

    def get_or_train(self, key: str, facts: Any, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the record of the training ``key``, from the file or else from ``run``, which trains now.

        Other ``facts`` (its settings, in plain types), or another machine, make it another training.
        """
        fingerprint = hashlib.sha256(json.dumps([facts, self.machine], sort_keys=True).encode()).hexdigest()[:8]
        runs: dict[str, dict[str, Any]] = self.content["runs"]
        if f"{key} {fingerprint}" not in runs:
            self.put("runs", f"{key} {fingerprint}", run())
        stored: dict[str, Any] = self.content["runs"][f"{key} {fingerprint}"]
        return stored

    def put(self, part: str, key: str, entry: dict[str, Any]) -> None:
        """Store ``entry`` (plain types) under ``key`` in ``part``, ``"summary"`` or ``"runs"``."""
        self._read()
        self.content[part][key] = entry
        self._write()

    def forget(self, workload: str, *names: str) -> None:
        """Remove the trainings of one workload whose keys begin with the workload and one of ``names``."""
        self._read()
        dropped = [[workload, name] for name in names]
        self.content["runs"] = {k: run for k, run in self.content["runs"].items() if k.split()[:2] not in dropped}
        self._write()

    def _read(self) -> None:
        if self.path.is_file():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In one move, so that a stopped benchmark never leaves half a file.
        beside = self.path.with_suffix(f".{os.getpid()}.part")
        beside.write_text(json_in_lines(self.content), encoding="utf-8")
        os.replace(beside, self.path)


def json_in_lines(content: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with one line per entry of each part: short to scroll, and a diff shows the changed entries."""
    parts = []
    for name, part in content.items():
        lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in part.items())
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
