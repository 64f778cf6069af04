"""The published recipes: their numbers, their steps under a Trainer, and that they are nn.thor's."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.resnet import ResNet50
from lightning_thor.mindspore.optimizer import thor
from lightning_thor.recipes import Recipe, ResNet50Damping, ResNet50LearningRate, bert_large, resnet50_imagenet
from lightning_thor.schedules import PerStepLR, Polynomial

EXAMPLES = Path(__file__).parents[1] / "examples"

# ── the numbers, worked out from the published formulas in decimal arithmetic ──

RESNET50 = [  # epoch, GPU: learning rate and damping, Ascend: learning rate and damping
    (0.1, 5.615858320e-2, 2.330882267e-2, 5.758415068e-2, 2.979298929e-2),
    (10, 1.871627598e-2, 1.2820115e-2, 2.470609872e-2, 1.50108e-2),
    (25, 1.811375472e-3, 5.182216250e-3, 4.284804692e-3, 5.312851956e-3),
    (39, 3.065009298e-5, 2.225175324e-3, 1.263352767e-4, 2.015224023e-3),
    (39.9, 2.005559595e-5, 2.107471217e-3, 9.631115594e-5, 1.893471464e-3),
    (40, 1.908815538e-5, 2.094783491e-3, 4.667191404e-5, 1.880405835e-3),
    (45, 6.095877376e-7, 1.548865405e-3, 6.426160277e-6, 1.330126304e-3),
]


@pytest.mark.parametrize(("epoch", "gpu_lr", "gpu_damping", "ascend_lr", "ascend_damping"), RESNET50)
def test_resnet_50_has_the_published_numbers_at_the_end_of_a_step(
    epoch: float, gpu_lr: float, gpu_damping: float, ascend_lr: float, ascend_damping: float
) -> None:
    step = round(epoch * 5000) - 1
    gpu, ascend = resnet50_imagenet(5000), resnet50_imagenet(5000, "ascend")
    assert gpu.learning_rate(step) == pytest.approx(gpu_lr, rel=1e-9)
    assert gpu.damping(step) == pytest.approx(gpu_damping, rel=1e-9)
    assert ascend.learning_rate(step) == pytest.approx(ascend_lr, rel=1e-9)
    assert ascend.damping(step) == pytest.approx(ascend_damping, rel=1e-9)


@pytest.mark.parametrize(
    ("step", "lr", "damping"),
    [
        (0, 6.464e-3, 7.035e-3),
        (3_000, 5.23603e-3, 4.6160074e-3),
        (15_000, 1.61675e-3, 4.40625e-4),
        (30_000, 1e-6, 1e-6),
        (50_000, 1e-6, 1e-6),
    ],
)
def test_bert_large_has_the_published_numbers(step: int, lr: float, damping: float) -> None:
    assert bert_large().learning_rate(step) == pytest.approx(lr, rel=1e-9)
    assert bert_large().damping(step) == pytest.approx(damping, rel=1e-9)


@pytest.mark.parametrize("recipe", [resnet50_imagenet(100), resnet50_imagenet(100, "ascend"), bert_large(5_000)])
def test_rates_and_dampings_only_fall_and_dampings_stay_above_zero(recipe: Recipe) -> None:
    for schedule in (recipe.learning_rate, recipe.damping):
        values = [schedule(step) for step in range(6_000)]
        assert values == sorted(values, reverse=True)
        assert values[0] > values[2_500] > values[4_900]
    assert recipe.damping(10**6) > 0


@pytest.mark.parametrize(("variant", "end"), [("gpu", 50), ("ascend", 53)])
def test_after_its_last_epoch_the_learning_rate_of_resnet_50_is_zero(variant: Any, end: int) -> None:
    rate = ResNet50LearningRate(10, variant)
    assert rate(10 * end - 2) > 0.0
    assert rate(10 * end - 1) == rate(10 * end + 1000) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet50LearningRate(0), "steps_per_epoch must be greater than 0, got 0"),
        (lambda: ResNet50Damping(-1), "steps_per_epoch must be greater than 0, got -1"),
        (lambda: ResNet50Damping(10, "cpu"), "variant must be one of gpu, ascend, got 'cpu'"),
        (lambda: resnet50_imagenet(10, "GPU"), "variant must be one of gpu, ascend, got 'GPU'"),
        (lambda: bert_large(0), "n_steps must be greater than 0, got 0"),
    ],
)
def test_what_a_recipe_does_not_have_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("recipe", [resnet50_imagenet(10, "ascend"), bert_large()])
def test_a_recipe_is_pickled(recipe: Recipe) -> None:
    assert pickle.loads(pickle.dumps(recipe)) == recipe


# ── a recipe's fit is nn.thor's ──


class Fitted(L.LightningModule):
    """``net`` with the recipe's optimizer and scheduler; it notes the learning rate of each step."""

    def __init__(self, net: nn.Module, recipe: Recipe, lr: float = 1.0) -> None:
        super().__init__()
        self.net, self.recipe, self.lr = net, recipe, lr
        self.rates: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, *batch, self.recipe.label_smoothing)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        return self.recipe.configure_optimizers(self, lr=self.lr)


