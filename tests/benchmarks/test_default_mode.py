"""The law that optimizers which are added to the study keep those that are there, and their target."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.default_mode.summary import summarise

NOTHING: dict[str, Any] = {"target": None, "tuning": {}, "runs": {}}


def found(setting: str, *finals: float) -> dict[str, Any]:
    """Trainings of one setting, a seed for each final score, which comes after 20 steps and two seconds."""
    records = [{"steps": [10, 20], "values": [9.0, final], "seconds": [1.0, 2.0]} for final in finals]
    run = {"setting": setting, "lr": 0.1, "is_best": True, "records": records}
    return {"tuning": {setting: {"0.1": finals[0]}}, "runs": {f"{setting}@0.1": run}}


def test_another_optimizer_is_judged_by_the_target_that_is_there() -> None:
    before = summarise(found("adamw", 1.0, 3.0), NOTHING, {"cpu": "one"})
    assert before["target"] == 2.0
    both = summarise(found("thor", 1.5, 2.0), before, {"cpu": "another"})
    assert both["target"] == 2.0
    assert both["runs"]["adamw@0.1"] == before["runs"]["adamw@0.1"]
    thor = both["runs"]["thor@0.1"]
    assert (thor["final"], thor["n_reached"], thor["steps"]) == (1.75, 2, 20.0)
    assert [both["runs"][name]["environment"]["cpu"] for name in ("adamw@0.1", "thor@0.1")] == ["one", "another"]
    assert both["tuning"].keys() == {"adamw", "thor"}


def test_a_new_target_asks_for_all_that_are_judged_by_it() -> None:
    before = summarise(found("adamw", 1.0, 3.0), NOTHING, {})
    before = summarise(found("thor", 1.5, 2.0), before, {})
    with pytest.raises(ValueError, match=r"train thor@0\.1 too, whose target it is"):
        summarise(found("adamw", 1.0, 2.0), before, {})
    summarise(found("adamw", 1.0, 3.0), before, {})
