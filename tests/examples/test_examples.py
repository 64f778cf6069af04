"""The examples: the plain loop, the demo, and the data and models that the YAML files name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from examples import plain_loop
from examples.batches import batch_loader
from examples.char_data import CharData, RandomWindows, Windows
from examples.char_gpt import CharGPT
from examples.cifar10 import MEAN, STD, CIFAR10Data, rows_to_take
from examples.demo import recipes, tables, training
from examples.digits import DigitsData, DigitsNet
from examples.images import normalise, random_crop_and_flip
from examples.resnet import ResNet18
from lightning_thor import Curvature, ThorCallback, configure_thor
from tests.helpers.boring import assert_bitwise
from tests.helpers.commands import python_module

ROOT = Path(__file__).parents[2]


# ── plain_loop ──


@pytest.mark.slow
def test_the_plain_loop_runs_as_a_program_and_learns() -> None:
    printed = python_module("examples.plain_loop")
    accuracies = [float(percent) for percent in re.findall(r"validation accuracy ([\d.]+)%", printed)]
    assert len(accuracies) == 5
    assert accuracies[-1] > 95.0


def test_the_plain_loop_returns_the_accuracy_that_it_prints_last(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = plain_loop.main(epochs=1)
    assert f"epoch 1: validation accuracy {accuracy:.1%}" in capsys.readouterr().out
    assert accuracy > 0.5


# ── demo ──


@pytest.mark.slow
def test_the_demo_prints_a_table_and_writes_a_picture_and_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    printed = python_module("examples.demo", "--epochs=1", "--seeds=2", "--pinn-seconds=0.5", f"--out={out}")
    for word in ("median over 2 seeds", *recipes.RECIPES, "ms per step", "Burgers' equation"):
        assert word in printed
    for picture in ("curves.png", "pinn.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG\r\n")
    figures = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    assert (figures["epochs"], figures["target"]) == (1, tables.TARGET)
    assert list(figures["optimizers"]) == ["THOR", "momentum SGD", "AdamW", "Muon"]
    for run in figures["pinn"].values():
        assert len(run["error"]) == len(run["seconds"]) > 1
        assert run["steps"] > 1
    for name, contender in figures["optimizers"].items():
        assert contender["lr"] == recipes.RECIPES[name].lr
        first, second = contender["runs"]
        assert len(first["epochs"]) == len(first["accuracy"]) == training.CHECKS_PER_EPOCH
        assert len(first["step_seconds"]) == math.ceil(1077 / training.BATCH_SIZE)
        assert first["seconds"] == sorted(first["seconds"])
        assert first["accuracy"] != second["accuracy"]  # two seeds, two trainings


def test_the_contenders_of_the_demo_start_from_the_same_weights_and_see_the_same_batches() -> None:
    """What makes the demo fair: a seed decides both, whatever the optimizer."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name, recipe in recipes.RECIPES.items():
        L.seed_everything(3, verbose=False)
        module = training.Contender(recipe, recipe.lr)
        data = DigitsData(batch_size=training.BATCH_SIZE)
        data.setup()
        seen[name] = [*(p.detach().clone() for p in module.parameters()), next(iter(data.train_dataloader()))[0]]
    reference = seen.pop("THOR")
    for tensors in seen.values():
        assert_bitwise(tensors, reference)


def test_a_target_that_was_not_reached_is_said() -> None:
    assert tables.median_and_range([3.0, None, 1.0], ".0f") == "not reached by 1 of 3"
    assert tables.median_and_range([3.0, 2.0, 1.0], ".0f") == "2 (1–3)"
    curve = training.Curve(epochs=[1.0, 2.0], seconds=[0.5, 1.5], accuracy=[0.9, 0.98])
    assert (curve.epochs_to(0.97), curve.seconds_to(0.97), curve.epochs_to(0.99)) == (2.0, 1.5, None)


# ── digits ──


