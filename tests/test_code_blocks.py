"""Every code block of README.md and docs runs: Python, YAML and commands; and quoted error messages are the code's."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

import examples.classifier  # noqa: F401  # before its base class is another one
import lightning_thor
from lightning_thor.layers import registry
from lightning_thor.preconditioning.modes import MODES
from lightning_thor.trainer.cli import run
from tests.helpers.boring import Boring
from tests.helpers.commands import only

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
ELSEWHERE = {
    "docs/mindspore.md": "tests/mindspore/test_mindspore_docs.py",
    "docs/other_libraries.md": "tests/trainer/test_other_libraries.py",
    "docs/tutorials/fsdp2.md": "tests/fsdp/test_model_parallel.py",
}
"""Pages whose Python blocks another file of tests runs."""

NETWORK = "import torch; from torch import nn; import lightning as L; model = nn.Sequential(nn.Linear(4, 3)); "
LOOP = NETWORK + (
    "from lightning_thor import *; F = nn.functional; data = [(torch.randn(8, 4), torch.randint(3, (8,)))] * 3; "
    "curvature = Curvature(model); optimizer = Thor(model.parameters(), preconditioner=curvature); path = 'state.pt'"
)
FIT = (
    "import lightning as L; from tests.helpers.boring import Boring; from lightning_thor import ThorCallback; "
    "model = Boring(); train_dataloader = model.data(); trainer = L.Trainer(callbacks=[ThorCallback(summary=False)])"
)
SETUP: dict[str, dict[int, str]] = {
    "README.md": {0: FIT},
    "docs/first-hour.md": {1: FIT},
    "docs/checkpoints.md": {
        0: FIT,
        1: "import torch; trainer.save_checkpoint('of_fit.ckpt'); path = 'of_fit.ckpt'",
        2: LOOP,
    },
    "docs/coming-from.md": {0: NETWORK + "module = model"},
    "docs/performance.md": {
        0: LOOP + "; batches = data; loss_of = lambda batch: F.cross_entropy(model(batch[0]), batch[1])",
        1: FIT + "; from types import SimpleNamespace as S; import torch; self = S(net=torch.nn.Linear(2, 2)); "
        "module = model; torch = S(compile=lambda module: module)",  # tests/curvature have compiled ones
    },
    "docs/laplace.md": {
        0: NETWORK + "network = model; loader = [(torch.randn(8, 4), torch.randint(3, (8,)))] * 3",
    },
    "docs/lightning.md": {
        0: "import lightning as L; from lightning_thor import *",
        1: "from lightning.pytorch.callbacks import BackboneFinetuning",
    },
    "docs/tutorials/loops.md": {0: LOOP},
}
"""What a page takes for granted, by the number of its Python block."""


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, without those that include a file, which is tested as such."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found if "--8<--" not in block]


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and Trainers that take two batches and print nothing."""
    forced: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1,
        "limit_test_batches": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": tmp_path,
    }  # fmt: skip
    original = L.Trainer
    monkeypatch.setattr(L, "Trainer", lambda **options: original(**{**options, **forced}))
    monkeypatch.setattr(L, "LightningModule", Boring)  # where a page has `...`, there is a model
    monkeypatch.setattr(registry, "REGISTERED", dict(registry.REGISTERED))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def modes() -> Iterator[None]:
    before = dict(MODES)
    yield
    MODES.clear()
    MODES.update(before)


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page not in ELSEWHERE])
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, short: None, modes: None) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python")):
        exec(SETUP.get(page, {}).get(number, ""), names)
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", ELSEWHERE)
def test_other_tests_run_the_python_of_a_page(page: str) -> None:
    assert Path(page).name in (ROOT / ELSEWHERE[page]).read_text(encoding="utf-8")


def check_configuration(*arguments: str) -> None:
    """Parse options as ``lightning-thor fit`` does, with every class and its options checked, and train nothing."""
    prints = any(one.endswith(".help") for one in arguments)
    with pytest.MonkeyPatch.context() as context:
        only(context, "fit")
        with pytest.raises(SystemExit) as ended:
            run(["fit", *arguments, *([] if prints else ["--print_config"])])
    assert ended.value.code == 0


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_the_yaml_of_a_page_is_a_configuration(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)
        (tmp_path / "block.yaml").write_text(block, encoding="utf-8")
        check_configuration("--config", "examples/digits.yaml", "--config", str(tmp_path / "block.yaml"))


COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for page in pages_with("bash")
        for block in blocks(page, "bash")
        for line in block.splitlines()
    }
    - {""}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_page_exists(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", command)
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for names in extras for extra in names.split(","))
    elif program == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1]) is not None
    else:
        assert program == "lightning-thor"
        if arguments[0] == "plot":  # tests/trainer/test_monitor.py has a folder to draw
            return
        assert arguments[0] == "fit"
        check_configuration(*arguments[1:])  # DIR and FILE are looked for when a fit starts


def messages() -> Iterator[str]:
    """Every string of the package, with … for what is filled in."""
    for file in sorted((ROOT / "lightning_thor").rglob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_the_messages_that_troubleshooting_quotes_are_those_of_the_code() -> None:
    (section,) = PAGES["docs/troubleshooting.md"].read_text(encoding="utf-8").split("\n## By error message\n")[1:]
    cells = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    quoted = [words for cell in cells for words in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 30
    said = list(messages())
    for words in quoted:
        parts = [re.escape(part.strip()) for part in words.split("…")]
        assert any(re.search(r".*".join(parts), one, re.DOTALL) for one in said), words


def test_the_api_reference_has_every_public_name() -> None:
    text = PAGES["docs/reference.md"].read_text(encoding="utf-8")
    assert set(lightning_thor.__all__) <= set(re.findall(r"^::: lightning_thor\.(\w+)$", text, re.MULTILINE))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, anchors, included files and the docstrings of the API reference."""
    pytest.importorskip("mkdocs", reason="pip install 'lightning-thor[docs]' to build the site")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    for page in ("index.html", "first-hour/index.html", "tutorials/gpt/index.html", "reference/index.html"):
        assert (tmp_path / page).stat().st_size > 10_000
    assert "class Block" in re.sub(r"<[^>]+>", "", (tmp_path / "tutorials/gpt/index.html").read_text(encoding="utf-8"))
