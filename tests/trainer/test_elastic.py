"""Other launchers, other numbers of ranks, and ranks that fail."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_thor import Curvature
from lightning_thor.distributed.factor_reducer import by_size
from tests.helpers.boring import assert_bitwise, without_words
from tests.helpers.distributed_workers import (
    LONG,
    Module,
    four_ranks,
    launched_four,
    one_rank,
    results,
    results_folder,
    state,
    torchrun,
    two_ranks,
)
from tests.helpers.fakes import FakeCommunicator
from tests.helpers.lone_ranks import lone_ranks
from tests.helpers.option_trainings import ALL_AT_ONCE
from tests.helpers.sharded_workers import Sharded
from tests.helpers.signalled import STEPS
from tests.helpers.two_nodes import two_nodes


@pytest.mark.slow
def test_four_ranks_are_one_and_go_on_from_a_checkpoint_of_two(tmp_path: Path) -> None:
    _, status, printed = launched_four(LONG)
    assert status == 0, printed[-6000:]
    alone = one_rank(tmp_path, max_epochs=3)
    for name, first_step in (("four", 1), ("four_resumed", 5)):
        for result in (ranks := four_ranks(name)):
            assert (result["world_size"], result["steps"][0]) == (4, first_step)
            torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)
            assert_bitwise(state(result), state(ranks[0]))


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_with_all_options_goes_on_with_one_two_and_four(tmp_path: Path) -> None:
    """Polar, staggered, with a trace rule that keeps some layers as they are."""
    alone = one_rank(tmp_path, **ALL_AT_ONCE)
    done, turns = (int(alone["curvature"][key]) for key in ("refreshes", "turns"))
    assert 0 < done < turns
    resumed = [
        one_rank(tmp_path, resume=results_folder() / "all_at_once", **ALL_AT_ONCE),
        *two_ranks("all_at_once_resumed"),
        *four_ranks("four_all_at_once_resumed"),
    ]
    assert [result["world_size"] for result in resumed] == [1, 2, 2, 4, 4, 4, 4]
    for result in resumed:
        assert result["steps"][0] == 5
        torch.testing.assert_close(state(result), state(alone), rtol=1e-8, atol=1e-8)
    for result, unbroken in zip(resumed[1:3], two_ranks("all_at_once"), strict=True):
        assert_bitwise(state(result), state(unbroken))


@pytest.mark.slow
def test_two_ranks_under_slurm_are_those_of_lightnings_launcher_also_when_the_job_is_requeued(tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/told\n")
    scontrol.chmod(0o755)
    requeued = ("saved_for_slurm", "sharded_saved_for_slurm")
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    ended = lone_ranks(tmp_path, "slurm", "halves", *requeued, PATH=path)
    printed = {name: "".join(one.printed for one in ranks) for name, ranks in ended.items()}
    assert [one.status for ranks in ended.values() for one in ranks] == [0] * 6, printed
    for result, launched in zip(results(tmp_path, "halves", 2, printed["halves"]), two_ranks("halves"), strict=True):
        assert (result["environment"], result["world_size"]) == ("SLURMEnvironment", 2)
        assert_bitwise(state(result), state(launched))
    for name in requeued:
        for result in results(tmp_path, name, 2, printed[name]):
            assert [result[fit]["step"] for fit in ("unbroken", "broken", "resumed")] == [STEPS] * 3
            assert 3 <= result["resumed"]["from"] <= 6
            assert_bitwise(result["resumed"]["weights"], result["unbroken"]["weights"])
    assert (tmp_path / "told").read_text() == "requeue 4321\n" * len(requeued)


@pytest.mark.slow
@pytest.mark.long  # all forked ranks have torchrun's variables
def test_two_ranks_under_torchrun_are_those_of_lightnings_launcher_and_one_that_dies_ends_the_other(
    tmp_path: Path,
) -> None:
    status, printed = torchrun(2, tmp_path, "halves", "dies")
    for result, launched in zip(results(tmp_path, "halves", 2, printed), two_ranks("halves"), strict=True):
        assert_bitwise(state(result), state(launched))
    assert status not in (0, None)
    assert "Ended after" not in printed
    assert "exitcode  : 13" in printed
    assert not list(tmp_path.glob("dies-*.pt"))


@pytest.mark.long
def test_two_nodes_are_one_process(tmp_path: Path) -> None:
    nodes = two_nodes(tmp_path, "ddp", "fsdp2")
    printed = "".join(words for _, words in nodes)
    assert [status for status, _ in nodes] == [0, 0], printed[-6000:]
    for name, kind in (("ddp", Module), ("fsdp2", Sharded)):
        alone = one_rank(tmp_path, kind=kind, max_epochs=1)
        for result in results(tmp_path, name, 2, printed):
            assert (result["environment"], result["world_size"]) == ("TorchElasticEnvironment", 2)
            for part in ("weights", "curvature"):
                found, expected = (without_words(one[part]) for one in (result, alone))
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("node", ["dies", "dies_on_the_second"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_that_dies_on_either_node_ends_both(tmp_path: Path, strategy: str, node: str) -> None:
    """In seconds, not in the minutes for which a process group waits."""
    start = time.monotonic()
    nodes = two_nodes(tmp_path, f"{strategy}_{node}")
    assert time.monotonic() - start < 150
    assert all(status != 0 for status, _ in nodes), "".join(words for _, words in nodes)[-6000:]
    assert not list(tmp_path.glob("*.pt"))


def test_leaving_saving_and_restoring_say_nothing_to_other_ranks() -> None:
    """In the middle of a window, whose sums are on their way: another rank may have died."""
    communicator = FakeCommunicator()
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    curvature = Curvature(model, update_every_n_steps=1)
    curvature.connect(communicator, bucket_fn=by_size(1), is_sync_step=lambda: True)
    curvature.solve = lambda problems: {size: (blocks, damping > 0) for size, (blocks, damping) in problems.items()}
    model(torch.randn(4, 3)).sum().backward()
    curvature.update()
    model(torch.randn(4, 3)).sum().backward()
    said = list(communicator.log)
    assert said[-1][0] == "all_reduce"
    saved = curvature.state_dict()
    curvature.load_state_dict(saved)
    curvature.close()
    assert communicator.log == said
