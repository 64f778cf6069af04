"""The `lightning-thor` command: what the YAML files of the examples say, run as a user runs it."""

from __future__ import annotations

import io
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from examples.classifier import ImageClassifier
from lightning_thor import ThorCallback, __version__
from lightning_thor.trainer import cli
from tests.helpers.boring import assert_bitwise, callback_of
from tests.helpers.commands import (
    DATA,
    ROOT,
    TINY_DIGITS,
    checkpoint_in,
    command,
    forked_command,
    metrics_in,
    paths,
    run,
)

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch 2.5
    from torch.distributed._composable.fsdp import fully_shard

# jsonargparse, about how LightningCLI calls it.
pytestmark = pytest.mark.filterwarnings(r"ignore:(.|\n)*(deprecated in v4|JsonargparseDeprecationWarning)")

DIGITS = ROOT / "examples" / "digits.yaml"


def options_in_comment(config: Path) -> list[str]:
    """The options that the comment of a YAML file gives for another optimizer, on two lines."""
    lines = config.read_text(encoding="utf-8").splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("#   --trainer.callbacks="))
    return [word for line in lines[first : first + 2] for word in line.split() if word.startswith("--")]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two short epochs of the digits: the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("fitted")
    return folder, forked_command("fit", *TINY_DIGITS, "--trainer.max_epochs=2", folder=folder)


@pytest.mark.slow
def test_fit_prints_the_curvature_and_leaves_a_checkpoint_with_it(fitted: tuple[Path, str]) -> None:
    folder, printed = fitted
    assert "THOR curvature" in printed
    assert "7 layers preconditioned" in printed
    checkpoint = torch.load(checkpoint_in(folder), weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 6)
    assert len(checkpoint["callbacks"]["ThorCallback"]["curvature"]["layers"]) == 7
    assert checkpoint["callbacks"]["ThorCallback"]["curvature"]["step"] == 6
    assert all("momentum_buffer" in state for state in checkpoint["optimizer_states"][0]["state"].values())


@pytest.mark.slow
def test_a_strategy_from_yaml_stores_each_layers_inverses_on_one_of_two_ranks(tmp_path: Path) -> None:
    strategy = {"class_path": "lightning_thor.ThorDDPStrategy", "init_args": {"inverse_workers": 1}}
    config = tmp_path / "two_ranks.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"devices": 2, "strategy": strategy}}), encoding="utf-8")
    printed = command("fit", *TINY_DIGITS, f"--config={config}", "--trainer.max_epochs=1", folder=tmp_path)
    line = r"7 layers preconditioned, 9\d % of the weights, \S+ \S+ on this rank \(others store the inverses of (\d)\)"
    found = re.search(line, " ".join(printed.split()))
    assert found, printed
    layers = torch.load(checkpoint_in(tmp_path), weights_only=True)["callbacks"]["ThorCallback"]["curvature"]["layers"]
    assert sum("G_inverse" not in layer for layer in layers.values()) == int(found.group(1)) > 0


class ShardedClassifier(ImageClassifier):
    """Other parameters than those that LightningCLI gives the optimizer are in their places when training begins."""

    def configure_model(self) -> None:
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize("optimizer", ["lightning_thor.Thor", "torch.optim.SGD"])
def test_a_sharded_model_is_trained_by_the_optimizer_of_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    callback = "lightning_thor.ThorCallback" if "thor" in optimizer else "LearningRateMonitor"
    options = (
        *TINY_DIGITS, "--trainer.max_epochs=1", "--trainer.devices=1", f"--trainer.callbacks={callback}",
        "--trainer.overfit_batches=3", f"--optimizer={optimizer}", "--optimizer.lr=0.01",
        "--optimizer.weight_decay=0",
    )  # fmt: skip
    whole = run(monkeypatch, tmp_path / "whole", "fit", *options).model
    model = "--model=tests.trainer.test_cli.ShardedClassifier"
    sharded = run(monkeypatch, tmp_path / "sharded", "fit", *options, "--trainer.strategy=thor_fsdp2", model).model
    found = [p.full_tensor() for p in sharded.parameters()]
    torch.testing.assert_close(found, [*whole.parameters()], rtol=1e-4, atol=1e-5)


