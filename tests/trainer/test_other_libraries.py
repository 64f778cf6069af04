"""What docs/other_libraries.md writes of other libraries trains, where they are installed: they bring their own torch,
so no extra of this package has them (``pip install --no-deps`` each, with what its import then asks for)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_thor import Thor, ThorCallback

WHY = "is not installed: pip install --no-deps "


def fitted(callback: ThorCallback) -> int:
    """The steps of a fit that had curvature in all of them."""
    assert callback.curvature is not None
    assert len(callback.curvature.layers) > 1
    assert int(callback.curvature.factors.updates.min()) > 0
    return callback.curvature.step


def series(pandas: Any) -> Any:
    time = range(40)
    return pandas.DataFrame(
        {"time": time, "group": "a", "value": [math.sin(t / 3) for t in time], "other": [float(t % 5) for t in time]}
    )


def test_pytorch_tabular(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_tabular", reason=f"pytorch-tabular {WHY}pytorch-tabular omegaconf pandas scikit-base")
    monkeypatch.chdir(tmp_path)
    import pandas
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    callback = ThorCallback(summary=False)
    model = TabularModel(
        data_config=DataConfig(target=["value"], continuous_cols=["time", "other"]),
        model_config=CategoryEmbeddingModelConfig(task="regression", layers="8-8", learning_rate=3e-3),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            max_epochs=2, batch_size=8, accelerator="cpu", checkpoints=None, early_stopping=None, load_best=False,
            progress_bar="none",
        ),
        verbose=False,
    )  # fmt: skip
    model.fit(train=series(pandas), optimizer=Thor, optimizer_params={"mode": "adam"}, callbacks=[callback])
    assert fitted(callback) == 8


def test_pytorch_forecasting(tmp_path: Path) -> None:
    reason = f"pytorch-forecasting {WHY}pytorch-forecasting pandas scikit-base"
    pytest.importorskip("pytorch_forecasting", reason=reason)
    import lightning as L
    import pandas
    from pytorch_forecasting import NBeats, TimeSeriesDataSet

    data = TimeSeriesDataSet(
        series(pandas), time_idx="time", target="value", group_ids=["group"], time_varying_unknown_reals=["value"],
        max_encoder_length=8, min_encoder_length=8, max_prediction_length=2, min_prediction_length=2,
    )  # fmt: skip
    callback = ThorCallback(summary=False)
    network = NBeats.from_dataset(
        data, optimizer=Thor, optimizer_params={}, learning_rate=3e-3, widths=[8], num_blocks=[1],
        num_block_layers=[2], backcast_loss_ratio=0.1, stack_types=["generic"], expansion_coefficient_lengths=[4],
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(network, data.to_dataloader(batch_size=8))
    assert fitted(callback) == trainer.global_step > 0


def test_pina(tmp_path: Path) -> None:
    pytest.importorskip("pina", reason=f"PINA {WHY}pina-mathlab torch_geometric xxhash requests")
    from pina import Trainer
    from pina.model import FeedForward
    from pina.optim import TorchOptimizer
    from pina.problem.zoo import Poisson2DSquareProblem
    from pina.solver import PINN

    problem = Poisson2DSquareProblem()
    problem.discretise_domain(20, "random")
    callback = ThorCallback(summary=False)
    model = FeedForward(input_dimensions=2, output_dimensions=1, layers=[8, 8], func=torch.nn.Tanh)
    solver = PINN(problem, model, optimizer=TorchOptimizer(Thor, lr=3e-3))
    trainer = Trainer(
        solver, max_epochs=3, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.train()
    assert fitted(callback) == 3
