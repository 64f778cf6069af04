"""Models that nobody here wrote train, and as much of them is preconditioned as the pages say."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (the dev extra has it)")
pytest.importorskip("peft", reason="peft is not installed (the dev extra has it)")
from benchmarks.models import ARCHITECTURES, FILE, train

STORED: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))["models"]
QUICK = ("Llama", "LoRA", "GRU of linear layers", "graph network")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES]
)
def test_an_architecture_trains_with_the_share_of_curvature_that_was_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may rise, but not fall; that losses and weights are finite is part of the training."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = train(name, uses_thor=True)
    assert found["share"] >= STORED[name]["share"] - 1e-4, found["left_out"]


def test_all_families_are_measured() -> None:
    assert STORED.keys() == ARCHITECTURES.keys()
    assert len(ARCHITECTURES) >= 25 + 8
    families = {
        "language",
        "vision",
        "speech",
        "multimodal",
        "state space",
        "experts",
        "adapters",
        "recurrent",
        "graph",
    }
    assert {one.family for one in ARCHITECTURES.values()} == families
