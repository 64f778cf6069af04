"""Laws of options that are functions: a configuration file cannot make a training call any function there is."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse._util import import_object
from lightning.pytorch.cli import LightningCLI

import lightning_thor
from lightning_thor import Curvature, ThorCallback
from lightning_thor.schedules import GrowingInterval, PerStepLR, Polynomial
from lightning_thor.trainer import cli
from tests.helpers import callables
from tests.helpers.boring import Boring, callback_of
from tests.helpers.commands import TINY_DIGITS, only, run

# jsonargparse, about how LightningCLI calls it.
pytestmark = pytest.mark.filterwarnings(r"ignore:(.|\n)*(deprecated in v4|JsonargparseDeprecationWarning)")

OWN = "tests.helpers.callables.Own"
REFUSED = [
    "os._exit",
    "os.system",
    "builtins.exec",
    "tests.helpers.callables.function",
    "tests.helpers.callables.a_lambda",
    "tests.helpers.callables.a_partial",
    "tests.helpers.callables.an_instance",
    {"class_path": "os.system"},
    {"class_path": "builtins.exec", "init_args": {}},
    {"class_path": "tests.helpers.callables.Plain"},
    {"class_path": "tests.helpers.callables.OfTwo"},
    {"class_path": "tests.helpers.callables.Meta"},
    {"class_path": "functools.partial", "dict_kwargs": {"func": "os.system"}},
    {"class_path": "operator.methodcaller", "dict_kwargs": {"name": "a"}},
    {"class_path": "builtins.type"},
]
ALLOWED = "a class with __call__(step), given by class_path, such as lightning_thor.schedules.Polynomial"
CALLBACKS = "--trainer.callbacks=lightning_thor.ThorCallback"
SCHEDULER = "--lr_scheduler=lightning_thor.schedules.PerStepLR"
HELP = {
    "lightning_thor.Curvature": "--optimizer=lightning_thor.Thor --optimizer.preconditioner.help",
    "lightning_thor.Thor": "--optimizer.help",
    "lightning_thor.ThorCallback": "--trainer.callbacks.help",
    "lightning_thor.ThorDDPStrategy": "--trainer.strategy.help",
    "lightning_thor.ThorModelParallelStrategy": "--trainer.strategy.help",
    "lightning_thor.ThorMonitor": "--trainer.callbacks.help",
    "lightning_thor.recipes.ResNet50Damping": f"{CALLBACKS} --trainer.callbacks.damping.help",
    "lightning_thor.recipes.ResNet50LearningRate": f"{SCHEDULER} --lr_scheduler.schedule.help",
    "lightning_thor.schedules.Exponential": f"{CALLBACKS} --trainer.callbacks.damping.help",
    "lightning_thor.schedules.GrowingInterval": f"{CALLBACKS} --trainer.callbacks.update_every_n_steps.help",
    "lightning_thor.schedules.PerStepLR": "--lr_scheduler.help",
    "lightning_thor.schedules.Polynomial": f"{SCHEDULER} --lr_scheduler.schedule.help",
}
"""How the command is asked to describe the options of each class that a configuration file can name."""
FILLED_IN = {"params", "optimizer", "model"}
"""Arguments that no user writes: LightningCLI gives them, or ThorCallback does."""
OPTIONS = ("damping", "update_every_n_steps", "schedule")


@pytest.mark.parametrize(("address", "options"), HELP.items(), ids=HELP)
def test_the_commands_help_describes_every_option_of_every_class(
    address: str, options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-thor"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    only(monkeypatch, "fit")
    with pytest.raises(SystemExit) as ended:
        cli.run(["fit", *options.split(), address])
    assert ended.value.code == 0
    # "  --trainer.callbacks.damping DAMPING   words (type: float, default: 1.0)", over several lines.
    entries = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    described: dict[str, str] = {}
    for entry in entries:
        if option := re.match(r"--[\w.]*?(\w+)(?: |,|$)(?!\[CLASS)", entry):
            words = re.sub(r"\((required, )?type: .*|^--\S+( [A-Z_]+|\s+\{.*?\})?", "", " ".join(entry.split()))
            described[option[1]] = words.strip()
    options_of = inspect.signature(import_object(address)).parameters.values()
    expected = {one.name for one in options_of if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    expected -= FILLED_IN
    assert expected - described.keys() == set()
    assert {name for name in expected if len(described[name].split()) < 3} == set()


def configuration(option: str, value: Any) -> dict[str, Any]:
    """Of a short training that has this option."""
    callback: dict[str, Any] = {"class_path": "lightning_thor.ThorCallback", "init_args": {"summary": False}}
    config: dict[str, Any] = {
        "trainer": {
            "callbacks": [callback],
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 3,
            "limit_val_batches": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "optimizer": {"class_path": "lightning_thor.Thor"},
    }
    if option == "schedule":
        config["lr_scheduler"] = {"class_path": "lightning_thor.schedules.PerStepLR", "init_args": {option: value}}
    else:
        callback["init_args"][option] = value
    return config


class Plainly(Boring):
    """Whose optimizer LightningCLI makes."""

    def configure_optimizers(self) -> Any:
        raise AssertionError("LightningCLI puts its own here")


def plainly(monkeypatch: pytest.MonkeyPatch, folder: Path, config: dict[str, Any], *arguments: str) -> LightningCLI:
    """Lightning's own command line, with nothing of ours."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    only(monkeypatch, "fit")
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return LightningCLI(Plainly, args=["fit", "--config=config.yaml", *arguments], save_config_callback=None)


