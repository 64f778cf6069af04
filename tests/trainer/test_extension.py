"""A new strategy is one class outside of the package, and trains as the package's own."""

from __future__ import annotations

from pathlib import Path

import pytest

import lightning_thor
from tests.helpers import outside_strategy
from tests.helpers.boring import assert_bitwise
from tests.helpers.distributed_workers import one_rank, state, two_ranks


def test_a_strategy_from_outside_takes_few_lines_and_public_names_alone() -> None:
    lines = Path(outside_strategy.__file__).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    own = [line for line in lines if "import" in line and "lightning_thor" in line]
    assert own == ["from lightning_thor import ThorStrategyMixin"]
    assert "ThorStrategyMixin" in lightning_thor.__all__


@pytest.mark.slow
def test_on_two_ranks_it_is_bitwise_thor_ddp_and_sends_factors_from_backward() -> None:
    for found, expected in zip(two_ranks("my_ddp"), two_ranks("buckets"), strict=True):
        assert (found["strategy"], expected["strategy"]) == ("MyDDP", "ThorDDPStrategy")
        assert_bitwise(state(found), state(expected))
        assert found["collectives"] == expected["collectives"]
        assert any(call["in_backward"] for call in found["all_reduces"])


def test_on_one_process_it_is_bitwise_a_single_device(tmp_path: Path, clean_process: None) -> None:
    found, alone = (one_rank(tmp_path, max_epochs=1, strategy=strategy) for strategy in ("my_ddp", None))
    assert (found["strategy"], found["collectives"]) == ("MyDDP", [])
    assert_bitwise(state(found), state(alone))
