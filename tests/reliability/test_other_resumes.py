"""Laws of checkpoints that meet another training than theirs: refused in words, or gone on with as documented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_thor import ThorCallback, ThorModelParallelStrategy
from tests.helpers.boring import Boring, quiet, trainer
from tests.helpers.distributed_workers import ROWS
from tests.helpers.sharded_workers import Sharded


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


# ── a sharded model ──


class ShardedWider(Sharded):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.net.head = nn.Linear(12, 7)


class ShardedWithoutNorm(Sharded):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.net.norm = nn.Identity()  # type: ignore[assignment]


class ShardedAdamW(Sharded):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


SHARDED = {
    "without the callback": (RuntimeError, r"no curvature.*Add ThorCallback\(\)", Sharded, quiet, {}),
    "AdamW, with the callback": (ValueError, "found no Thor optimizer.*AdamW", ShardedAdamW, trainer, {}),
    "a layer less": (ValueError, r"another architecture.*net\.norm", ShardedWithoutNorm, trainer, {}),
    "another mode": (ValueError, "of mode='natural', this one of mode='polar'", Sharded, trainer, {"mode": "polar"}),
    # Torch's own errors, of a folder no Exception: it names the weight; of a file, loaded one at a time, it does not.
    "another width": (BaseException, r"(?i)size.*(7, 12.*net\.head\.weight|tensor a \(7\))", ShardedWider, trainer, {}),
}
"""What the fit ends with, and in which words; what goes on from the checkpoint of a `Sharded`, with which options."""


def fit_sharded(
    folder: Path, module: Sharded, made: Callable[..., L.Trainer], *, in_a_folder: bool, ckpt_path: Path | None = None
) -> L.Trainer:
    """In this process alone, for an epoch more than the checkpoint has."""
    if dist.is_initialized():
        dist.destroy_process_group()
    strategy = ThorModelParallelStrategy(save_distributed_checkpoint=in_a_folder)
    found = made(folder, strategy=strategy, max_epochs=1 if ckpt_path is None else 2)
    found.fit(module, ckpt_path=ckpt_path)
    return found


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize("in_a_folder", [True, False])
def test_a_checkpoint_of_another_sharded_model_is_refused_too(tmp_path: Path, in_a_folder: bool) -> None:
    float32: dict[str, Any] = {"dtype": torch.float32}
    found = fit_sharded(tmp_path, Sharded((ROWS,), **float32), trainer, in_a_folder=in_a_folder)
    found.save_checkpoint(path := tmp_path / "some.ckpt")
    for error, words, module, made, options in SHARDED.values():
        other = module((ROWS,), **float32, **options)
        with pytest.raises(error, match=f"(?s){words}"):
            fit_sharded(tmp_path, other, made, in_a_folder=in_a_folder, ckpt_path=path)


def test_save_weights_only_writes_what_these_cases_take_it_to(saved: dict[str, Any], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    trainer(tmp_path, ThorCallback(summary=False), saver, max_epochs=1, enable_checkpointing=True).fit(Boring())
    expected = dict(saved)
    of_weights(expected)
    assert torch.load(tmp_path / "weights.ckpt", weights_only=True).keys() == expected.keys()
