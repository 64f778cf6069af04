"""What is published: the built wheel's metadata and files, without a network."""

from __future__ import annotations

import email
import os
import re
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest

import lightning_thor
from tests.helpers.launching import ROOT

build = pytest.importorskip("hatchling.build", reason="hatchling is not installed: pip install '.[dev]'")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    before, folder = Path.cwd(), tmp_path_factory.mktemp("wheel")
    os.chdir(ROOT)
    try:
        name = build.build_wheel(str(folder))
    finally:
        os.chdir(before)
    with zipfile.ZipFile(folder / name) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (file,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    return email.message_from_bytes(wheel.read(file))


def test_it_says_what_it_is_and_needs(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("lightning-thor", lightning_thor.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    needed = {re.split(r"[^\w-]", one)[0] for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one}
    assert needed >= {"jsonargparse", "lightning", "rich", "torch"}
    assert set(metadata.get_all("Provides-Extra", [])) >= {"benchmarks", "dev", "examples", "finetuning"}


def test_it_holds_the_package_with_its_types_and_its_command_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_thor").rglob("*.py")}
    assert set(names) == own | {"lightning_thor/py.typed"}
    (points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "lightning-thor = lightning_thor.trainer.cli:main" in wheel.read(points).decode()


def test_the_version_is_that_of_the_citation_and_the_changelog_knows_it() -> None:
    version = lightning_thor.__version__
    assert re.search(rf"^version: ['\"]?{re.escape(version)}['\"]?$", text_of("CITATION.cff"), re.MULTILINE)
    assert re.search(rf"^## \[?{re.escape(version)}\]?", text_of("CHANGELOG.md"), re.MULTILINE)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_hashes_are_of_the_versions_that_are_tested() -> None:
    tested, locked = (
        {
            one.lower().replace("_", "-").replace(".", "-")
            for one in re.findall(r"^\S+==[^\s;]+", text_of(name), re.MULTILINE)
        }
        for name in ("constraints.txt", "requirements.lock")
    )
    torch = {one for one in tested if one.startswith("torch==")}
    assert len(torch) == 1
    assert locked == tested - torch
    for entry in re.split(r"\n(?=\S)", text_of("requirements.lock").rstrip())[1:]:
        assert re.fullmatch(r"\S+==\S+( ;[^\\]*)?( \\\n +--hash=sha256:[0-9a-f]{64})+", entry), entry
