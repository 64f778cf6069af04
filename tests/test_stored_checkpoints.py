"""Laws of checkpoints that earlier versions wrote: they load with nothing lost, and train on as they did there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_thor.trainer.checkpoints import METADATA
from tests.helpers import stored_checkpoints
from tests.helpers.launching import run_forked
from tests.helpers.stored_checkpoints import (
    FORMER,
    OF_FORMER_CODE,
    ON_OTHER_RANKS,
    STORED,
    TRAININGS,
    Result,
    Training,
    train,
)

ALONE = [name for name, training in TRAININGS.items() if training.n_ranks == 1]
TOGETHER = [name for name, training in TRAININGS.items() if training.n_ranks == 2]
SINCE_THEN = re.compile(
    r"\.turn_is_probe is missing$|\.curvature\.(pending|refresh_costs) is new$"
    r"|\]\.(max_relative_step|rms_averaging) is new$|\.layers\..*\.rarest is new$"
)
"""Keys that came and went: a layer's turn under a trace rule is one like any other, decisions may be pending, and the
costs of staggered refreshes are kept. Steps had no limit, and all one size. Tables did not note how many rows a window
had."""
COMPARED = {"state_dict", "optimizer_states", "callbacks", "global_step", "shards"}
"""Of a checkpoint, what is the package's; the rest is Lightning's, and torch's schedulers'."""


def load(path: Path) -> Any:
    """Plain types and tensors only: a class of the package in the file would have to keep its address for ever. Of a
    folder, also what its ``shards`` hold together."""
    if path.is_dir():
        with TemporaryDirectory() as folder:
            dcp_to_torch_save(path, Path(folder, "whole.pt"))
            return {**load(path / METADATA), "shards": load(Path(folder, "whole.pt"))}
    return torch.load(path, weights_only=True)


def differences(found: Any, stored: Any, place: str = "") -> Iterator[str]:
    """What is not the same, with the place where it is: keys, types, and every bit of numbers."""
    if isinstance(stored, dict) and isinstance(found, dict):
        yield from (f"{place}.{key} is missing" for key in stored.keys() - found.keys())
        yield from (f"{place}.{key} is new" for key in found.keys() - stored.keys())
        for key in stored.keys() & found.keys():
            yield from differences(found[key], stored[key], f"{place}.{key}")
    elif isinstance(stored, list | tuple) and isinstance(found, list | tuple) and len(stored) == len(found):
        for number, (one, other) in enumerate(zip(found, stored, strict=True)):
            yield from differences(one, other, f"{place}[{number}]")
    elif isinstance(stored, Tensor) and isinstance(found, Tensor):
        if found.dtype != stored.dtype or not torch.equal(found, stored):
            yield f"{place} is {found}, was {stored}"
    elif type(found) is not type(stored) or found != stored:
        yield f"{place} is {found!r}, was {stored!r}"


def assert_loaded(saved_at_once: Path, name: str) -> None:
    found, stored = (
        {key: one for key, one in load(path).items() if key in COMPARED}
        for path in (saved_at_once, STORED / f"{name}.ckpt")
    )
    wrong = "\n".join(one for one in differences(found, stored) if not SINCE_THEN.search(one))
    assert not wrong, wrong
    assert stored["callbacks"]["ThorCallback"]["curvature"]["step"] == stored_checkpoints.SAVED_AT


def assert_goes_on(result: Result, name: str) -> None:
    """To rounding, which processors do in their own ways."""
    stored = load(STORED / f"{name}.after.pt")
    torch.testing.assert_close(result["losses"], stored["losses"], rtol=1e-9, atol=0)
    torch.testing.assert_close(result["weights"], stored["weights"], rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `stored_checkpoints.go_on_on_two_ranks`: real processes, once for all tests."""
    folder = tmp_path_factory.mktemp("two_ranks")
    status, printed = run_forked(stored_checkpoints.__file__, str(folder))
    assert status == 0, printed[-6000:]
    return folder


