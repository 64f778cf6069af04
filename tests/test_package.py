"""What is published: the built wheel's metadata and files, without a network."""

from __future__ import annotations

import email
import os
import re
import shlex
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path

import pytest
import yaml

import lightning_thor
from tests.helpers.launching import ROOT

build = pytest.importorskip("hatchling.build", reason="hatchling is not installed: pip install '.[dev]'")


@contextmanager
def built(source: Path, folder: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel of the project in ``source``."""
    before = Path.cwd()
    os.chdir(source)
    try:
        name = build.build_wheel(str(folder))
    finally:
        os.chdir(before)
    with zipfile.ZipFile(folder / name) as opened:
        yield opened


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with built(ROOT, tmp_path_factory.mktemp("wheel")) as opened:
        yield opened


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    (file,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    return email.message_from_bytes(wheel.read(file))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return metadata_of(wheel)


def test_it_says_what_it_is_and_needs(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("lightning-thor", lightning_thor.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    needed = {re.split(r"[^\w-]", one)[0] for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one}
    assert needed >= {"jsonargparse", "lightning", "rich", "torch"}
    assert set(metadata.get_all("Provides-Extra", [])) >= {"benchmarks", "dev", "examples", "finetuning"}


def links(readme: str) -> list[tuple[str, str]]:
    """Whether each is a picture, and where it leads."""
    return re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", readme)


def test_the_readme_on_an_index_leads_to_the_repository_once_that_has_an_address(
    metadata: Message, tmp_path: Path
) -> None:
    readme = text_of("README.md")
    if "\nRepository = " not in text_of("pyproject.toml"):
        assert metadata.get_payload(decode=True) == readme.encode()
    project, home = tmp_path / "project", "https://host.example/us/it"
    shutil.copytree(ROOT / "lightning_thor", project / "lightning_thor", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE", "hatch_build.py"):
        shutil.copy(ROOT / name, project)
    lines = [one for one in text_of("pyproject.toml").splitlines() if not one.startswith("Repository = ")]
    head = next(index for index, line in enumerate(lines) if line.startswith("[project.urls]"))
    lines.insert(head + 1, f'Repository = "{home}"')
    (project / "pyproject.toml").write_text("\n".join(lines), encoding="utf-8")
    with built(project, tmp_path) as wheel:
        published = metadata_of(wheel).get_payload(decode=True)
    assert isinstance(published, bytes)
    tag, expected = f"v{lightning_thor.__version__}", []
    for picture, link in links(readme):
        whole = link if "://" in link else f"{home}/{'raw' if picture else 'blob'}/{tag}/{link}"
        expected.append((picture, whole))
    assert links(published.decode()) == expected
    assert {picture for picture, _ in expected} == {"", "!"}


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


def test_no_version_of_the_workflow_is_a_redirection_to_its_shell() -> None:
    if not (ROOT / ".github").exists():
        pytest.skip("the sdist has no workflows")
    workflow = yaml.safe_load(text_of(".github/workflows/test.yml"))
    for one in workflow["jobs"]["ranges"]["strategy"]["matrix"]["include"]:
        words = list(shlex.shlex(one["versions"], posix=True, punctuation_chars=True))
        assert not {"<", ">", "<=", ">="} & set(words), one["versions"]


def test_the_workflows_install_by_hash_and_audit_every_week() -> None:
    if not (ROOT / ".github").exists():
        pytest.skip("the sdist has no workflows")
    test, audit = (yaml.safe_load(text_of(f".github/workflows/{name}.yml")) for name in ("test", "audit"))
    installs = [step["run"] for step in test["jobs"]["hashes"]["steps"] if "pip install" in step.get("run", "")]
    assert "--require-hashes --no-deps --requirement requirements.lock" in installs[1]
    for other in (installs[0], *installs[2:]):  # torch, and this package
        assert "--constraint constraints.txt" in other or "--no-deps --no-build-isolation ." in other
    (schedule,) = audit[True]["schedule"]  # YAML reads the key "on" so
    assert re.fullmatch(r"\d+ \d+ \* \* \d", schedule["cron"])
    steps = [step.get("run", "") for step in audit["jobs"]["dependencies"]["steps"]]
    assert any(one.startswith("pip-audit --requirement constraints.txt") for one in steps)


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
