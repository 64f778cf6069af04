"""Under the Trainer of the separate package pytorch_lightning a fit is bitwise the one under lightning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_thor import ThorCallback, configure_thor
from tests.helpers.boring import assert_bitwise

pl = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed: pip install '.[dev]'")
from lightning_thor.trainer import pytorch_lightning as separate  # noqa: E402 - it imports what may be missing


def module_of(package: Any) -> Any:
    class Module(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return configure_thor(self, lr=0.01)

        def train_dataloader(self) -> Any:
            generator = torch.Generator().manual_seed(2)
            x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
            y = torch.randint(3, (32,), generator=generator)
            ranks, rank = self.trainer.world_size, self.trainer.global_rank
            return DataLoader(TensorDataset(x[rank::ranks], y[rank::ranks]), batch_size=8 // ranks)

    return Module()


def fit(
    package: Any, folder: Path, *, callback: Any = None, epochs: int = 2, ckpt_path: Any = None, **options: Any
) -> Any:
    callback = callback or ThorCallback(update_every_n_steps=2, summary=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"use_distributed_sampler": False}
    trainer = package.Trainer(
        callbacks=[callback], max_epochs=epochs, accelerator="cpu", default_root_dir=folder,
        **{"devices": 1, "enable_checkpointing": False, **quiet, **options},
    )  # fmt: skip
    trainer.fit(module_of(package), ckpt_path=ckpt_path)
    return trainer


def weights(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.lightning_module.parameters()]


@pytest.mark.parametrize("block_size", [4, "auto"])
@pytest.mark.parametrize("callback", [ThorCallback, separate.ThorCallback])
def test_a_fit_on_one_device_is_bitwise_lightnings(tmp_path: Path, callback: Any, block_size: Any) -> None:
    found = fit(pl, tmp_path, callback=callback(block_size=block_size, summary=False))
    (used,) = (one for one in found.callbacks if isinstance(one, ThorCallback))
    expected = fit(lightning.pytorch, tmp_path, callback=ThorCallback(block_size=used.block_size, summary=False))
    assert_bitwise(weights(found), weights(expected))
    assert found.optimizers[0].preconditioner is None  # taken away when fit ended


def test_it_prints_what_is_preconditioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(pl, tmp_path, callback=ThorCallback(), enable_model_summary=True)
    assert "3 layers preconditioned" in capsys.readouterr().out


def test_a_resumed_fit_is_bitwise_the_unbroken_one(tmp_path: Path) -> None:
    fit(pl, tmp_path, epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    resumed = fit(pl, tmp_path, epochs=3, ckpt_path=tmp_path / "one.ckpt")
    assert_bitwise(weights(resumed), weights(fit(pl, tmp_path, epochs=3)))


@pytest.mark.parametrize("strategy", ["ddp_fork", "thor_ddp_fork"])
def test_two_ranks_are_one_rank(tmp_path: Path, clean_process: None, strategy: str) -> None:
    two = fit(pl, tmp_path, strategy=strategy, devices=2)
    torch.testing.assert_close(weights(two), weights(fit(pl, tmp_path)), rtol=1e-9, atol=1e-12)


def test_every_form_of_ddp_has_its_name_there() -> None:
    registry = pl.strategies.StrategyRegistry
    for form in [name for name in registry if name == "ddp" or name.startswith("ddp_")]:
        assert registry[f"thor_{form}"]["strategy"] is separate.ThorDDPStrategy
        assert registry[f"thor_{form}"]["init_params"] == registry[form]["init_params"]


def test_a_strategy_that_is_not_supported_is_told(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    trainer._accelerator_connector.strategy = object.__new__(pl.strategies.FSDPStrategy)
    with pytest.raises(ValueError, match=r'does not support FSDPStrategy: .*"thor_fsdp2"'):
        ThorCallback().setup(trainer, module_of(pl), "fit")


def test_its_command_line_takes_the_callback_and_the_optimizer(tmp_path: Path) -> None:
    from pytorch_lightning.cli import LightningCLI

    Module = type(module_of(pl))
    del Module.configure_optimizers  # LightningCLI has its own
    arguments = ["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--optimizer=lightning_thor.Thor"]
    arguments += ["--optimizer.mode=polar", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    arguments += ["--trainer.callbacks=lightning_thor.trainer.pytorch_lightning.ThorCallback"]
    arguments += ["--trainer.callbacks.damping=0.5", "--trainer.enable_checkpointing=false"]
    cli = LightningCLI(Module, args=arguments, save_config_callback=None)
    (used,) = (one for one in cli.trainer.callbacks if isinstance(one, ThorCallback))
    assert used.curvature is not None
    assert (used.curvature.damping, used.curvature.step) == (0.5, 4)
