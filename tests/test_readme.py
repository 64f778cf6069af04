"""README.md and the pages of docs: their tables are those of the classes, what they show first does what they say, and
their links lead somewhere. (tests/test_code_blocks.py runs all other code blocks.)"""

from __future__ import annotations

import ast
import inspect
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_thor import Curvature, Thor, ThorCallback
from tests.conftest import pytest_terminal_summary
from tests.helpers.boring import Boring

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FORMER = ("former_addresses.py",)
"""Former addresses, which have no line of their own."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def options_in(head: str) -> dict[str, object]:
    """The table of settings whose head begins so, as options with their defaults; rows may have several of each."""
    (table,) = re.findall(
        rf"^\| {re.escape(head)}.*\n\|[-|]+\n((?:\|.*\n)+)", text_of(DOCS / "settings.md"), re.MULTILINE
    )
    found: dict[str, object] = {}
    for row in table.splitlines():
        names, defaults = row.strip("|").split("|")[:2]
        for name, default in zip(names.split(","), defaults.split(","), strict=True):
            found[name.strip(" `")] = ast.literal_eval(default.strip(" `"))
    return found


def defaults_of(function: Any, *without: str) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.name not in ("self", *without)}


def test_the_tables_have_every_option_with_its_default() -> None:
    of_callback = options_in("`ThorCallback(...)`")
    assert of_callback == defaults_of(ThorCallback, "others")
    assert options_in("`Thor(...)`") == defaults_of(Thor, "params", "preconditioner", "others")
    of_curvature = defaults_of(Curvature, "model", "mode", "loss_multiplier", "parameters", "output_layer")
    assert {"summary": None, "waits_for_thor": False, **of_curvature} == of_callback


def run(page: Path, marker: str, **names: Any) -> dict[str, Any]:
    """The one snippet of a page in which ``marker`` stands, with these names for its imports of lightning."""
    (snippet,) = (text for text in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL) if marker in text)
    exec(snippet.replace("import lightning as L\n", ""), names)
    return names


@pytest.fixture
def quiet(tmp_path: Path) -> Any:
    """Lightning with `Boring` for a module and a silent Trainer."""
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = partial(
        L.Trainer, accelerator="cpu", max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path, **options
    )
    return SimpleNamespace(LightningModule=Boring, Trainer=trainer)


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "first-hour.md"], ids=lambda page: page.name)
def test_the_three_lines_train(page: Path, quiet: Any) -> None:
    names = run(page, "class Model(L.LightningModule)", L=quiet, train_dataloader=Boring().data())
    assert names["trainer"].global_step == 4
    (optimizer,) = names["trainer"].optimizers
    assert isinstance(optimizer, Thor)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_the_plain_loop_trains() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 2), torch.randn(64, 6)
    y = (x[:, 0] > 0).long()
    first = F.cross_entropy(model(x), y).item()
    names = run(DOCS / "tutorials" / "loops.md", "optimizer.zero_grad()", model=model, F=F, data=[(x, y)] * 60)
    assert names["curvature"].step == 60
    assert names["loss"] < 0.9 * first


def test_the_recipes_lines_make_a_trainer() -> None:
    names = run(
        DOCS / "settings.md",
        "resnet50_imagenet(",
        L=SimpleNamespace(Trainer=partial(L.Trainer, accelerator="cpu", logger=False)),
    )
    assert names["trainer"].max_epochs == 40
    assert any(isinstance(one, ThorCallback) for one in names["trainer"].callbacks)


def test_make_test_says_how_to_run_what_it_leaves_out() -> None:
    makefile, told = text_of(ROOT / "Makefile"), list[str]()
    (left_out,) = re.findall(r"^unit:.*\n.* -m '([^']+)'", makefile, re.MULTILINE)
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr=left_out))
    reporter: Any = SimpleNamespace(write_line=told.append)
    pytest_terminal_summary(reporter, config)
    commands = re.findall(r"make (\w+)", " ".join(told))
    assert [f"not {command}" for command in commands] == left_out.split(" and ")
    assert all(f"\n{command}: " in makefile for command in commands)


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of this page may say: as code hosts make it of the words."""
    text = without_code(text_of(page))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    """One screen and a half; all else is in docs."""
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 95
    reached = set(re.findall(r"\]\((docs/[\w/-]+\.md)\)", text))
    pages = {path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")}
    assert pages - reached == {"docs/reference.md", "docs/changelog.md"}  # which the site alone makes


def test_the_architecture_has_a_line_for_every_folder_and_names_files_that_exist() -> None:
    package = ROOT / "lightning_thor"
    (section,) = re.findall(r"\n## Folders\n(.*)\n## Tests\n", text_of(DOCS / "house.md"), re.DOTALL)
    lines = re.findall(r"^  (\w+)(?:\.py|/) ", section, re.MULTILINE)
    folders = [path.parent.name for path in package.glob("*/__init__.py")]
    assert sorted(lines) == sorted([*folders, *(path.stem for path in package.glob("*.py") if path.name not in FORMER)])
    files = re.findall(r"\w+/\w+\.py", section)
    assert len(files) > 10
    assert all((package / file).is_file() for file in files), files
