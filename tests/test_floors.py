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

GROUND, FIRST, TOP = 0, 1, 2
FLOOR_NAMES = ("ground floor", "first floor", "top floor")
FLOORS = {
    GROUND: {
        "adjacent",
        "blocks",
        "inverse",
        "damping",
        "polar",
        "sampling",
        "patches",
        "rows",
        "thor_rows",
        "schedules",
        "by_class_path",
        "spectrum",
        "weight_use",
        "dtypes",
        "folds",
        "costs",
        "trace_rule",
        "triangles",
        "eigen",
        "kept",
        "adam",
    },
    FIRST: {
        "attention",
        "layer",
        "kinds",
        "user_layers",
        "layers",
        "batches",
        "directions",
        "options",
        "stack",
        "stacks",
        "refresh",
        "curvature",
        "observer",
        "snapshot",
        "damage",
        "factors",
        "hooks",
        "pair_checks",
        "optimizer",
        "scale",
        "norms",
        "fading",
        "collectives",
        "split",
        "exchange",
        "buckets",
        "window",
        "shares",
        "parts",
        "workers",
        "runs",
        "routes",
        "sharded",
    },
    TOP: {
        "__init__",
        "callback",
        "strategy",
        "model_parallel",
        "travel",
        "saving",
        "supported",
        "configure",
        "mindspore",
        "mindspore_arguments",
        "mindspore_groups",
        "recipes",
        "report",
        "trial",
        "cli",
    },
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def imported_names(source: str, room: str) -> set[str]:
    """Every dotted name that ``source`` imports, plus each ``torch.distributed`` reached as an attribute.

    ``from a import b`` gives ``a.b``; relative imports are resolved inside the package.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level > 1:
                raise ValueError(f"{room}.py imports from above {PACKAGE}: write `from {PACKAGE}.room import name`.")
            base = ".".join(part for part in (PACKAGE if node.level else None, node.module) if part)
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def rooms_among(names: set[str], rooms: set[str]) -> set[str]:
    """The package's modules among dotted names; a bare name of the package itself is the front door."""
    inside = [name.split(".") for name in names if name.split(".")[0] == PACKAGE]
    return {parts[1] if len(parts) > 1 and parts[1] in rooms else "__init__" for parts in inside}


def broken_rules(sources: dict[str, str]) -> list[str]:
    """One sentence for each broken rule, given ``{module name: source text}``; empty when the house stands."""
    broken: list[str] = []
    graph: dict[str, set[str]] = {}
    for room, source in sources.items():
        if room not in FLOOR_OF:
            broken.append(f"{room}.py has no floor: add it to FLOORS in tests/test_floors.py.")
            continue
        floor = FLOOR_OF[room]
        names = imported_names(source, room)
        graph[room] = rooms_among(names, set(sources))
        for other in sorted(graph[room]):
            if FLOOR_OF.get(other, floor) > floor:
                broken.append(
                    f"{room}.py ({FLOOR_NAMES[floor]}) imports {other}.py ({FLOOR_NAMES[FLOOR_OF[other]]}): "
                    "imports go downstairs only."
                )
        outside = {name.split(".")[0] for name in names} - {PACKAGE, "torch"} - sys.stdlib_module_names
        if floor < TOP and outside:
            broken.append(f"{room}.py ({FLOOR_NAMES[floor]}) imports {sorted(outside)}: below the top only torch.")
        if room != "collectives" and any(f"{name}.".startswith("torch.distributed.") for name in names):
            broken.append(f"{room}.py uses torch.distributed: only collectives.py may.")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        broken.append("Import cycle: " + " → ".join(f"{room}.py" for room in error.args[1]))
    return broken


def test_imports_go_downstairs_only():
    sources = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
    assert sources, f"no module found in {FOLDER}"
    assert broken_rules(sources) == []


def test_the_package_has_no_folder_that_the_rule_does_not_see():
    assert [path for path in FOLDER.rglob("*.py") if path.parent != FOLDER] == []


def test_every_room_of_the_table_exists():
    assert {room for room in FLOOR_OF if not (FOLDER / f"{room}.py").is_file()} == set()


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"blocks": "from .layers import x", "layers": ""}, "blocks.py (ground floor) imports layers.py"),
        ({"rows": "from . import hooks", "hooks": ""}, "imports hooks.py (first floor)"),
        ({"hooks": "import lightning_thor.callback", "callback": ""}, "imports callback.py (top floor)"),
        ({"curvature": "from lightning_thor import Thor", "__init__": ""}, "imports __init__.py (top floor)"),
        ({"blocks": "import numpy as np"}, "imports ['numpy']"),
        ({"optimizer": "from lightning.pytorch import Trainer"}, "imports ['lightning']"),
        ({"refresh": "def show():\n    import rich.table"}, "imports ['rich']"),
        ({"callback": "import torch.distributed as dist"}, "callback.py uses torch.distributed"),
        ({"strategy": "from torch import distributed"}, "strategy.py uses torch.distributed"),
        ({"strategy": "from torch.distributed.fsdp import x"}, "strategy.py uses torch.distributed"),
        ({"layers": "import torch\nn = torch.distributed.get_rank()"}, "layers.py uses torch.distributed"),
        ({"hooks": "if TYPE_CHECKING:\n    from .cli import main", "cli": ""}, "imports cli.py (top floor)"),
        ({"layers": "from .hooks import x", "hooks": "def f():\n    from .layers import y"}, "Import cycle: "),
        ({"garage": ""}, "garage.py has no floor"),
    ],
)
def test_a_broken_rule_is_caught(sources: dict[str, str], words: str):
    broken = broken_rules(sources)
    assert len(broken) == 1
    assert words in broken[0]


def test_what_the_rules_allow_is_not_caught():
    sources = {
        "__init__": "from lightning_thor.callback import ThorCallback",
        "callback": "import lightning as L\nfrom rich.table import Table\nfrom .curvature import Curvature",
        "curvature": "import math\nimport torch\nfrom .collectives import x\nfrom .blocks import y",
        "collectives": "import torch.distributed as dist",
        "blocks": "from __future__ import annotations\nfrom torch import Tensor\nfrom .damping import z",
        "damping": "import torch.nn.functional as F",
    }
    assert broken_rules(sources) == []
