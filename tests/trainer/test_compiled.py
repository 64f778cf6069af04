"""Compiled modules under a Trainer train as plain ones, whatever was trained before in the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from tests.helpers.boring import Boring, everything, quiet, trainer


class Silent(Boring):
    """Logs nothing: Lightning's record of results cannot be compiled."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


class WithoutCurvature(Silent):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def of_a_part(module: Boring) -> Any:
    module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
    return module


def of_a_part_in_place(module: Boring) -> Any:
    module.net.compile(backend="aot_eager")
    return module


def of_all(module: Boring) -> Any:
    return torch.compile(module, backend="aot_eager")


@pytest.mark.parametrize("compiled", [of_a_part, of_a_part_in_place, of_all], ids=lambda f: f.__name__)
def test_a_compiled_module_trains_as_the_plain_one(tmp_path: Path, compiled: Callable[[Boring], Any]) -> None:
    """After one without curvature, in two fits, with accumulated batches under autocast and a loss scale."""

    def options() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        return {"accumulate_grad_batches": 2, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}

    torch.compiler.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as in a new process
    quiet(tmp_path, **options()).fit(compiled(WithoutCurvature()))
    for _ in range(2):
        found, expected = trainer(tmp_path, **options()), trainer(tmp_path, **options())
        found.fit(compiled(Silent()))
        expected.fit(Silent())
        torch.testing.assert_close(everything(found), everything(expected), rtol=1e-4, atol=1e-6)