def loss_of(net: nn.Module, x: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(net(x).flatten(0, -2), y.flatten(), label_smoothing=label_smoothing)


def trainer_in(folder: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **{**quiet, **options})


def images(steps: int) -> DataLoader[Any]:
    batches: Any = [(torch.randn(4, 3, 32, 32), torch.randint(5, (4,))) for _ in range(steps)]
    return DataLoader(batches, batch_size=None)


def texts(steps: int) -> DataLoader[Any]:
    batches: Any = [(torch.randint(20, (4, 6)), torch.randint(20, (4, 6))) for _ in range(steps)]
    return DataLoader(batches, batch_size=None)


def text_net() -> nn.Module:
    # 140 wide: more than one block, the last one smaller.
    return nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 140), nn.GELU(), nn.Linear(140, 20))


@pytest.mark.parametrize(
    ("recipe", "net", "data", "lr"),
    [
        (resnet50_imagenet(2), lambda: ResNet50(width=8, num_classes=5), images, 0.01),
        (bert_large(10), text_net, texts, 1.0),
    ],
    ids=["resnet50", "bert"],
)
def test_a_fit_by_the_recipe_is_a_loop_with_nn_thor_of_ascend(
    recipe: Recipe, net: Callable[[], nn.Module], data: Callable[[int], Any], lr: float, tmp_path: Path
) -> None:
    batches = data(4)
    torch.manual_seed(1)
    fitted = Fitted(net(), recipe, lr)
    # Three steps with one curvature, the fourth refreshes.
    callback = recipe.callback(update_every_n_steps=3, summary=False)
    trainer_in(tmp_path, max_epochs=1, callbacks=[callback]).fit(fitted, batches)

    torch.manual_seed(1)
    looped = net()
    weights = {name for name, p in looped.named_parameters() if p.dim() > 1}
    optimizer = thor(
        looped,
        learning_rate=[recipe.learning_rate(step) * lr for step in range(4)],
        damping=[recipe.damping(step) for step in range(4)],
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        loss_scale=recipe.loss_scale,
        batch_size=4,
        decay_filter=lambda p: p.name in weights,
        split_indices=recipe.split_indices,
        enable_clip_grad=recipe.clip_norm is not None,
        frequency=3,
        variant="ascend",
    )
    for x, y in batches:
        (loss_of(looped, x, y, recipe.label_smoothing) * recipe.loss_scale).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(1)
    for (name, got), expected, start in zip(
        fitted.net.named_parameters(), looped.parameters(), net().parameters(), strict=True
    ):
        moved = (expected - start).abs().max()
        assert (got - expected).abs().max() <= 1e-3 * moved, name


def test_norms_take_plain_momentum_as_in_nn_thor() -> None:
    from lightning_thor import Curvature

    net = ResNet50(width=4)
    curvature = Curvature(net, statistics="thor")
    assert len(curvature.layers) == 53 + 1
    assert {type(net.get_submodule(name)) for name in curvature.left_out} == {nn.BatchNorm2d}


