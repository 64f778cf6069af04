"""Laws of checkpoints: nothing is lost, and what does not fit is told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lightning_thor import ThorCallback
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, quiet, trainer


def saved(folder: Path, module: Boring | None = None, epochs: int = 2, **options: Any) -> tuple[L.Trainer, Path]:
    """A fit of some epochs with a checkpoint at the end of each."""
    each = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    found = trainer(folder, each, enable_checkpointing=True, max_epochs=epochs, **options)
    found.fit(Boring(nesterov=True, weight_decay=0.1) if module is None else module)
    return found, folder / "epoch=0.ckpt"


@pytest.mark.parametrize(("scaled", "mode"), [(False, "natural"), (True, "natural"), (True, "polar"), (True, "adam")])
@pytest.mark.parametrize("every", [3, 4])
def test_a_resumed_fit_is_bitwise_the_unbroken_one(tmp_path: Path, scaled: bool, mode: str, every: int) -> None:
    """4 steps an epoch: with 3 the resumed run goes on with inverses that no new batch can give back."""

    def options() -> dict[str, Any]:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=3))
        return {"max_epochs": 3} | ({"plugins": [plugin]} if scaled else {})

    def callback() -> ThorCallback:
        return ThorCallback(update_every_n_steps=every, summary=False)

    each = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    unbroken = trainer(tmp_path, callback(), each, enable_checkpointing=True, **options())
    unbroken.fit(Boring(nesterov=True, weight_decay=0.1, mode=mode))
    resumed = trainer(tmp_path, callback(), **options())
    resumed.fit(
        Boring(nesterov=True, weight_decay=0.1, mode=mode), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
    )
    assert_bitwise(everything(resumed), everything(unbroken))


@pytest.mark.parametrize(
    ("before", "after"), [("natural", "polar"), ("polar", "natural"), ("polar", "adam"), ("adam", "natural")]
)
def test_a_fit_of_one_mode_does_not_go_on_in_the_other(tmp_path: Path, before: str, after: str) -> None:
    _, path = saved(tmp_path, Boring(mode=before), epochs=1)
    with pytest.raises(ValueError, match=f"of mode='{before}', this one of mode='{after}'"):
        trainer(tmp_path).fit(Boring(mode=after), ckpt_path=path, weights_only=True)


def test_a_checkpoint_holds_plain_types_and_tensors_only(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    state = torch.load(path, weights_only=True)["callbacks"]["ThorCallback"]["curvature"]
    assert state["step"] == 4
    assert set(state["layers"]) == {"net.0", "net.2", "net.4", "net.5", "net.7"}
    assert state["layers"]["net.4"]["A_inverse"].shape == (1, 1, 36, 36)


def test_a_subclass_keeps_the_state(tmp_path: Path) -> None:
    class Mine(ThorCallback):
        pass

    _, path = saved(tmp_path)
    found = trainer(tmp_path, Mine(update_every_n_steps=2, summary=False), max_epochs=1)
    found.fit(Boring(nesterov=True, weight_decay=0.1), ckpt_path=path)
    curvature = callback_of(found).curvature
    assert curvature.step == 4


def test_a_checkpoint_without_curvature_is_told_and_starts_anew(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["ThorCallback"]
    torch.save(checkpoint, path)
    found = trainer(tmp_path)
    with pytest.warns(UserWarning, match="saved without ThorCallback's curvature.*curvature starts anew"):
        found.fit(Boring(nesterov=True, weight_decay=0.1), ckpt_path=path)
    curvature = callback_of(found).curvature
    assert curvature.step == 4  # of this fit alone: epoch 1


def test_a_checkpoint_whose_curvature_is_none_is_told(tmp_path: Path) -> None:
    """As the parent of spawned processes saves it, which never had one."""
    _, path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["ThorCallback"]["curvature"] = None
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="saved without ThorCallback's curvature"):
        trainer(tmp_path).fit(Boring(nesterov=True, weight_decay=0.1), ckpt_path=path)


def test_a_checkpoint_of_another_optimizer_says_how_to_go_on_with_its_weights(tmp_path: Path) -> None:
    class Adam(Boring):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    each = ModelCheckpoint(tmp_path, filename="adam")
    quiet(tmp_path, each, enable_checkpointing=True, max_epochs=1).fit(Adam())
    path = tmp_path / "adam.ckpt"
    with pytest.raises(ValueError, match=r"of another optimizer than Thor \(.*betas.*fit without ckpt_path"):
        trainer(tmp_path).fit(Boring(), ckpt_path=path, weights_only=True)
    module = Boring()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    trainer(tmp_path).fit(module)
    # And back: with Thor's weights.
    quiet(tmp_path, max_epochs=1).fit(Adam.load_from_checkpoint(saved(tmp_path, epochs=1)[1]))


def test_a_folder_of_shards_is_refused_by_strategies_that_read_files(tmp_path: Path, clean_process: None) -> None:
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    (folder / "meta.pt").touch()
    advice = r'is a folder of shards, which only strategy="thor_fsdp2" reads.*save_distributed_checkpoint=False'
    with pytest.raises(IsADirectoryError, match=advice):
        trainer(tmp_path).fit(Boring(), ckpt_path=folder)
    with pytest.raises(ValueError, match=advice):
        trainer(tmp_path, strategy="thor_ddp").fit(Boring(), ckpt_path=folder)


def test_a_checkpoint_of_weights_alone_is_refused_in_a_fit_only(tmp_path: Path, clean_process: None) -> None:
    path = tmp_path / "weights.ckpt"
    found = trainer(tmp_path, strategy="thor_ddp", max_epochs=1)
    found.fit(Boring())
    found.save_checkpoint(path, weights_only=True)
    with pytest.raises(ValueError, match=r"holds weights alone.*module.load_state_dict.*fit without ckpt_path"):
        trainer(tmp_path, strategy="thor_ddp").fit(Boring(), ckpt_path=path)
    trainer(tmp_path, strategy="thor_ddp").validate(Boring(), ckpt_path=path, verbose=False)


def test_old_trouble_is_not_told_again(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["ThorCallback"]["curvature"]["failed_inversions"].fill_(7)
    torch.save(checkpoint, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "THOR kept old curvature")
        trainer(tmp_path).fit(Boring(nesterov=True, weight_decay=0.1), ckpt_path=path)


@pytest.mark.parametrize("option", [{"block_size": 8}, {"statistics": "thor"}, {"fused": {"net.4": 4}}])
def test_a_checkpoint_of_other_blocks_is_told(tmp_path: Path, option: dict[str, Any]) -> None:
    _, path = saved(tmp_path)
    found = trainer(tmp_path, ThorCallback(**option, summary=False))
    (name,) = option
    with pytest.raises(ValueError, match=f"another architecture or of other block sizes.*Use the model.*{name}"):
        found.fit(Boring(nesterov=True, weight_decay=0.1), ckpt_path=path)


def test_validate_test_and_predict_take_checkpoints_and_leave_a_later_fit_alone(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    found = trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(THOR|Thor|curvature)")
        found.validate(Boring(), ckpt_path=path, verbose=False)
        found.test(Boring(), Boring().data(), ckpt_path=path, verbose=False)
        found.predict(Boring(), Boring().data(), ckpt_path=path)
    found.fit(Boring())
    assert_bitwise(everything(found), everything(untouched(tmp_path)))


def untouched(folder: Path) -> L.Trainer:
    found = trainer(folder)
    found.fit(Boring())
    return found


def test_a_checkpoint_after_fit_still_holds_the_curvature(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    found.fit(Boring())
    found.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["ThorCallback"]["curvature"]
    assert state["step"] == 8
