"""Laws of trust: what is loaded is data, and nothing is run, evaluated or fetched."""

from __future__ import annotations

import ast
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_thor import ThorDDPStrategy, ThorModelParallelStrategy
from lightning_thor.trainer.checkpoints import METADATA
from tests.helpers.boring import trainer
from tests.helpers.distributed_workers import ROWS
from tests.helpers.launching import ROOT
from tests.helpers.sharded_workers import Sharded
from tests.helpers.stored_checkpoints import STORED

BUILT_IN = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "subprocess", "urllib", "http", "requests", "socket"}


def dangers(source: str) -> Iterator[str]:
    """What in ``source`` could run, evaluate or fetch what someone else wrote, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: {name}" for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_safe = any(one.arg == "weights_only" and ast.unparse(one.value) == "True" for one in node.keywords)
            loads = called in ("torch.load", "yaml.load", "yaml.unsafe_load") and not is_safe
            if loads or called in BUILT_IN or called.endswith((".system", ".popen", "load_url", "hub.load")):
                yield f"{node.lineno}: {called}"


@pytest.mark.parametrize(
    "source",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "import pickle", "from urllib.request import urlopen",
     "eval(x)", "os.system(x)", "yaml.load(x)"],
)  # fmt: skip
def test_each_danger_is_seen(source: str) -> None:
    assert list(dangers(source))


def test_the_package_runs_evaluates_and_fetches_nothing() -> None:
    files = sorted((ROOT / "lightning_thor").rglob("*.py"))
    assert len(files) > 50
    assert [f"{file.relative_to(ROOT)}:{one}" for file in files for one in dangers(file.read_text("utf-8"))] == []


HARMLESS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch.serialization _get_layout",
    "torch DoubleStorage",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
    "torch LongStorage",
    "torch IntStorage",
    "torch BoolStorage",
    "torch ByteStorage",
}


def classes_in(path: Path) -> set[str]:
    """All that a checkpoint's pickle names, without running it."""
    with zipfile.ZipFile(path) as opened:
        (name,) = (one for one in opened.namelist() if one.endswith("/data.pkl"))
        found = pickletools.genops(opened.read(name))
        return {str(argument) for operation, argument, _ in found if operation.name == "GLOBAL"}


@pytest.mark.parametrize("path", sorted(STORED.rglob("*.ckpt")), ids=lambda path: path.stem)
def test_stored_checkpoints_hold_tensors_and_plain_types(path: Path) -> None:
    file = path / METADATA if path.is_dir() else path
    assert classes_in(file) <= HARMLESS
    torch.load(file, weights_only=True)


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize("name", ["single", "thor_ddp", "fsdp2 file", "fsdp2 folder"])
def test_checkpoints_of_each_strategy_hold_tensors_and_plain_types(name: str, tmp_path: Path) -> None:
    """Of a folder, in the file of all that is not sharded; shards are raw numbers."""
    strategies = {
        "single": lambda: "auto",
        "thor_ddp": ThorDDPStrategy,
        "fsdp2 file": lambda: ThorModelParallelStrategy(save_distributed_checkpoint=False),
        "fsdp2 folder": ThorModelParallelStrategy,
    }
    found = trainer(tmp_path, strategy=strategies[name](), max_epochs=1)
    found.fit(Sharded((ROWS,), dtype=torch.float32))
    found.save_checkpoint(path := tmp_path / "some.ckpt")
    file = path / METADATA if path.is_dir() else path
    assert path.is_dir() == (name == "fsdp2 folder")
    assert classes_in(file) <= HARMLESS
    assert "ThorCallback" in torch.load(file, weights_only=True)["callbacks"]
    resumed = trainer(tmp_path, strategy=strategies[name](), max_epochs=2)
    if dist.is_initialized():
        dist.destroy_process_group()
    resumed.fit(Sharded((ROWS,), dtype=torch.float32), ckpt_path=path, weights_only=True)
    assert resumed.current_epoch == 2