def test_digits_are_split_into_all_images_without_overlap() -> None:
    from sklearn.datasets import load_digits

    data = DigitsData()
    data.setup()
    splits = (data.train, data.val, data.test)
    assert [tuple(images.shape) for images, _ in splits] == [(n, 1, 8, 8) for n in (1077, 360, 360)]
    # Every image of scikit-learn's exactly once: as lists of rows, sorted, they are the same.
    images = torch.cat([images for images, _ in splits]).flatten(1) * 16
    assert sorted(images.tolist()) == sorted(load_digits().data.tolist())


def test_the_split_keeps_the_shares_of_the_classes_and_depends_on_its_seed() -> None:
    data, other = DigitsData(), DigitsData(split_seed=1)
    data.setup()
    other.setup()
    assert not torch.equal(data.val[0], other.val[0])
    whole = torch.cat([labels for _, labels in (data.train, data.val, data.test)]).bincount() / 1797
    for _, labels in (data.val, data.test):
        torch.testing.assert_close(labels.bincount() / 360, whole, rtol=0, atol=1.5 / 360)


def test_the_digits_network_is_preconditioned_whole() -> None:
    net = DigitsNet(width=4)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    curvature = Curvature(net)
    assert len(curvature.layers) == 7
    assert curvature.left_out == {}


def test_a_batch_loader_gives_every_row_once_and_keeps_the_smaller_last_batch() -> None:
    loader = batch_loader(torch.arange(10), torch.arange(10) * 2, batch_size=4, shuffle=True)
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert torch.cat([x for x, _ in batches]).sort().values.tolist() == list(range(10))
    assert all(torch.equal(y, 2 * x) for x, y in batches)


# ── CIFAR-10 and ResNet-18 ──


def test_the_resnet_18_of_width_64_has_the_well_known_size_and_shapes() -> None:
    net = ResNet18(width=64)
    assert sum(p.numel() for p in net.parameters()) == 11_173_962
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 20
    net.eval()
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert net.stages(net.stem(torch.zeros(1, 3, 32, 32))).shape == (1, 512, 4, 4)


def test_the_resnet_is_preconditioned_whole() -> None:
    curvature = Curvature(ResNet18(width=4))
    assert len(curvature.layers) == 20 + 20 + 1  # convolutions, their norms, the head
    assert curvature.left_out == {}


def test_missing_images_say_which_file_and_where_it_goes(tmp_path: Path) -> None:
    data = CIFAR10Data(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no file .*train\.parquet.*uoft-cs/cifar10.*--data\.root FOLDER"):
        data.setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no file .*test\.parquet"):
        data.setup("test")


@pytest.mark.parametrize("asked", [0, -1, 11])
def test_a_subset_that_cannot_be_taken_is_refused(asked: int) -> None:
    with pytest.raises(ValueError, match=rf"val_subset must be None or 1\.\.10, .*; got {asked}"):
        rows_to_take("val_subset", asked, 10)
    assert rows_to_take("val_subset", None, 10) == 10
    assert rows_to_take("val_subset", 10, 10) == 10


def test_normalising_takes_the_mean_colour_to_zero_and_keeps_the_bytes() -> None:
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(normalise(images, MEAN, STD), white.reshape(1, 3, 1, 1).expand(2, 3, 4, 4))
    assert images.dtype == torch.uint8
    assert bool((images == 255).all())


def test_an_augmented_image_is_a_shifted_or_mirrored_one() -> None:
    images = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(200, 1, 1, 1)
    original = images.clone()
    augmented = random_crop_and_flip(images, padding=2, generator=torch.Generator().manual_seed(0))
    assert_bitwise(images, original)
    padded = torch.nn.functional.pad(images[:1], (2,) * 4)
    allowed = set()
    for down in range(5):
        for right in range(5):
            crop = padded[0, 0, down : down + 8, right : right + 8]
            allowed |= {tuple(crop.flatten().tolist()), tuple(crop.flip(1).flatten().tolist())}
    seen = {tuple(image.flatten().tolist()) for image in augmented}
    assert seen <= allowed
    assert len(seen) > 40  # of 50


# ── CharGPT ──


def text_file(folder: Path, text: str) -> str:
    path = folder / "input.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_missing_text_says_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text at .*input\.txt.*--data\.root PATH"):
        CharData(root=str(tmp_path)).setup()


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 9 characters, a window takes context \+ 1 = 17"):
        CharData(root=text_file(tmp_path, "x" * 10), context=16).setup()