def assert_told(output: str) -> None:
    assert ALLOWED in " ".join(output.split())


@pytest.mark.parametrize("value", REFUSED, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_configuration_file_cannot_name_any_function(
    option: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        plainly(monkeypatch, tmp_path, configuration(option, value))
    assert ended.value.code == 2
    assert_told(capsys.readouterr().err)
    assert callables.CALLED == []


@pytest.fixture
def one_of_this_name() -> Iterator[None]:
    """Rename pytorch_lightning's callback, which a test of it has imported: a short name stands for one class."""
    others = [one for one in lightning_thor.ThorCallback.__subclasses__() if one.__name__ == "ThorCallback"]
    for one in others:
        one.__name__ = one.__qualname__ = "Other"
    yield
    for one in others:
        one.__name__ = one.__qualname__ = "ThorCallback"


@pytest.mark.usefixtures("one_of_this_name")
@pytest.mark.parametrize("callback", ["ThorCallback", "lightning_thor.ThorCallback"])
@pytest.mark.parametrize("option", ["damping", "update_every_n_steps"])
@pytest.mark.parametrize("value", ["os.system", "builtins.exec", "tests.helpers.callables.a_partial"])
def test_nor_can_an_argument_of_the_command(
    callback: str,
    option: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = (f"--trainer.callbacks+={callback}", f"--trainer.callbacks.{option}={value}")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path, "fit", *TINY_DIGITS, *options)
    assert ended.value.code == 2
    assert_told(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "value", "is_refused"),
    [
        ("damping", "os.system", True),
        ("damping", {"class_path": "tests.helpers.callables.Plain"}, True),
        ("damping", OWN, False),
        ("update_every_n_steps", "os.system", True),
        ("update_every_n_steps", "tests.helpers.callables.OwnInterval", False),
        ("loss_multiplier", "os.getpid", True),
        ("loss_multiplier", None, False),
    ],
    ids=str,
)
def test_nor_of_a_curvature_that_an_optimizer_is_given(
    option: str, value: Any, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration("damping", 0.2)
    model = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}}
    curvature = {"class_path": "lightning_thor.Curvature", "init_args": {"model": model, option: value}}
    config["optimizer"]["init_args"] = {"preconditioner": curvature}
    # What is sound comes as far as the callback, which wants to make the curvature itself.
    with pytest.raises(SystemExit if is_refused else ValueError, match="2" if is_refused else "preconditioner already"):
        plainly(monkeypatch, tmp_path, config)


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [
        ("damping", 0.5, 0.5),
        ("damping", OWN, 0.25),
        ("damping", {"class_path": OWN, "init_args": {"value": 0.125}}, 0.125),
        (
            "damping",
            {
                "class_path": "lightning_thor.schedules.Polynomial",
                "init_args": {"start": 1.0, "end": 0.5, "n_steps": 3},
            },
            0.5,
        ),
        ("update_every_n_steps", 3, 3),
        ("update_every_n_steps", "tests.helpers.callables.OwnInterval", 2),
        (
            "update_every_n_steps",
            {"class_path": "lightning_thor.schedules.GrowingInterval", "init_args": {"start": 1, "end": 4}},
            1,
        ),
        ("schedule", {"class_path": OWN, "init_args": {"value": 0.5}}, 0.5),
    ],
    ids=str,
)
def test_numbers_schedules_of_the_package_and_classes_of_ones_own_are_taken(
    option: str, value: Any, found: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = plainly(monkeypatch, tmp_path, configuration(option, value))
    curvature = callback_of(ran.trainer).curvature
    assert curvature.step == 3
    if option == "schedule":
        (scheduler,) = (config.scheduler for config in ran.trainer.lr_scheduler_configs)
        assert isinstance(scheduler, PerStepLR)
        given: Any = scheduler.schedule
    else:
        given = curvature.damping if option == "damping" else curvature._schedule.every_n_steps
    assert (given(3) if callable(given) else given) == found


def test_from_python_any_function_is_taken() -> None:
    curvature = Curvature(Boring(), damping=lambda step: 0.3, update_every_n_steps=lambda step: 2)
    assert curvature.damping_now() == 0.3
    ThorCallback(damping=Polynomial(1.0, end=0.1, n_steps=3), update_every_n_steps=GrowingInterval(start=1, end=3))
    ThorCallback(damping=callables.a_partial, update_every_n_steps=callables.a_lambda)
