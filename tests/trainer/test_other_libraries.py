"""What docs/other_libraries.md writes of other libraries trains, where they are installed: they bring their own torch,
so no extra of this package has them (``pip install --no-deps`` each, with what its import then asks for)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_thor import Curvature, Thor, ThorCallback, configure_thor

WHY = "is not installed: pip install --no-deps "
PAGE = Path(__file__).parents[2] / "docs" / "other_libraries.md"


def program(words: str, **names: Any) -> dict[str, Any]:
    """The names that the page's program with these words in it leaves."""
    programs = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names |= {"Curvature": Curvature, "Thor": Thor, "configure_thor": configure_thor, "__name__": __name__}
    exec(next(one for one in programs if words in one), names)
    return names


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batches() -> DataLoader[tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(32, 4), torch.randint(3, (32,))), batch_size=8)


def steps_of(optimizer: Any) -> int:
    """The steps that an optimizer made with curvature in all layers."""
    curvature = optimizer.preconditioner
    assert len(curvature.layers) > 1
    assert int(curvature.factors.updates.min()) > 0
    steps: int = curvature.step
    return steps


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


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason=f"accelerate {WHY}accelerate")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    names = program("accelerator.prepare", accelerator=accelerator, model=network(), data=batches())
    model, optimizer = names["model"], names["optimizer"]

    def epoch() -> list[float]:
        losses = []
        for x, y in names["data"]:
            with accelerator.accumulate(model):
                losses.append(F.cross_entropy(model(x), y))
                accelerator.backward(losses[-1])
                optimizer.step()
                optimizer.zero_grad()
        return [loss.item() for loss in losses]

    epoch()
    accelerator.save_state(tmp_path)
    unbroken = epoch()
    assert steps_of(optimizer.optimizer) == 4
    accelerator.load_state(tmp_path)
    assert epoch() == unbroken


def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=f"transformers {WHY}transformers accelerate")
    pytest.importorskip("accelerate", reason=f"accelerate {WHY}accelerate")
    sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(16, (32, 8))
    options = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=3e-3,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = program("import Trainer")["ThorTrainer"](model, options, train_dataset=data)
    trainer.train()
    assert steps_of(getattr(trainer.optimizer, "optimizer", trainer.optimizer)) == 4


def test_skorch() -> None:
    pytest.importorskip("skorch", reason=f"skorch {WHY}skorch tabulate")
    names = program("from skorch")
    options = {"criterion": nn.CrossEntropyLoss, "train_split": None, "verbose": 0}
    net = names["ThorNet"](network(), lr=3e-3, max_epochs=2, batch_size=8, **options)
    x, y = batches().dataset[:]
    net.fit(x.numpy(), y.numpy())
    assert steps_of(net.optimizer_) == 8


def test_stable_baselines3(tmp_path: Path) -> None:
    reason = f"stable-baselines3 {WHY}stable-baselines3 gymnasium farama-notifications"
    baselines = pytest.importorskip("stable_baselines3", reason=reason)
    policy, options = program("from stable_baselines3")["ThorPolicy"], {"learning_rate": 3e-3, "device": "cpu"}
    model = baselines.PPO(policy, "CartPole-v1", n_steps=16, batch_size=8, n_epochs=2, **options)
    model.learn(16)
    assert steps_of(model.policy.optimizer) == 4


def test_torchrl() -> None:
    pytest.importorskip("torchrl", reason=f"torchrl {WHY}torchrl tensordict pyvers orjson cloudpickle gymnasium")
    from tensordict import TensorDict
    from tensordict.nn import NormalParamExtractor, TensorDictModule
    from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator

    rows = torch.randn(16, 4)
    head = TensorDictModule(
        nn.Sequential(network(), nn.Linear(3, 4), NormalParamExtractor()), in_keys=["observation"],
        out_keys=["loc", "scale"],
    )  # fmt: skip
    actor = ProbabilisticActor(head, in_keys=["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True)
    critic = ValueOperator(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), in_keys=["observation"])
    names = program("from torchrl", actor=actor, critic=critic, nn=nn)
    loss, curvature, optimizer = (names[key] for key in ("loss", "curvature", "optimizer"))
    with torch.no_grad():
        batch = actor(TensorDict({"observation": rows}, [16]))
    batch["advantage"], batch["value_target"] = torch.randn(2, 16, 1).unbind()
    for _ in range(2):
        terms = loss(batch)
        optimizer.zero_grad()
        (terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]).backward()
        optimizer.step()
    assert steps_of(optimizer) == 2
    assert len(curvature.layers) == 5
    torch.testing.assert_close(curvature.factors.blocks(0, "A", "average")[0, 0], rows.T @ rows / 16)


def test_fastai() -> None:
    reason = f"fastai {WHY}fastai fastcore fastprogress fasttransform plum-dispatch pandas"
    pytest.importorskip("fastai.callback.schedule", reason=reason)
    from fastai.basics import DataLoaders, Learner

    model = network()
    thor = program("from fastai", model=model)["thor"]
    learner = Learner(DataLoaders(batches(), batches()), model, loss_func=F.cross_entropy, opt_func=thor)
    learner.fit_one_cycle(2, 3e-3)
    assert steps_of(learner.opt.opt) == 8