def test_targets_are_the_next_characters(tmp_path: Path) -> None:
    data = CharData(root=text_file(tmp_path, "abcdefgh" * 30), context=5, batch_size=3, steps_per_epoch=4)
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    for characters, following in batches:
        assert characters.shape == following.shape == (3, 5)
        assert_bitwise(following[:, :-1], characters[:, 1:])
        assert_bitwise(following, (characters + 1) % 8)


def test_the_windows_of_an_epoch_depend_on_the_seed_and_the_epoch_alone() -> None:
    windows = Windows(torch.arange(1000), context=4)

    def starts(epoch: int, rank: int = 0, ranks: int = 1, seed: int = 0) -> list[int]:
        sampler = RandomWindows(windows, samples_per_rank=20, ranks=ranks, rank=rank, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert starts(1) == starts(1)
    assert starts(1) != starts(2)
    assert starts(1, seed=7) != starts(1)
    assert starts(1, rank=0, ranks=2) != starts(1, rank=1, ranks=2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vocab_size": 4, "context": 8}, r"has 8 different symbols, the model only vocab_size=4"),
        ({"vocab_size": 8, "context": 4}, r"windows of context=8 characters, but the model takes at most context=4"),
    ],
)
def test_a_model_that_does_not_fit_the_text_is_refused(tmp_path: Path, model: dict[str, int], message: str) -> None:
    class Small(CharGPT):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return configure_thor(self)

    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ThorCallback(summary=False)],
    )
    data = CharData(root=text_file(tmp_path, "abcdefgh" * 30), context=8)
    with pytest.raises(ValueError, match=message):
        trainer.fit(Small(layers=1, width=8, heads=2, **model), datamodule=data)


def test_the_learning_rate_warms_up_over_the_first_steps(tmp_path: Path) -> None:
    rates: list[float] = []

    class Small(CharGPT):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.4)

        def on_train_batch_end(self, *_: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        max_steps=6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    data = CharData(root=text_file(tmp_path, "abcdefgh" * 30), context=8, batch_size=2, steps_per_epoch=6)
    trainer.fit(Small(vocab_size=8, layers=1, width=8, heads=2, context=8, warmup_steps=4), datamodule=data)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_a_width_that_the_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="width=10 and heads=4"):
        CharGPT(width=10, heads=4)


def test_the_gpt_sees_no_later_character_and_starts_near_uniform() -> None:
    torch.manual_seed(0)
    model = CharGPT(vocab_size=20, layers=2, width=16, heads=2, context=12)
    first = torch.randint(20, (4, 12))
    second = first.clone()
    second[:, 7:] = torch.randint(20, (4, 5))
    torch.testing.assert_close(model(first)[:, :7], model(second)[:, :7])
    assert not torch.allclose(model(first)[:, 7:], model(second)[:, 7:])
    loss = model.loss((first, torch.randint(20, (4, 12))))
    torch.testing.assert_close(loss, torch.tensor(20.0).log(), rtol=0.02, atol=0)


def test_the_gpt_is_preconditioned_whole() -> None:
    curvature = Curvature(CharGPT(layers=2, width=16, heads=2, context=12))
    # Two embeddings; per block two norms and four linear layers; the last norm and the head.
    assert len(curvature.layers) == 2 + 2 * 6 + 2
    assert curvature.left_out == {}


# ── all ──


def test_every_example_fits_on_two_screens() -> None:
    files = [*ROOT.glob("examples/**/*.py")]
    lines = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lines) > 20
    assert {file: count for file, count in lines.items() if count > 150} == {}
