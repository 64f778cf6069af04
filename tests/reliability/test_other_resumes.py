"""Laws of checkpoints that meet another training than theirs: refused in words, or gone on with as documented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_thor import ThorCallback
from tests.helpers.boring import Boring, quiet, trainer


class AdamW(Boring):
    """With as many groups and parameters in each as `configure_thor` makes: torch's own checks are content."""

    def configure_optimizers(self) -> Any:
        groups = super().configure_optimizers()["optimizer"].param_groups
        return torch.optim.AdamW([{"params": group["params"]} for group in groups])


class Wider(Boring):
    def __init__(self) -> None:
        super().__init__()
        self.net[7] = nn.Linear(16, 5)


class Deeper(Boring):
    """Takes weights that a checkpoint lacks as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Linear(3, 3))
        self.strict_loading = False


def without_curvature(checkpoint: dict[str, Any]) -> None:
    del checkpoint["callbacks"]["ThorCallback"]


def of_weights(checkpoint: dict[str, Any]) -> None:
    """As ``save_weights_only=True`` writes it."""
    for key in ("callbacks", "optimizer_states", "lr_schedulers"):
        del checkpoint[key]


class Resume(NamedTuple):
    """A fit that goes on from a checkpoint of a `Boring` under `ThorCallback`.

    Args:
        error: what it ends with; None if it goes on.
        words: of the error.
        warning: what is told beside it.
        module: what goes on.
        trainer: with `ThorCallback`, or ``quiet``: without.
        changed: what is done to the checkpoint before.
        strategy: of the trainer.
    """

    error: type[BaseException] | None
    words: str = ""
    warning: str = ""
    module: type[Boring] = Boring
    trainer: Callable[..., L.Trainer] = trainer
    changed: Callable[[dict[str, Any]], None] = lambda checkpoint: None
    strategy: str = "auto"


WEIGHTS = r"weights alone.*module\.load_state_dict.*fit without ckpt_path"
RESUMES = {
    "without the callback": Resume(RuntimeError, r"no curvature.*Add ThorCallback\(\)", trainer=quiet),
    "without the curvature": Resume(None, warning="curvature starts anew", changed=without_curvature),
    "AdamW, with the callback": Resume(ValueError, "found no Thor optimizer.*AdamW", module=AdamW),
    # Torch's own error: nothing of ours is there. The pages say what it means.
    "AdamW, without the callback": Resume(KeyError, "step", module=AdamW, trainer=quiet),
    "another width": Resume(RuntimeError, r"size mismatch for net\.7\.weight.*\[3, 16\].*\[5, 16\]", module=Wider),
    "a further layer": Resume(ValueError, r"another architecture.*net\.8", module=Deeper),
    "weights alone": Resume(KeyError, "contains only the model", warning=WEIGHTS, changed=of_weights),
    "weights alone, thor_ddp": Resume(ValueError, WEIGHTS, changed=of_weights, strategy="thor_ddp"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saved")
    found = trainer(folder, max_epochs=1)
    found.fit(Boring())
    found.save_checkpoint(folder / "some.ckpt")
    checkpoint: dict[str, Any] = torch.load(folder / "some.ckpt", weights_only=True)
    return checkpoint


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize("name", RESUMES)
def test_it_is_refused_or_goes_on_as_the_pages_say(
    name: str, saved: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    case, path = RESUMES[name], tmp_path / "some.ckpt"
    checkpoint = {**saved, "callbacks": dict(saved["callbacks"])}
    case.changed(checkpoint)
    torch.save(checkpoint, path)
    found, module = case.trainer(tmp_path, strategy=case.strategy), case.module()
    if case.error is None:
        found.fit(module, ckpt_path=path)
        assert found.global_step == 2 * saved["global_step"]
    else:
        with pytest.raises(case.error, match=f"(?s){case.words}"):
            found.fit(module, ckpt_path=path)
        assert found.global_step <= saved["global_step"]
    told = [str(one.message) for one in recwarn if "THOR" in str(one.message) or "checkpoint" in str(one.message)]
    assert not case.warning or any(case.warning.split(".*")[0] in one for one in told), told


def test_save_weights_only_writes_what_these_cases_take_it_to(saved: dict[str, Any], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    trainer(tmp_path, ThorCallback(summary=False), saver, max_epochs=1, enable_checkpointing=True).fit(Boring())
    expected = dict(saved)
    of_weights(expected)
    assert torch.load(tmp_path / "weights.ckpt", weights_only=True).keys() == expected.keys()
