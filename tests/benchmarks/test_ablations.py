"""The ablations: that each setting is what its name says, and what is made of their trainings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import readme
from benchmarks.studies import ablations
from benchmarks.studies.ablation_settings import (
    BASE,
    DEFAULT,
    NOISE,
    RATES,
    AveragedWeights,
    Falling,
    Setting,
    WithSampledTargets,
    contender_of,
    model_of,
    settings,
)
from benchmarks.time_to_target.tasks import CPU as TASKS
from benchmarks.time_to_target.tasks import Data, Task, cross_entropy, draws, squared_error
from benchmarks.time_to_target.training import lr_share, train
from lightning_thor import Curvature, Thor
from tests.helpers.benchmarks import CPU, ENVIRONMENT

ALL = settings(steps=50, rows=128)


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))


def small_data(folder: Path | None, batch_size: int, device: torch.device) -> Data:
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(5))
    return Data(draws(rows, rows, batch_size), (rows[:7], rows[:7]), (rows[7:], rows[7:]))


SMALL = Task(
    "small", "squared error", 1.0, False, 9, 6, 8, 0.0, small_data, small_net, squared_error, squared_error
)  # fmt: skip


# ── settings ──


@pytest.mark.parametrize("name", [name for name in ALL if name != DEFAULT])
def test_a_setting_changes_one_thing_and_not_to_the_default(name: str) -> None:
    changed = {
        field.name: getattr(ALL[name], field.name)
        for field in dataclasses.fields(Setting)
        if getattr(ALL[name], field.name) != getattr(Setting(), field.name)
    }
    ((kind, value),) = changed.items()
    if kind in ("curvature", "optimizer"):
        ((option, own),) = value.items()
        parameters = inspect.signature(Curvature if kind == "curvature" else Thor).parameters
        assert own != BASE[kind].get(option, parameters[option].default)
        # Its name says so.
        assert name.startswith(option.split("_")[0]) or f"{option}={own}" == name


@pytest.mark.parametrize("mode", ablations.MODES)
@pytest.mark.parametrize("name", ALL)
def test_every_setting_trains_in_both_modes(name: str, mode: str) -> None:
    setting = settings(SMALL.tuning_steps, rows=8)[name]
    contender = contender_of(name, setting, mode, 1e-2, SMALL.tuning_steps)
    task = dataclasses.replace(SMALL, model=model_of(SMALL, setting))
    data = small_data(None, 8, CPU)
    ran = train(task, data, contender, contender.rates[0], seed=0, tuning=True, device=CPU)
    assert len(ran["values"]) == 1
    assert math.isfinite(ran["values"][0])


def test_the_first_seed_is_none_of_the_races() -> None:
    assert ablations.FIRST_SEED > 10
    assert ablations.FIRST_SEED + 10 < 1000  # the seed that tunes


def test_the_default_max_rows_leaves_nothing_out_so_a_quarter_is_less() -> None:
    """All rows are no setting of their own: here they are what the default takes."""
    default = inspect.signature(Curvature).parameters["max_rows"].default
    for workload, rows in (("autoencoder", 128), ("gpt", 16 * 64)):
        assert TASKS[workload].batch_size * (64 if workload == "gpt" else 1) == rows <= default


def test_damping_falls_as_the_rate_does_after_its_rise() -> None:
    damping = Falling(2.0, floor=0.1, steps=200)
    for step in range(200):
        expected = 2.0 if step < 10 else max(0.1, 2.0 * lr_share(step, 200))
        assert damping(step) == pytest.approx(expected), step
    assert damping(199) == 0.1


def test_averaged_weights_are_the_mean_of_those_after_the_last_steps() -> None:
    def trained(average: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2).double()
        plain = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer: Any = AveragedWeights(plain, net.parameters(), begin=3, end=7) if average else plain
        seen = []
        for _ in range(7):
            net(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in net.parameters())
            seen.append(net.weight.detach().clone())
        return seen

    plain, averaged = trained(average=False), trained(average=True)
    for own, other in zip(averaged[:6], plain[:6], strict=True):
        assert torch.equal(own, other)
    torch.testing.assert_close(averaged[6], torch.stack(plain[3:]).mean(0))


# ── sampled targets ──


def sampled(loss: Any, targets: Tensor) -> tuple[WithSampledTargets, Curvature, Tensor]:
    """A linear network after a forward and a backward pass on many rows, its curvature, and the rows."""
    torch.manual_seed(0)
    net = WithSampledTargets(nn.Linear(4, 3), loss)
    net.curvature = Curvature(net, averaging=0.0, max_rows=None, update_every_n_steps=10)
    x = torch.randn(len(targets), 4)
    loss(net(x), targets).backward()
    return net, net.curvature, x


def G_of(curvature: Curvature) -> Tensor:
    curvature.update()
    (layer,) = curvature.state_dict()["layers"].values()
    G: Tensor = layer["G"]
    return G.reshape(3, 3)


def test_with_sampled_targets_G_is_the_fisher_matrix_and_not_that_of_the_data() -> None:
    rows = 40_000
    # Far off, so that G of the data would be large.
    _, curvature, _ = sampled(squared_error, torch.full((rows, 3), 9.0))
    torch.testing.assert_close(G_of(curvature), torch.eye(3), rtol=0, atol=0.03)
    net, curvature, x = sampled(cross_entropy, torch.zeros(rows, dtype=torch.long))
    p = net.net(x).softmax(-1).detach()
    torch.testing.assert_close(G_of(curvature), (p.sum(0).diag() - p.T @ p) / rows, rtol=0, atol=0.01)


def test_with_sampled_targets_the_gradient_is_that_of_the_data_and_between_refreshes_nothing_is_drawn() -> None:
    targets = torch.randn(8, 3)
    net, curvature, x = sampled(squared_error, targets)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(net.net.state_dict())
    squared_error(plain(x), targets).backward()
    assert isinstance(net.net, nn.Linear)
    assert net.net.weight.grad is not None
    assert torch.equal(net.net.weight.grad, plain.weight.grad)
    curvature.update()
    before = torch.get_rng_state()
    squared_error(net(x), targets)
    assert torch.equal(torch.get_rng_state(), before)
    net.eval()
    assert torch.equal(net(x), plain(x))


# ── figures ──


def run(name: str, seed: int, final: float | None, steps: int = 6, workload: str = "gpt") -> dict[str, Any]:
    return {"workload": workload, "mode": "polar", "setting": name, "seed": seed, "steps": steps, "final": final}


def made_up_results() -> dict[str, Any]:
    runs = [
        run("damping=2", 100, 1.5),
        run("damping=2", 101, 2.75),
        run(DEFAULT, 100, 2.0),
        run(DEFAULT, 101, 3.0),
        run(NOISE, 100, 2.001),
        run("stagger=True", 101, None),
        run("nesterov=True", 100, 2.25),
        run("nesterov=True", 102, 9.0),  # a seed that the defaults have not had yet
        run(DEFAULT, 100, 7.0, steps=5),  # of another length
    ]
    about = {"words": "a text", "steps": 6, "rates": {"polar": 0.03}, "environment": ENVIRONMENT}
    return {"summary": {"gpt": about}, "runs": {str(i): one for i, one in enumerate(runs)}}


def test_a_difference_is_to_the_defaults_on_the_same_seed_and_of_the_same_length() -> None:
    finals = ablations.finals_of(made_up_results())
    assert list(finals) == ["autoencoder natural", "autoencoder polar", "gpt natural", "gpt polar"]
    assert ablations.differences(finals["gpt polar"]) == {
        NOISE: [0.001],
        "damping=2": [-0.5, -0.25],
        "nesterov=True": [0.25],
        "stagger=True": [math.inf],
    }


def test_the_page_takes_the_table_from_the_trainings() -> None:
    block = readme.ablations_block(made_up_results())
    assert "| all at their defaults: the loss | – | – | – | 2.500 (2.000 to 3.000) |" in block
    assert "| damping=2 | – | – | – | -0.375 (-0.500 to -0.250) |" in block
    assert "| stagger=True | – | – | – | not finite |" in block
    assert "gpt: a text, 6 steps, lr 0.03 (polar)" in block
    assert "averaging=0" not in block  # not trained
    # In the order of the settings.
    assert block.index(NOISE) < block.index("damping=2") < block.index("nesterov=True")


def test_the_command_draws_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made_up.json"
    out.write_text(json.dumps(made_up_results()), encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "220")
    ablations.main(["--draw", f"--out={out}"])
    printed = capsys.readouterr().out
    for row in ablations.cells(made_up_results()):
        assert all(cell in printed for cell in row)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")


def test_every_setting_is_trained_once_in_both_modes_on_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "autoencoder", SMALL)
    done: list[float] = []

    def trained(task: Task, data: Data, contender: Any, lr: float, *, tuning: bool, **_: Any) -> Mapping[str, Any]:
        assert tuning, "judged by the test split"
        done.append(lr)
        return {"values": [float(len(done))]}

    monkeypatch.setattr(ablations, "train", trained)
    out = tmp_path / "ablations.json"
    for _ in range(2):
        ablations.main(["--workload=autoencoder", "--steps=2", "--seeds=2", f"--out={out}"])
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"].values()
    expected = [(seed, name, mode) for seed in (100, 101) for name in ALL for mode in ablations.MODES]
    assert [(one["seed"], one["setting"], one["mode"]) for one in runs] == expected
    natural, polar = RATES["autoencoder"].values()
    assert done[:4] == [natural, polar, 1.01 * natural, 1.01 * polar]
    assert len(done) == len(expected)


@pytest.mark.parametrize("values", [[], [math.inf], [0.5], [-0.5], [-1.0, *[0.1] * 8, 50.0, math.inf]])
def test_the_picture_shows_the_defaults_and_all_that_is_better(values: list[float]) -> None:
    low, high = ablations.limits(values)
    assert low < 0 < high < 10
    assert all(value > low for value in values)
