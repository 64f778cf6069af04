"""The house rule "imports go downstairs only", read from the source of every module of lightning_thor.

All imports count: at the top, inside functions, and under ``if TYPE_CHECKING``.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lightning_thor"
FOLDER = Path(__file__).parents[1] / PACKAGE

FLOORS = (
    "linalg",
    "layers",
    "block_size",
    "preconditioning",
    "factors",
    "distributed",
    "optim",
    "curvature",
    "schedules",
    "fsdp",
    "mindspore",
    "trainer",
    "recipes",
    "former_addresses",
    "__init__",
)
"""From the ground up: folders, and modules of the root. Each may import those before it."""
TOP = ("trainer", "recipes", "__init__")
"""Where more than torch may be imported: Lightning and rich."""


def imported_names(source: str, module: str) -> set[str]:
    """Every dotted name that ``source`` imports, plus each ``torch.distributed`` reached as an attribute.

    ``from a import b`` gives ``a.b``; a relative import is refused.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{module} has a relative import: write `from {PACKAGE}.folder.module import name`.")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def module_among(name: str, modules: set[str]) -> str:
    """The longest prefix of ``name`` below the package that is a module; else the front door."""
    parts = name.split(".")[1:]
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(
        (found for prefix in prefixes for found in (prefix, f"{prefix}.__init__") if found in modules), "__init__"
    )


def floor_of(module: str) -> str:
    return module.split(".")[0]


def broken_rules(sources: dict[str, str]) -> list[str]:
    """One sentence for each broken rule, given ``{dotted module: source}``; empty when the house stands."""
    broken: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        floor = floor_of(module)
        if floor not in FLOORS:
            broken.append(f"{module} has no floor: add {floor} to FLOORS in tests/test_floors.py.")
            continue
        names = imported_names(source, module)
        inside = {name for name in names if name.split(".")[0] == PACKAGE}
        graph[module] = {module_among(name, set(sources)) for name in inside}
        for other in sorted(graph[module]):
            if floor_of(other) in FLOORS and FLOORS.index(floor_of(other)) > FLOORS.index(floor):
                broken.append(f"{module} imports {other}, which is above it: imports go downstairs only.")
        outside = {name.split(".")[0] for name in names} - {PACKAGE, "torch"} - sys.stdlib_module_names
        if floor not in TOP and outside:
            broken.append(f"{module} imports {sorted(outside)}: below {TOP[0]} only torch.")
        if floor != "distributed" and any(f"{name}.".startswith("torch.distributed.") for name in names):
            broken.append(f"{module} uses torch.distributed: only the folder distributed may.")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        broken.append("Import cycle: " + " → ".join(error.args[1]))
    return broken


def sources_of_the_package() -> dict[str, str]:
    paths = {path: ".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in FOLDER.rglob("*.py")}
    return {module: path.read_text(encoding="utf-8") for path, module in paths.items()}


def test_imports_go_downstairs_only():
    sources = sources_of_the_package()
    assert sources, f"no module found in {FOLDER}"
    assert broken_rules(sources) == []


def test_no_test_imports_a_test():
    """What tests share is in tests/helpers."""
    for path in Path(__file__).parent.rglob("*.py"):
        names = imported_names(path.read_text(encoding="utf-8"), path.stem)
        tests = {name for name in names if name.startswith("tests.") and ".test_" in name}
        assert not tests, f"{path.name} imports {tests}: move what it needs to tests/helpers"


def test_every_floor_of_the_list_exists():
    assert {floor_of(module) for module in sources_of_the_package()} == set(FLOORS)


def test_every_folder_says_in_one_sentence_what_belongs_there():
    for path in FOLDER.glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text, f"{path.parent.name} does not say what belongs there"
        assert text.endswith("."), f"{path.parent.name} has no whole sentence"


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"linalg.a": "from lightning_thor.layers.b import x", "layers.b": ""}, "linalg.a imports layers.b"),
        ({"layers.a": "from lightning_thor.layers import b", "layers.b": "import lightning_thor.layers.a"}, "cycle: "),
        ({"optim.a": "import lightning_thor.trainer.b", "trainer.b": ""}, "optim.a imports trainer.b"),
        ({"curvature.a": "from lightning_thor import Thor", "__init__": ""}, "curvature.a imports __init__"),
        ({"linalg.a": "import numpy as np"}, "imports ['numpy']"),
        ({"optim.a": "from lightning.pytorch import Trainer"}, "imports ['lightning']"),
        ({"mindspore.a": "def show():\n    import rich.table"}, "imports ['rich']"),
        ({"trainer.a": "import torch.distributed as dist"}, "trainer.a uses torch.distributed"),
        ({"fsdp.a": "from torch import distributed"}, "fsdp.a uses torch.distributed"),
        ({"fsdp.a": "from torch.distributed.fsdp import x"}, "fsdp.a uses torch.distributed"),
        ({"layers.a": "import torch\nn = torch.distributed.get_rank()"}, "layers.a uses torch.distributed"),
        ({"layers.a": "if TYPE_CHECKING:\n    from lightning_thor.recipes import x", "recipes": ""}, "imports recipes"),
        ({"garage.a": ""}, "garage.a has no floor"),
    ],
)
def test_a_broken_rule_is_caught(sources: dict[str, str], words: str):
    broken = broken_rules(sources)
    assert len(broken) == 1
    assert words in broken[0]


def test_a_relative_import_is_refused():
    with pytest.raises(ValueError, match="relative import"):
        broken_rules({"linalg.a": "from . import b"})


def test_what_the_rules_allow_is_not_caught():
    sources = {
        "__init__": "from lightning_thor.trainer.callback import ThorCallback",
        "trainer.callback": "import lightning as L\nimport rich\nfrom lightning_thor.curvature import c",
        "curvature.c": "import math\nimport torch\nfrom lightning_thor.distributed.ranks import x",
        "curvature.__init__": "",
        "distributed.ranks": "import torch.distributed as dist\nfrom lightning_thor.linalg import blocks",
        "linalg.blocks": "from __future__ import annotations\nfrom torch import Tensor",
    }
    assert broken_rules(sources) == []
