"""Laws of what is printed when a fit starts: it fits a screen, and hides nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.common.models import gpt2, resnet50
from lightning_thor import Curvature, ThorCallback
from lightning_thor.trainer.console import show
from lightning_thor.trainer.start_report import _patterns, curvature_report
from tests.helpers.boring import Boring, trainer


def printed(curvature: Curvature, *, full: bool = False, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(curvature_report(curvature, full=full, width=width))
    return console.export_text()


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpt2(vocab_size=64, context=8, width=16, heads=2),
        lambda: resnet50(4),
        lambda: nn.Transformer(16, 2, 3, 3, 16),
    ],
)
def test_it_fits_a_screen_and_full_names_every_layer(make) -> None:
    with torch.random.fork_rng():
        curvature = Curvature(make())
    lines = printed(curvature).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert f"{len(curvature.layers)} layers preconditioned" in lines[0]
    assert "…" not in "".join(lines)  # nothing was cut off
    in_full = {line.split()[0] for line in printed(curvature, full=True, width=200).splitlines()}
    assert curvature.layers.keys() <= in_full


def named(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


def tied_bert(n_layers: int = 2) -> nn.Module:
    """With the names of a BERT that is trained on masked words, all of whose layers differ in shape."""
    embedding, decoder = nn.Embedding(12345, 24), nn.Linear(24, 12345)
    decoder.weight = embedding.weight
    layers = [
        named(
            attention=named(self=named(query=nn.Linear(24, 24), key=nn.Linear(24, 24 + n))),
            intermediate=named(dense=nn.Linear(24, 96 + n)),
            output=named(dense=nn.Linear(96 + n, 24)),
        )
        for n in range(n_layers)
    ]
    bert = named(embeddings=named(word_embeddings=embedding), encoder=named(layer=nn.ModuleList(layers)))
    return named(bert=named(bert=bert), cls=named(predictions=named(transform=nn.Linear(24, 24), decoder=decoder)))


def long_names() -> nn.Module:
    """Parts of names that are longer than what is left beside the other columns."""
    return named(
        token_embedding_of_the_vocabulary_of_all_languages=nn.Embedding(50257, 24),
        a_very_long_attribute_name_without_any_dots_in_it_at_all=nn.ModuleList([nn.Linear(64, 96), nn.Linear(64, 96)]),
        volumes=nn.Conv3d(64, 32, (3, 3, 3)),
    )


@pytest.mark.parametrize("mode", ["natural", "polar"])
@pytest.mark.parametrize("make", [tied_bert, long_names, lambda: tied_bert(12)])
def test_long_and_tied_names_leave_room_for_all_else(make: Callable[[], nn.Module], mode: Any) -> None:
    curvature = Curvature(make(), mode=mode, precondition_bias=True)
    wide, lines = printed(curvature, width=200).splitlines(), printed(curvature).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    # What stands beside the name of each row is the same at any width.
    beside = [re.split(r" {2,}", line, maxsplit=1)[1] for line in lines[1:-2] if re.search(r"iB$|  memory$", line)]
    on_wide = {re.sub(r" {2,}", "  ", line) for line in wide}
    rows = [re.sub(r" {2,}", "  ", one) for one in beside if 'summary="full"' not in one]
    assert len(rows) > 2
    assert all(any(line.endswith(row) for line in on_wide) for row in rows)


def test_folded_names_stand_for_exactly_the_names_they_fold() -> None:
    def expand(pattern: str) -> set[str]:
        parts = [part.strip("{}") for part in re.split(r"\.(?![^{]*\})", pattern)]
        alternatives = [[one for each in part.split(",") for one in numbers(each)] for part in parts]
        return {".".join(choice) for choice in product(*alternatives)}

    def numbers(part: str) -> list[str]:
        first, dash, last = part.partition("–")
        return [str(n) for n in range(int(first), int(last) + 1)] if dash else [part]

    names = [f"h.{i}.{part}.{j}" for i in (0, 1, 2, 5) for part in ("q", "k") for j in (0, 1)]
    names += ["h.3.q.0", "h.3.k.1", "h.4.q", "x.0", "x.a", "y.1", "head"]
    folded = _patterns(names)
    assert len(folded) < len(names) / 2
    assert sorted(name for _, own in folded for name in own) == sorted(names)
    assert all(expand(pattern) == set(own) for pattern, own in folded)


def test_a_parametrized_layer_is_named_once_and_little_curvature_says_what_to_do() -> None:
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(9, 9)), nn.Linear(9, 2))
    with pytest.warns(UserWarning, match="those of 0 .its weight is not a plain parameter.*register_layer"):
        curvature = Curvature(model)
    assert list(curvature.left_out) == ["0"]
    assert "Less than half of the weights: a warning says what to do." in printed(curvature)
    model[0].requires_grad_(False)
    curvature = Curvature(model)
    assert "; 1 frozen" in printed(curvature)
    assert "Less than half" not in printed(curvature)


def test_layers_of_another_optimizer_are_not_said_to_be_plain_ones_of_this() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 2), nn.Linear(2, 2).requires_grad_(False), nn.Bilinear(2, 2, 2))
    found = printed(Curvature(model, parameters=[*model[0].parameters(), *model[3].parameters()]), width=200)
    (headline, *_), lines = found.splitlines(), [line.rstrip() for line in found.splitlines()]
    assert "of the weights in this optimizer, " in headline
    assert "; 1 left plain: 3; 1 not in this optimizer; 1 frozen" in headline
    assert "Not in this optimizer, 1 layer: 1." in lines
    assert "Frozen, 1 layer: 2." in lines
    assert "in this optimizer" not in printed(Curvature(nn.Linear(3, 2)))


@pytest.mark.parametrize(
    ("summary", "model_summary", "speaks"),
    [(None, True, True), (None, False, False), (True, False, True), ("full", False, True), (False, True, False)],
)
def test_it_is_silent_where_the_models_summary_is_unless_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], summary: Any, model_summary: bool, speaks: bool
) -> None:
    found = trainer(tmp_path, ThorCallback(summary=summary), max_steps=1, enable_model_summary=model_summary)
    found.fit(Boring())
    assert ("THOR curvature" in capsys.readouterr().out) == speaks


def test_summary_takes_no_other_word() -> None:
    with pytest.raises(ValueError, match="got 'all'"):
        ThorCallback(summary="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_the_output_cannot_hold_does_not_end_a_fit(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """As in a file on Windows, to which the output goes."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stdout)
    show("→ 64², raise")
    monkeypatch.undo()
    stdout.seek(0)
    said = stdout.read()
    assert said.rstrip() == ("? 64?, raise" if encoding == "ascii" else "? 64², raise")
