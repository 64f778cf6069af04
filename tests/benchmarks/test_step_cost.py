"""The cost of a step: how it is measured, and its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.common.workloads import Workload, rows
from benchmarks.step_cost import call_counts, figures, memory, parts, rounds, timeline, workloads
from benchmarks.step_cost.profiler import PackageProfile
from lightning_thor import Curvature, Thor
from tests.helpers.benchmarks import CPU, step_cost, step_seconds
from tests.helpers.commands import python_module

SMALL = Workload(lambda: nn.Sequential(nn.Linear(4, 10)), rows(8, 4), "small")


@pytest.mark.slow
def test_the_step_cost_is_printed_and_merged_into_its_file(tmp_path: Path) -> None:
    out = tmp_path / "step_cost.json"
    out.write_text(json.dumps({"gpt": step_cost()}), encoding="utf-8")
    options = ("--workload", "mlp", "--rounds", "4", "--threads", "1", "--peers", "--out", str(out))
    printed = python_module("benchmarks.step_cost", *options, columns=400)
    results = json.loads(out.read_text(encoding="utf-8"))
    assert list(results) == ["gpt", "mlp"]  # what was measured before stays
    measured, summary = results["mlp"], results["mlp"]["summary"]
    assert (measured["environment"]["threads"], measured["environment"]["torch"]) == (1, torch.__version__)
    assert summary["rounds"] == 4
    assert {"adamw", "thor_plain", "thor_refresh", "thor_staggered", "singd_plain", "singd_refresh"} <= summary.keys()
    state = summary["state_over_parameters"]
    assert (state["sgd"], round(state["adamw"], 2)) == (1.0, 2.0)
    assert state["thor"] > 1.0
    # The tables of the terminal and the README's come from this file and agree.
    for cells in (figures.cells, figures.parts_cells):
        (row,) = cells({"mlp": measured})
        assert all(cell in printed for cell in row)


def test_a_refresh_and_a_plain_step_are_told_apart() -> None:
    """Exactly the steps in which the curvature was inverted count as refreshes."""
    measured = rounds.measure(SMALL, rounds=6, device=CPU)
    assert measured["refreshes"] == {"thor": [True, False] * 3}
    assert {len(values) for values in measured["seconds"].values()} == {6}


def test_ratios_are_taken_within_a_round_and_weighed_by_the_interval() -> None:
    summary = figures.summarise(step_seconds())
    assert [summary[kind] for kind in ("adamw", "thor_plain", "thor_refresh")] == [[1.5] * 3, [2.0] * 3, [4.0] * 3]
    expected = {"1": 4.0, "10": (9 * 2.0 + 4.0) / 10, "100": (99 * 2.0 + 4.0) / 100, "staggered": 2.5}
    assert summary["amortised"] == pytest.approx(expected)
    assert summary["state_over_parameters"] == {"sgd": 1.0, "adamw": 2.0, "thor": 3.5}


def test_the_unevenness_of_thor_weighs_its_two_kinds_of_step_as_the_interval_does() -> None:
    """One step of ten at the interval 10 is a refresh: the 99th percentile is one, the median is none."""
    measured = step_seconds()
    measured["seconds"]["sgd"] = [1.0] * 4
    # Three of the four timed steps are refreshes: counted as they come, the median would be one too.
    measured["seconds"]["thor"], measured["refreshes"]["thor"] = [3.0, 3.0, 3.0, 2.0], [True, True, True, False]
    uneven = figures.summarise(measured)["p99_over_p50"]
    assert (uneven["thor"], uneven["sgd"]) == (1.5, 1.0)


def test_too_few_rounds_are_refused() -> None:
    measured = {"seconds": {name: [1.0] for name in rounds.OPTIMIZERS}, "refreshes": {"thor": [True]}}
    with pytest.raises(ValueError, match=r"thor_plain.*take more rounds than 1"):
        figures.summarise(measured)


def test_both_scales_have_the_same_workloads_and_a_gpu_compiled_ones() -> None:
    more = workloads.WORKLOADS["gpu"].keys() - workloads.WORKLOADS["cpu"].keys()
    assert workloads.WORKLOADS["cpu"].keys() < workloads.WORKLOADS["gpu"].keys()
    assert all(name.removesuffix("_compiled") in workloads.WORKLOADS["cpu"] for name in more)


# ── parts ──


def test_the_clocks_change_no_number() -> None:
    trained = []
    for is_timed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
        curvature = Curvature(model, update_every_n_steps=1)
        preconditioner: Any = parts.TimedPreconditioner(curvature, CPU) if is_timed else curvature
        optimizer = Thor(model.parameters(), match_rms=None, preconditioner=preconditioner)
        loss = model(torch.randn(2, 3, 8, 8)).square().sum()
        if is_timed:
            with PackageProfile() as profile:
                loss.backward()
            assert profile.seconds > 0
        else:
            loss.backward()
        optimizer.step()
        trained.append(list(model.parameters()))
    assert all(seconds > 0 for seconds in preconditioner.seconds.values())
    torch.testing.assert_close(*trained, rtol=0, atol=0)


def test_the_floor_counts_the_multiplications_of_each_part() -> None:
    """By hand, for one linear layer from 6 to 4 on 10 rows in blocks of 3 and 2."""
    curvature = Curvature(nn.Linear(6, 4, bias=False), block_size=3)
    n_rows = parts.count_rows(curvature, lambda: curvature.model(torch.randn(10, 6)))
    assert parts.floor_flops(curvature, n_rows) == {
        "statistics": 2 * 10 * (6 * 3 + 4 * 2),
        "inversion": 2 * 3**3 + 2 * 2**3,
        "preconditioning": 2 * 24 * (3 + 2),
        "update": 0,
    }


@pytest.mark.parametrize(("max_rows", "n_rows"), [(None, 2 * 6 * 6), (36, 36)])
def test_the_floor_of_a_convolution_counts_its_positions_up_to_max_rows(max_rows: int | None, n_rows: int) -> None:
    curvature = Curvature(nn.Conv2d(2, 3, 3, bias=False), max_rows=max_rows)  # A of width 18, G of width 3
    found = parts.count_rows(curvature, lambda: curvature.model(torch.zeros(2, 2, 8, 8)))
    assert parts.floor_flops(curvature, found)["statistics"] == 2 * n_rows * (18 * 18 + 3 * 3)


def test_the_parts_are_shares_of_a_step_of_sgd() -> None:
    measured = parts.measure_parts(SMALL, rounds.make_batches(SMALL, CPU), 2, CPU)
    assert measured["parts"].keys() == measured["floor"].keys() == set(parts.PARTS)
    assert all(measured["parts"][part] > measured["floor"][part] > 0 for part in parts.PARTS[:3])
    assert measured["gflops"] > 0


# ── calls ──


def test_a_pair_and_a_step_run_through_little_code() -> None:
    counts = call_counts.count()
    assert counts.keys() == call_counts.LIMITS.keys()
    assert {name: n for name, n in counts.items() if not 0 < n <= call_counts.LIMITS[name]} == {}


def test_calls_are_those_of_the_package_alone_and_as_many_as_are_made() -> None:
    net = nn.Linear(2, 2)
    curvature = Curvature(net)
    with PackageProfile() as profile:
        net(torch.randn(1, 2))
        for _ in range(3):
            curvature.is_due()
    assert sys.getprofile() is None
    counted = {code.co_name: n for code, n in profile.calls.items()}
    assert counted["is_due"] >= 3
    assert "forward" not in counted
    assert sum(counted.values()) <= profile.n_calls
    assert profile.n_functions <= profile.n_calls
    assert "curvature/curvature.py" in profile.files


# ── memory ──


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's own peak")
def test_the_memory_of_adamw_holds_gradients_and_two_moments() -> None:
    n_bytes = memory.growth("mlp", "adamw", "cpu", threads=1)
    assert n_bytes is not None
    parameters = 4 * (784 * 512 + 512 + 2 * (512 * 512 + 512) + 512 * 10 + 10)
    assert 3 * parameters < n_bytes < 3 * parameters + 50 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's own peak")
def test_the_peak_of_memory_is_seen_after_it_is_gone() -> None:
    now = memory.resident_bytes("VmRSS")
    torch.ones(64 * 2**20 // 4)
    assert memory.resident_bytes("VmHWM") - now > 50 * 2**20


# ── whole intervals, and what host and device do ──


def test_whole_intervals_are_told_instead_of_what_single_steps_add_up_to() -> None:
    result = step_cost()
    measured = {**step_seconds(), "intervals": {"sgd": [1.0, 2.0], "thor": [1.5, 3.0], "thor_staggered": [1.0, 2.0]}}
    summary = figures.summarise(measured)
    assert summary["intervals"] == {"thor": [1.5] * 3, "thor_staggered": [1.0] * 3}
    places = [figures.HEADS.index(head) for head in ("every 10", "staggered, every 10")]
    for told, wanted in ((result["summary"], ["2.20", "2.50"]), (summary, ["1.50", "1.00"])):
        (row,) = figures.cells({"net": {**result, "summary": told}})
        assert [row[place] for place in places] == wanted


def test_an_interval_has_its_steps_and_one_refresh() -> None:
    built: list[Any] = []

    class Counted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            built.append(self)
            return super().forward(x)

    workload = Workload(lambda: Counted(4, 10), rows(8, 4), "small")
    seconds = rounds.measure_intervals(workload, 2, CPU, ("sgd", "thor"))
    assert {name: len(each) for name, each in seconds.items()} == {"sgd": 2, "thor": 2}
    assert len(built) == 2 * 3 * workloads.STAGGERED_INTERVAL


def test_a_kernel_belongs_to_the_phase_that_launched_it() -> None:
    """The optimizer's kernel runs when forward and backward, whose work is queued, are long over on the host."""

    def event(cat: str, name: str, start: float, length: float, correlation: int = 0) -> dict[str, Any]:
        return {"cat": cat, "name": name, "ts": start, "dur": length, "args": {"correlation": correlation}}

    first, second = timeline.PHASES
    found = timeline.timeline(
        [
            event("user_annotation", first, 1000.0, 500.0),
            event("user_annotation", second, 1500.0, 500.0),
            event("cuda_runtime", "launch", 1100.0, 5.0, 1),
            event("cuda_runtime", "launch", 1600.0, 5.0, 2),
            event("kernel", "product", 1200.0, 2000.0, 1),
            event("kernel", "update", 3200.0, 1000.0, 2),
            event("kernel", "of another step", 9000.0, 1000.0, 3),
        ]
    )
    assert found.host == {first: [(0.0, 0.5)], second: [(0.5, 0.5)]}
    assert found.device == {first: [(0.2, 2.0)], second: [(2.2, 1.0)]}
    assert found.end == pytest.approx(3.2)


@pytest.mark.slow
def test_a_picture_shows_each_kind_of_step(tmp_path: Path) -> None:
    found = timeline.trace(SMALL, rounds.make_batches(SMALL, CPU), CPU)
    assert found.keys() == {"SGD", "THOR, plain step", "THOR, refresh step"}
    timeline.draw(found, "small", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