@pytest.mark.parametrize("name", ALONE)
def test_a_stored_checkpoint_saved_again_at_once_is_what_it_was_and_trains_on_as_it_did(
    tmp_path: Path, name: str
) -> None:
    result = train(TRAININGS[name], tmp_path / "again.ckpt", resume=STORED / f"{name}.ckpt")
    assert_loaded(tmp_path / "again.ckpt", name)
    assert_goes_on(result, name)


@pytest.mark.parametrize("name", ALONE)
def test_going_on_twice_from_a_stored_checkpoint_is_bitwise_the_same(tmp_path: Path, name: str) -> None:
    first, second = (train(TRAININGS[name], tmp_path / "x.ckpt", resume=STORED / f"{name}.ckpt") for _ in range(2))
    assert list(differences(second, first)) == []


@pytest.mark.parametrize("name", ALONE)
def test_the_training_from_its_beginning_is_still_the_one_that_was_stored(tmp_path: Path, name: str) -> None:
    assert_goes_on(train(TRAININGS[name], tmp_path / "new.ckpt"), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_on_two_ranks_too(two_ranks: Path, name: str) -> None:
    assert_loaded(two_ranks / f"{name}.ckpt", name)
    assert_goes_on(load(two_ranks / f"{name}.after.pt"), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_OTHER_RANKS)
def test_a_stored_checkpoint_of_one_process_trains_on_on_two_as_it_did_on_one(two_ranks: Path, name: str) -> None:
    stored, _ = ON_OTHER_RANKS[name]
    assert_loaded(two_ranks / f"{name}.ckpt", stored)
    assert_goes_on(load(two_ranks / f"{name}.after.pt"), stored)


def test_a_checkpoint_with_decisions_under_way_in_their_former_form_trains_on_as_it_did(tmp_path: Path) -> None:
    name = "2026-11-28_trace_rule"
    assert isinstance(load(FORMER / f"{name}.ckpt")["callbacks"]["ThorCallback"]["curvature"]["pending"][0], dict)
    result = train(OF_FORMER_CODE[name], tmp_path / "again.ckpt", resume=FORMER / f"{name}.ckpt")
    assert len(load(tmp_path / "again.ckpt")["callbacks"]["ThorCallback"]["curvature"]["pending"]) == 2
    stored = load(FORMER / f"{name}.after.pt")
    torch.testing.assert_close(result, stored, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_without_units_trains_on_as_it_did_until_the_first_refresh(tmp_path: Path) -> None:
    """At step 9: the statistics of norms and tables have changed since then."""
    name = "2026-11-25_natural"
    result = train(OF_FORMER_CODE[name], tmp_path / "again.ckpt", resume=FORMER / f"{name}.ckpt")
    stored = load(FORMER / f"{name}.after.pt")
    torch.testing.assert_close(result["losses"][:3], stored["losses"][:3], rtol=1e-9, atol=0)
    torch.testing.assert_close(result["losses"], stored["losses"], rtol=1e-3, atol=0)
    torch.testing.assert_close(result["weights"], stored["weights"], rtol=0, atol=0.02)


def test_a_checkpoint_of_the_first_version_is_refused_and_goes_on_without_its_curvature(tmp_path: Path) -> None:
    path = FORMER / "2026-11-23_natural.ckpt"
    with pytest.raises(ValueError, match=r"no refreshes, turns.*0\.1\.0.*deleting checkpoint\['callbacks'\]"):
        train(Training(), tmp_path / "again.ckpt", resume=path)
    checkpoint = load(path)
    del checkpoint["callbacks"]["ThorCallback"]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    with pytest.warns(UserWarning, match="curvature starts anew"):
        result = train(Training(), tmp_path / "again.ckpt", resume=tmp_path / "without.ckpt")
    assert bool(result["losses"].isfinite().all())


def test_every_stored_file_is_small_and_tested() -> None:
    files = {file.name for file in STORED.glob("*.*")}
    assert files == {f"{name}.{end}" for name in TRAININGS for end in ("ckpt", "after.pt")}
    former = {file.name for file in FORMER.iterdir()}
    assert former == {
        "2026-11-23_natural.ckpt", *(f"{name}.{end}" for name in OF_FORMER_CODE for end in ("ckpt", "after.pt"))
    }  # fmt: skip
    assert max(file.stat().st_size for file in STORED.rglob("*.*")) < 70_000