# ── a schedule as a torch scheduler ──


def test_every_group_keeps_its_own_factor() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=1.0)
    scheduler = PerStepLR(optimizer, Polynomial(0.4, end=0.2, n_steps=2))
    seen = []
    for _ in range(4):
        seen.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert seen == [pytest.approx([rate, rate / 2]) for rate in (0.4, 0.3, 0.2, 0.2)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_has_the_learning_rate_of_each_of_its_steps(accumulate: int, tmp_path: Path) -> None:
    recipe = resnet50_imagenet(3)
    fitted = Fitted(text_net(), recipe)
    trainer = trainer_in(
        tmp_path, max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[recipe.callback(summary=False)]
    )
    trainer.fit(fitted, texts(4))
    assert fitted.rates == [recipe.learning_rate(step) for step in range(8 // accumulate)]


def test_a_resumed_fit_goes_on_with_the_learning_rate_of_its_step(tmp_path: Path) -> None:
    recipe = resnet50_imagenet(4)
    batches = texts(4)
    first, second = Fitted(text_net(), recipe), Fitted(text_net(), recipe)
    trainer = trainer_in(tmp_path, max_epochs=1, callbacks=[recipe.callback(summary=False)])
    trainer.fit(first, batches)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["lr_schedulers"][0]
    assert "schedule" not in state
    trainer = trainer_in(tmp_path, max_epochs=2, callbacks=[recipe.callback(summary=False)])
    trainer.fit(second, batches, ckpt_path=tmp_path / "end.ckpt")
    assert first.rates + second.rates == [recipe.learning_rate(step) for step in range(8)]


def test_a_schedule_of_steps_that_is_stepped_once_an_epoch_is_warned_of(tmp_path: Path) -> None:
    class PerEpoch(Fitted):
        def configure_optimizers(self) -> Any:
            optimizers = super().configure_optimizers()
            return [optimizers["optimizer"]], [optimizers["lr_scheduler"]["scheduler"]]

    recipe = resnet50_imagenet(3)
    trainer = trainer_in(tmp_path, max_epochs=1, callbacks=[recipe.callback(summary=False)])
    with pytest.warns(UserWarning, match="PerStepLR is stepped once an epoch here"):
        trainer.fit(PerEpoch(text_net(), recipe), texts(1))


# ── the YAML files say what the recipes say ──


def built(node: Any, *first: Any) -> Any:
    """What a ``class_path`` of a YAML file stands for."""
    if not isinstance(node, dict) or "class_path" not in node:
        return node
    module, name = node["class_path"].rsplit(".", 1)
    arguments = {key: built(value) for key, value in node.get("init_args", {}).items()}
    return getattr(importlib.import_module(module), name)(*first, **arguments)


@pytest.mark.parametrize(
    ("file", "recipe"), [("imagenet_resnet50_thor", resnet50_imagenet(5004)), ("bert_pretraining", bert_large())]
)
def test_the_yaml_file_says_what_the_recipe_says(file: str, recipe: Recipe) -> None:
    config = yaml.safe_load((EXAMPLES / f"{file}.yaml").read_text(encoding="utf-8"))
    trainer = config["trainer"]
    assert (trainer.get("max_epochs"), trainer.get("max_steps", -1)) == (recipe.max_epochs, recipe.max_steps)
    assert built(trainer["callbacks"][-1])._options == recipe.callback()._options
    assert config["data"]["init_args"]["batch_size"] * 8 == recipe.batch_size
    assert config["model"]["init_args"].get("label_smoothing", 0.0) == recipe.label_smoothing
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = built(config["optimizer"], [parameter])
    expected = recipe.configure_optimizers(nn.ParameterList([parameter]))["optimizer"]
    options = [
        {key: value for key, value in o.param_groups[0].items() if key != "params"} for o in (optimizer, expected)
    ]
    options[1].pop("initial_lr")
    options[1]["lr"] = 1.0  # before the schedule, which the next line compares
    assert options[0] == options[1]
    assert built(config["lr_scheduler"], optimizer).schedule == recipe.learning_rate
