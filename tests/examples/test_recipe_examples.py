"""The examples of the published recipes: their models, their data, and the real command on real images and text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.bert_pretraining import BertPretraining
from examples.classifier import ImageClassifier
from examples.imagenet import MEAN, STD, ImageFolderData
from examples.images import middle_box, random_box
from examples.masked_text import NO_TARGET, MaskedTextData, hide_tokens
from examples.resnet import ResNet50
from lightning_thor import Curvature
from lightning_thor.recipes import ResNet50LearningRate, bert_large
from tests.helpers.boring import assert_bitwise
from tests.helpers.commands import DATA, checkpoint_in, forked_command, metrics_in

# ── ResNet-50 ──


def test_the_resnet_50_of_width_64_has_the_well_known_size_and_shapes() -> None:
    with torch.device("meta"):
        net = ResNet50().eval()
        images = torch.zeros(2, 3, 224, 224)
    assert sum(p.numel() for p in net.parameters()) == 25_557_032
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 53
    assert net(images).shape == (2, 1000)
    assert net.stages(net.stem(images)).shape == (2, 2048, 7, 7)


def test_the_resnet_50_is_preconditioned_whole() -> None:
    curvature = Curvature(ResNet50(width=4))
    assert len(curvature.layers) == 53 + 53 + 1  # convolutions, their norms, the head
    assert curvature.left_out == {}


# ── a folder of images ──


def image_folder(root: Path, images: dict[str, list[Any]]) -> Path:
    """``root`` with the pictures of each ``split/class``, as JPEG files."""
    for folder, pictures in images.items():
        (root / folder).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            picture.save(root / folder / f"{number}.JPEG", quality=95)
    return root


@pytest.fixture
def plain_images(tmp_path: Path) -> Path:
    """Two classes, each of one colour."""
    image = pytest.importorskip("PIL.Image", reason="pip install '.[examples]'")
    red, blue = (image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    return image_folder(
        tmp_path, {"train/red": [red] * 3, "train/blue": [blue] * 2, "val/red": [red], "val/blue": [blue]}
    )


def test_labels_are_the_places_of_the_sorted_classes_and_images_are_normalised(plain_images: Path) -> None:
    data = ImageFolderData(str(plain_images), batch_size=5, size=16)
    data.setup()
    assert data.classes == ["blue", "red"]
    (batch,) = data.train_dataloader()
    images, labels = data.on_after_batch_transfer(batch, 0)
    assert images.shape == (5, 3, 16, 16)
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 1]
    colours = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])[labels]  # blue, red
    expected = (colours - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(images, expected[..., None, None].expand_as(images), rtol=0, atol=0.05)  # JPEG's loss


def test_training_batches_are_all_of_one_size(plain_images: Path) -> None:
    data = ImageFolderData(str(plain_images), batch_size=2, size=8)
    data.setup()
    assert [len(labels) for _, labels in data.train_dataloader()] == [2, 2]
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 2


def test_a_missing_folder_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder of images in .*train\. .*--data\.root FOLDER"):
        ImageFolderData(str(tmp_path)).setup()


def test_a_folder_without_images_and_a_class_that_training_lacks_are_refused(plain_images: Path) -> None:
    (plain_images / "val" / "green").mkdir()
    with pytest.raises(ValueError, match=r"val has classes that .*train has not: \['green'\]"):
        ImageFolderData(str(plain_images)).setup()
    for folder in ("green", "red", "blue"):
        (plain_images / "val" / folder).rename(plain_images / "train" / f"not {folder}")
    (plain_images / "val" / "red").mkdir()
    with pytest.raises(FileNotFoundError, match=r"val has no image in its folders"):
        ImageFolderData(str(plain_images)).setup()


def test_a_random_part_lies_in_the_image_and_has_the_size_and_shape_of_its_law() -> None:
    generator = torch.Generator().manual_seed(0)
    shares, ratios = [], []
    for _ in range(500):
        left, upper, right, lower = random_box(400, 300, generator)
        assert 0 <= left < right <= 400
        assert 0 <= upper < lower <= 300
        shares.append((right - left) * (lower - upper) / (400 * 300))
        ratios.append((right - left) / (lower - upper))
    assert 0.08 <= min(shares) < 0.1
    assert 0.9 < max(shares) <= 1.0
    assert 0.75 <= min(ratios) < 0.8
    assert 1.25 < max(ratios) <= 4 / 3 + 1e-9
    assert random_box(1000, 10) == (495, 0, 505, 10)  # nothing fits: the middle square
    assert middle_box(256, 512) == (16, 144, 240, 368)


def test_more_classes_than_the_classifier_has_are_refused(plain_images: Path) -> None:
    (plain_images / "train" / "green").mkdir()
    classifier = ImageClassifier(nn.Identity(), num_classes=2)
    data = ImageFolderData(str(plain_images))
    data.setup()
    classifier._trainer = type("Trainer", (), {"datamodule": data})
    with pytest.raises(
        ValueError, match=r"has 3 classes, the classifier only num_classes=2\. Set --model\.num_classes 3"
    ):
        classifier.setup("fit")


# ── hidden tokens ──


def test_as_many_tokens_of_each_piece_are_hidden_and_never_the_first_or_last() -> None:
    tokens = torch.randint(10, 1000, (64, 42))
    original = tokens.clone()
    inputs, labels = hide_tokens(tokens, mask=4, vocab_size=1000)
    assert_bitwise(tokens, original)
    hidden = labels != NO_TARGET
    assert hidden.sum(1).tolist() == [6] * 64  # 15 % of 40
    assert not hidden[:, [0, -1]].any()
    assert hidden[:, 1:-1].any(0).all()
    assert_bitwise(labels[hidden], tokens[hidden])
    assert_bitwise(inputs[~hidden], tokens[~hidden])


def test_of_the_hidden_tokens_eight_in_ten_are_masked_one_is_random_and_one_stays() -> None:
    tokens = torch.randint(10, 1000, (500, 202))
    inputs, labels = hide_tokens(tokens, mask=4, vocab_size=1000)
    hidden = labels != NO_TARGET
    masked, kept = inputs[hidden] == 4, inputs[hidden] == tokens[hidden]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean() == pytest.approx(0.1, abs=0.02)
    assert inputs.min() >= 0
    assert inputs.max() < 1000


def test_in_the_shortest_piece_its_one_token_is_hidden() -> None:
    _, labels = hide_tokens(torch.tensor([[2, 7, 3]]), mask=4, vocab_size=10)
    assert labels.tolist() == [[NO_TARGET, 7, NO_TARGET]]


# ── text and BERT ──

PROVERB = "All the world's a stage,\nand all the men and women merely players.\n" * 60


@pytest.fixture
def text_data(tmp_path: Path) -> MaskedTextData:
    pytest.importorskip("transformers", reason="pip install '.[transformers]'")
    (tmp_path / "input.txt").write_text(PROVERB, encoding="utf-8")
    data = MaskedTextData(
        str(tmp_path), vocab_size=60, context=10, batch_size=4, tokenizer=str(tmp_path / "made" / "tokenizer.json")
    )
    data.prepare_data()
    return data


def test_pieces_are_the_text_between_their_two_special_tokens(text_data: MaskedTextData) -> None:
    text_data.setup()
    tokenizer = text_data.tokenizer
    assert tokenizer.get_vocab_size() <= 60
    (tokens,) = next(iter(text_data.train_dataloader()))
    assert tokens.shape == (4, 10)
    assert set(tokens[:, 0].tolist()) == {tokenizer.token_to_id("[CLS]")}
    assert set(tokens[:, -1].tolist()) == {tokenizer.token_to_id("[SEP]")}
    words = tokenizer.decode(text_data.train[:, 1:-1].flatten().tolist())
    joined = "".join(PROVERB.lower().split())
    assert joined.startswith(words.replace(" ", "").replace("##", "")[:200])


def test_training_hides_other_tokens_each_time_and_validation_the_same(text_data: MaskedTextData) -> None:
    text_data.setup()
    batch = next(iter(text_data.train_dataloader()))
    first, second = (text_data.on_after_batch_transfer(batch, 0) for _ in range(2))
    assert not torch.equal(first[1], second[1])
    seen = next(iter(text_data.val_dataloader()))
    text_data.setup()
    again = next(iter(text_data.val_dataloader()))
    assert_bitwise(text_data.on_after_batch_transfer(seen, 0), again)


def test_a_tokenizer_that_is_there_is_used_and_one_without_a_mask_is_refused(text_data: MaskedTextData) -> None:
    made = text_data.tokenizer_file.read_text(encoding="utf-8")
    text_data.prepare_data()
    assert text_data.tokenizer_file.read_text(encoding="utf-8") == made
    text_data.tokenizer_file.write_text(made.replace("[MASK]", "[OTHER]"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json has no \[MASK\]: remove the file"):
        text_data.setup()


def test_a_missing_or_too_short_text_is_refused(text_data: MaskedTextData, tmp_path: Path) -> None:
    text_data.context = 1000
    with pytest.raises(ValueError, match=r"a piece takes context - 2 = 998"):
        text_data.setup()
    (tmp_path / "input.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no text at .*input\.txt.*--data\.root PATH"):
        text_data.setup()
    with pytest.raises(ValueError, match=r"context must be at least 3, .*got 2"):
        MaskedTextData(str(tmp_path), context=2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 20}, r"has \d+ tokens, the model only vocab_size=20"),
        ({"context": 8}, r"pieces of context=10 tokens, but the model takes at most context=8"),
    ],
)
def test_a_model_that_does_not_fit_the_text_is_refused(
    text_data: MaskedTextData, sizes: dict[str, int], message: str
) -> None:
    text_data.setup()
    model = BertPretraining(
        **{"vocab_size": 60, "layers": 1, "width": 8, "heads": 2, "inner": 16, "context": 10, **sizes}
    )
    model._trainer = type("Trainer", (), {"datamodule": text_data})
    with pytest.raises(ValueError, match=message):
        model.setup("fit")


def test_the_model_of_the_yaml_is_bert_large() -> None:
    pytest.importorskip("transformers", reason="pip install '.[transformers]'")
    with torch.device("meta"):
        model = BertPretraining()
    # BERT-large's encoder without its pooler, and the head that predicts words (its matrix is the embedding's).
    encoder, pooler = 335_141_888, 1024 * 1024 + 1024
    head = 1024 * 1024 + 1024 + 2 * 1024 + 30522
    assert sum(p.numel() for p in model.parameters()) == encoder - pooler + head


def test_what_is_logged_is_the_loss_and_the_share_of_hidden_tokens_found() -> None:
    pytest.importorskip("transformers", reason="pip install '.[transformers]'")
    model = BertPretraining(vocab_size=30, layers=1, width=8, heads=2, inner=16, context=12, dropout=0.0)
    inputs, labels = hide_tokens(torch.randint(5, 30, (6, 12)), mask=4, vocab_size=30)
    logged: dict[str, Tensor] = {}
    model.log = lambda name, value, **_: logged.update({name: value})
    model.validation_step((inputs, labels), 0)
    hidden = labels != NO_TARGET
    logits = model.bert(input_ids=inputs).logits[hidden]
    torch.testing.assert_close(logged["val_loss"], nn.functional.cross_entropy(logits, labels[hidden]))
    torch.testing.assert_close(logged["val_acc"], (logits.argmax(1) == labels[hidden]).float().mean())
    torch.testing.assert_close(model.training_step((inputs, labels), 0), logged["val_loss"])


# ── the real command ──


def real(*path: str) -> Path:
    found = DATA.joinpath(*path)
    if not found.is_file():
        pytest.skip(f"no {found}: set LIGHTNING_THOR_DATA to a folder that holds cifar10/ and tinyshakespeare/")
    return found


def rates_in(folder: Path) -> list[float]:
    return [float(row["lr-Thor"]) for row in metrics_in(folder) if row.get("lr-Thor")]


@pytest.mark.slow
def test_a_few_steps_of_the_imagenet_recipe_on_real_images(tmp_path: Path) -> None:
    parquet, image = (
        pytest.importorskip("pyarrow.parquet", reason="pip install '.[examples]'"),
        pytest.importorskip("PIL.Image", reason="pip install '.[examples]'"),
    )
    table = parquet.ParquetFile(real("cifar10", "test.parquet"))
    rows = next(table.iter_batches(60)).to_pylist()
    pictures: dict[str, list[Any]] = {}
    for row in rows:
        if row["label"] < 3:
            split = "train" if len(pictures.get(f"val/{row['label']}", ())) == 1 else "val"
            pictures.setdefault(f"{split}/{row['label']}", []).append(
                image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")
            )
    data = image_folder(tmp_path / "data", {key: kept[:3] for key, kept in pictures.items()})
    forked_command(
        "fit",
        "--config=examples/imagenet_resnet50_thor.yaml",
        f"--data.root={data}",
        "--data.size=32",
        "--data.batch_size=3",
        "--data.num_workers=0",
        "--model.num_classes=3",
        "--model.network.num_classes=3",
        "--model.network.width=8",
        "--lr_scheduler.schedule.steps_per_epoch=3",
        "--trainer.callbacks.damping.steps_per_epoch=3",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        folder=tmp_path / "out",
    )
    published = ResNet50LearningRate(steps_per_epoch=3)
    assert rates_in(tmp_path / "out") == pytest.approx([published(step) for step in range(6)])
    state = torch.load(checkpoint_in(tmp_path / "out"), weights_only=True)
    assert state["callbacks"]["ThorCallback"]["curvature"]["step"] == 6
    assert len(state["callbacks"]["ThorCallback"]["curvature"]["layers"]) == 53 + 1
    assert all(torch.isfinite(weight).all() for weight in state["state_dict"].values())
    assert {row["epoch"] for row in metrics_in(tmp_path / "out") if row["val_acc"]} == {"0", "1"}


@pytest.mark.slow
def test_a_few_steps_of_the_bert_recipe_on_real_text(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install '.[transformers]'")
    text = real("tinyshakespeare", "input.txt").read_text(encoding="utf-8")[:40_000]
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    forked_command(
        "fit",
        "--config=examples/bert_pretraining.yaml",
        f"--data.root={tmp_path / 'input.txt'}",
        "--data.vocab_size=400",
        "--data.context=16",
        "--data.batch_size=8",
        "--data.val_pieces=16",
        f"--data.tokenizer={tmp_path / 'tokenizer.json'}",
        "--model.vocab_size=400",
        "--model.layers=2",
        "--model.width=16",
        "--model.heads=2",
        "--model.inner=32",
        "--model.context=16",
        "--trainer.max_steps=6",
        "--trainer.callbacks.update_every_n_steps=4",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        folder=tmp_path / "out",
    )
    assert rates_in(tmp_path / "out") == pytest.approx([bert_large().learning_rate(step) for step in range(6)])
    losses = [float(row["train_loss"]) for row in metrics_in(tmp_path / "out") if row.get("train_loss")]
    assert len(losses) == 6
    assert losses[0] == pytest.approx(5.99, abs=0.2)  # log(400): it knows nothing
    state = torch.load(checkpoint_in(tmp_path / "out"), weights_only=True)
    assert all(torch.isfinite(weight).all() for weight in state["state_dict"].values())
    assert state["callbacks"]["ThorCallback"]["curvature"]["step"] == 6
    # Three embeddings; per block four linear layers of the attention and two of the perceptron; the head's.
    assert len(state["callbacks"]["ThorCallback"]["curvature"]["layers"]) == 3 + 2 * 6 + 1