class LaterClassifier(ImageClassifier):
    """Makes its output layer when training begins."""

    def configure_model(self) -> None:
        self.network = torch.nn.Sequential(self.network, torch.nn.Linear(10, 10))


def test_layers_that_are_made_when_training_begins_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = "--model=tests.trainer.test_cli.LaterClassifier"
    options = (*TINY_DIGITS, "--trainer.max_epochs=1", "--trainer.overfit_batches=1", model)
    ran = run(monkeypatch, tmp_path, "fit", *options)
    (group,) = ran.trainer.optimizers[0].param_groups
    assert {*group["params"]} == {*ran.model.parameters()}
    assert callback_of(ran.trainer).curvatures[0].layers.keys() >= {"network.1"}


@pytest.mark.slow
def test_the_scheduler_of_the_yaml_steps_once_per_epoch(fitted: tuple[Path, str]) -> None:
    checkpoint = torch.load(checkpoint_in(fitted[0]), weights_only=True)
    assert checkpoint["lr_schedulers"][0]["last_epoch"] == 2
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] < 0.01  # the YAML's, annealed


@pytest.mark.slow
def test_a_resumed_fit_goes_on_after_the_epochs_of_its_checkpoint(
    fitted: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint_in(fitted[0])
    run(monkeypatch, tmp_path, "fit", *TINY_DIGITS, "--trainer.max_epochs=3", f"--ckpt_path={source}")
    checkpoint = torch.load(checkpoint_in(tmp_path), weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (2, 9)
    assert checkpoint["callbacks"]["ThorCallback"]["curvature"]["step"] == 9
    assert {row["epoch"] for row in metrics_in(tmp_path) if row["val_acc"]} == {"2"}


@pytest.mark.slow
def test_validate_takes_a_checkpoint_and_the_configuration_of_fit(
    fitted: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = fitted
    run(monkeypatch, tmp_path, "validate", *TINY_DIGITS, f"--ckpt_path={checkpoint_in(folder)}")
    after_fit = [row["val_acc"] for row in metrics_in(folder) if row["val_acc"]][-1]
    (validated,) = [row["val_acc"] for row in metrics_in(tmp_path) if row["val_acc"]]
    assert validated == after_fit


def test_the_command_tells_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed_in_process(monkeypatch, "--version").strip().endswith(__version__)


def test_the_printed_configuration_fed_back_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = printed_in_process(
        monkeypatch, "fit", "--config=examples/digits.yaml", *paths(tmp_path), "--print_config"
    )
    first, written = yaml.safe_load(printed), yaml.safe_load(DIGITS.read_text(encoding="utf-8"))
    assert first["optimizer"] == {
        "class_path": "lightning_thor.Thor",
        "init_args": first["optimizer"]["init_args"]
        | {"lr": written["optimizer"]["init_args"]["lr"], "match_rms": 0.2},
    }
    callback = next(one for one in first["trainer"]["callbacks"] if one["class_path"] == "lightning_thor.ThorCallback")
    assert callback["init_args"]["damping"] == 0.2
    assert callback["init_args"]["update_every_n_steps"] is None
    (tmp_path / "config.yaml").write_text(printed, encoding="utf-8")
    again = printed_in_process(monkeypatch, "fit", f"--config={tmp_path / 'config.yaml'}", "--print_config")
    assert yaml.safe_load(again) == first
    assert again == printed


@pytest.mark.parametrize("config", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda config: config.stem)
def test_options_of_thor_and_its_callback_are_given_on_the_command_line(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--trainer.callbacks.update_every_n_steps=7", "--optimizer.mode=polar")
    printed = yaml.safe_load(printed_in_process(monkeypatch, "fit", f"--config={config}", *options, "--print_config"))
    callback = next(
        one for one in printed["trainer"]["callbacks"] if one["class_path"] == "lightning_thor.ThorCallback"
    )
    assert callback["init_args"]["update_every_n_steps"] == 7
    assert printed["optimizer"]["init_args"]["mode"] == "polar"


def test_another_optimizer_works_as_the_comment_in_the_yaml_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_in_comment(DIGITS)
    assert "--optimizer=torch.optim.SGD" in options
    run(monkeypatch, tmp_path, "fit", *TINY_DIGITS, "--trainer.max_epochs=1", *options)
    assert "THOR" not in "".join(capsys.readouterr())
    checkpoint = torch.load(checkpoint_in(tmp_path), weights_only=True)
    assert "ThorCallback" not in checkpoint["callbacks"]
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0)
    assert "match_rms" not in group


@pytest.mark.slow
def test_thor_callback_beside_sgd_says_what_to_do(tmp_path: Path) -> None:
    options = [option for option in options_in_comment(DIGITS) if option.startswith("--optimizer")]
    printed = forked_command("fit", *TINY_DIGITS, "--trainer.max_epochs=1", *options, folder=tmp_path, status=1)
    assert "ThorCallback found no Thor optimizer (configure_optimizers returned: SGD)" in printed
    assert "optimizer.class_path: lightning_thor.Thor" in printed


def test_split_measures_the_block_size_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    run(monkeypatch, tmp_path, "split", *TINY_DIGITS)
    printed = "".join(capsys.readouterr())
    figures = json.loads(next(tmp_path.rglob("thor_split.json")).read_text(encoding="utf-8"))
    assert figures["candidates"] == [1, 16, 32, 64, 72]  # the last layer but one has 8 channels and a 3×3 kernel
    assert f"THOR block size: {figures['block_size']}" in printed
    assert f"the curves cross at {figures['crossing']:.0f}" in printed
    assert "THOR curvature" in printed
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("metrics.csv"))


# ── the same, in this process ──


def printed_in_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    printed = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        patch.setattr(sys, "argv", ["lightning-thor"])
        patch.chdir(ROOT)
        with pytest.raises(SystemExit) as ended:
            cli.run(arguments)
    assert ended.value.code in (None, 0)
    return printed.getvalue()


def applied_steps(ran: LightningCLI) -> int:
    callback = ran.trainer.callbacks[0]
    assert isinstance(callback, ThorCallback)
    return callback.curvature.step


def small(config: str) -> tuple[str, ...]:
    """A configuration of the examples, small enough for two batches in a second or two."""
    sizes = {
        "cifar10_resnet18": (
            "--model.init_args.network.init_args.width=4",
            "--data.init_args.subset=16",
            "--data.init_args.val_subset=8",
            "--data.init_args.test_subset=8",
            "--data.init_args.batch_size=8",
        ),
        "char_gpt": (
            "--model.init_args.layers=1",
            "--model.init_args.width=8",
            "--model.init_args.heads=2",
            "--model.init_args.context=16",
            "--data.init_args.context=16",
            "--data.init_args.val_windows=4",
            "--data.init_args.batch_size=4",
        ),
    }
    return (
        f"--config=examples/{config}.yaml",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=1",
        *sizes[config],
    )


def write_parquet(path: Path, rows: int) -> None:
    """``rows`` images of noise, in the layout of CIFAR-10 on the hub."""
    numpy, pyarrow = (
        pytest.importorskip("numpy", reason="pip install '.[examples]'"),
        pytest.importorskip("pyarrow", reason="pip install '.[examples]'"),
    )
    parquet, image = (
        pytest.importorskip("pyarrow.parquet", reason="pip install '.[examples]'"),
        pytest.importorskip("PIL.Image", reason="pip install '.[examples]'"),
    )
    encoded = []
    for seed in range(10):
        noise = numpy.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
        buffer = io.BytesIO()
        image.fromarray(noise).save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": f"{seed}.png"})
    columns = {"img": [encoded[row % 10] for row in range(rows)], "label": [row % 10 for row in range(rows)]}
    parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A folder laid out as the real data: noise instead of photographs, a proverb instead of Shakespeare."""
    folder = tmp_path / "data"
    (folder / "cifar10").mkdir(parents=True)
    (folder / "tinyshakespeare").mkdir()
    write_parquet(folder / "cifar10" / "train.parquet", rows=5_020)  # 5,000 of them validate
    write_parquet(folder / "cifar10" / "test.parquet", rows=10)
    text = "All the world's a stage, and all the men and women merely players.\n" * 20
    (folder / "tinyshakespeare" / "input.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def real() -> Path:
    if not DATA.is_dir():
        pytest.skip("no folder of real data: set LIGHTNING_THOR_DATA to one that holds cifar10/ and tinyshakespeare/")
    return DATA


@pytest.mark.parametrize("where", ["made_up", "real"])
@pytest.mark.parametrize(
    ("config", "data", "metric"),
    [("cifar10_resnet18", "cifar10", "val_acc"), ("char_gpt", "tinyshakespeare", "val_loss")],
)
def test_two_batches_of_each_example(
    config: str,
    data: str,
    metric: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    folder: Path = request.getfixturevalue(where)
    ran = run(monkeypatch, tmp_path, "fit", *small(config), f"--data.init_args.root={folder / data}")
    assert applied_steps(ran) == 2
    assert torch.isfinite(ran.trainer.callback_metrics[metric])
    assert checkpoint_in(tmp_path).is_file()


def test_test_takes_a_checkpoint(made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*small("cifar10_resnet18"), f"--data.init_args.root={made_up / 'cifar10'}")
    run(monkeypatch, tmp_path / "fit", "fit", *options)
    checkpoint = checkpoint_in(tmp_path / "fit")
    ran = run(monkeypatch, tmp_path / "test", "test", *options, f"--ckpt_path={checkpoint}")
    assert torch.isfinite(ran.trainer.callback_metrics["test_loss"])
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]["network.head.weight"]
    assert_bitwise(ran.model.network.head.weight.detach(), saved)


@pytest.mark.parametrize("config", ["digits", "cifar10_resnet18"])
def test_predict_gives_each_test_images_probabilities(
    config: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = list(TINY_DIGITS)
    if config != "digits":
        folder = request.getfixturevalue("made_up") / "cifar10"
        options = [*small(config), f"--data.init_args.root={folder}"]
    ran = run(monkeypatch, tmp_path, "predict", *options)
    (probabilities,) = ran.trainer.predict_loop.predictions
    assert len(probabilities) == len(ran.datamodule.test[0])
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(probabilities)))


def test_short_option_names_of_the_comments_work(
    made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The YAML files' comments say ``--data.root DIR``, ``--model.network.width`` and ``--optimizer.lr``."""
    options = ("--data.root", str(made_up / "cifar10"), "--model.network.width", "8", "--optimizer.lr", "0.002")
    ran = run(monkeypatch, tmp_path, "fit", *small("cifar10_resnet18"), *options)
    assert ran.model.network.head.in_features == 64
    assert ran.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.002


def test_classes_of_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project's own files, which are installed nowhere."""
    project = tmp_path / "project"
    project.mkdir()
    code = """
        import lightning as L
        import torch
        from torch import nn


        class OwnModel(L.LightningModule):
            def __init__(self, width: int):
                super().__init__()
                self.net = nn.Linear(width, 1)

            def training_step(self, x, index):
                return self.net(x).square().mean()

            def train_dataloader(self):
                return torch.utils.data.DataLoader(torch.randn(8, self.net.in_features), batch_size=4)
    """
    (project / "own_files_of_a_project.py").write_text(textwrap.dedent(code), encoding="utf-8")
    config: dict[str, Any] = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": ".", "version": 0},
            },
            "callbacks": [{"class_path": "lightning_thor.ThorCallback"}],
        },
        "model": {"class_path": "own_files_of_a_project.OwnModel", "init_args": {"width": 3}},
        "optimizer": {"class_path": "lightning_thor.Thor"},
    }
    (project / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    ran = run(monkeypatch, tmp_path, "fit", "--config=config.yaml", root=project)
    assert applied_steps(ran) == 2
    # ... and a second run, whose configuration is saved into the same folder, is no error.
    assert applied_steps(run(monkeypatch, tmp_path, "fit", "--config=config.yaml", root=project)) == 2


@pytest.mark.parametrize(("given", "found"), [("auto", None), ("64", 64), ("null", None)])
def test_the_block_size_of_a_configuration_is_auto_a_number_or_null(
    given: str, found: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--trainer.callbacks=lightning_thor.ThorCallback", f"--trainer.callbacks.block_size={given}")
    ran = run(monkeypatch, tmp_path, "fit", *TINY_DIGITS, "--trainer.max_epochs=1", *options)
    assert applied_steps(ran) == 3
    callback = ran.trainer.callbacks[0]
    assert isinstance(callback, ThorCallback)
    assert (callback.split is not None) == (given == "auto")
    assert callback.block_size == (callback.split.block_size if callback.split else found)
    written = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text(encoding="utf-8"))
    (init_args,) = (one["init_args"] for one in written["trainer"]["callbacks"])
    assert str(init_args["block_size"]) == {"null": "None"}.get(given, given)


@pytest.mark.parametrize(
    ("given", "found"), [("THOR_stop", (0.01, 0.001)), ("[0.1,0.01]", (0.1, 0.01)), ("null", None)]
)
def test_the_trace_rule_of_a_configuration_is_a_name_two_thresholds_or_null(
    given: str, found: tuple[float, float] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--trainer.callbacks=lightning_thor.ThorCallback", f"--trainer.callbacks.trace_rule={given}")
    ran = run(monkeypatch, tmp_path, "fit", *TINY_DIGITS, "--trainer.max_epochs=1", *options)
    callback = callback_of(ran.trainer)
    assert callback.curvature._trace_rule == found


def test_split_needs_no_callback_in_the_configuration_and_runs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = "--trainer.callbacks=lightning.pytorch.callbacks.LearningRateFinder"
    ran = run(monkeypatch, tmp_path, "split", *TINY_DIGITS, finder)
    assert (ran.trainer.global_step, applied_steps(ran)) == (0, 0)
    assert ran.trainer.callbacks[0].split.block_size in (1, 16, 32, 64, 72)


def test_split_goes_by_the_options_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--trainer.callbacks=lightning_thor.ThorCallback", "--trainer.callbacks.precondition_bias=true")
    ran = run(monkeypatch, tmp_path, "split", *TINY_DIGITS, *options, "--trainer.callbacks.block_size=64")
    curvature = ran.trainer.callbacks[0].curvature
    assert curvature.layers["network.head"].with_bias
    assert ran.trainer.callbacks[0].split.n_factors == 8


def test_the_polar_mode_is_one_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run(monkeypatch, tmp_path, "fit", *TINY_DIGITS, "--optimizer.mode=polar", "--trainer.max_epochs=1")
    callback = ran.trainer.callbacks[0]
    assert len(callback.curvature.polar_layers) == 3
    assert "network.head" not in callback.curvature.polar_layers
    checkpoint = torch.load(checkpoint_in(tmp_path), weights_only=True)
    assert checkpoint["callbacks"]["ThorCallback"]["curvature"]["mode"] == "polar"
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["mode"] == "polar"


def test_the_adam_mode_is_one_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--optimizer.mode=adam", "--optimizer.beta2=0.98", "--trainer.max_epochs=1")
    run(monkeypatch, tmp_path, "fit", *TINY_DIGITS, *options)
    checkpoint = torch.load(checkpoint_in(tmp_path), weights_only=True)
    assert checkpoint["callbacks"]["ThorCallback"]["curvature"]["mode"] == "adam"
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["beta2"] == 0.98
    assert all("exp_avg_sq" in state for state in checkpoint["optimizer_states"][0]["state"].values())


def test_a_mode_that_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path, "fit", *TINY_DIGITS, "--optimizer.mode=muon")
    assert ended.value.code == 2


def test_an_option_out_of_its_range_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--trainer.callbacks=lightning_thor.ThorCallback", "--trainer.callbacks.update_every_n_steps=0")
    with pytest.raises(ValueError, match=r"update_every_n_steps must be an int of at least 1 .*got 0"):
        run(monkeypatch, tmp_path, "fit", *TINY_DIGITS, *options)


def test_an_option_that_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path, "fit", *TINY_DIGITS, "--optimizer.learning_rate=0.1")
    assert ended.value.code == 2


def test_the_command_is_the_one_of_the_package() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="console_scripts", name="lightning-thor")
    assert found.load() is cli.main
