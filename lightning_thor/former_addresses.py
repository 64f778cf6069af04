"""Former modules of public names, for one release: importing one warns, and gives what its present module has."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FORMER = {
    "callback": "trainer.callback",
    "cli": "trainer.cli",
    "configure": "optim.param_groups",
    "model_parallel": "trainer.fsdp2_strategy",
    "optimizer": "optim.thor",
    "sharded": "fsdp.sharded_curvature",
    "split": "block_size.choose",
    "strategy": "trainer.ddp_strategy",
    "user_layers": "layers.registry",
}
"""Present module by former module, both of lightning_thor."""


class _FormerAddresses(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "lightning_thor" and name in FORMER else None

    def exec_module(self, module: ModuleType) -> None:
        present = f"lightning_thor.{FORMER[module.__name__.rpartition('.')[2]]}"
        warnings.warn(
            f"{module.__name__} is now {present}. Import its public names from lightning_thor itself.",
            DeprecationWarning,
            stacklevel=2,
        )
        names = vars(import_module(present))
        vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})


def install() -> None:
    """Let former modules be imported from now on."""
    if not any(type(finder).__name__ == _FormerAddresses.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_FormerAddresses())
