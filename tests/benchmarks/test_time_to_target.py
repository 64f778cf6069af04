"""The race: that all contenders run it under the same conditions, and what is made of its trainings."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import readme
from benchmarks.common.contenders import CONTENDERS, DEFAULT_RATE, TRIALS, Contender, FlatMuon, newton_schulz
from benchmarks.common.results import Results
from benchmarks.time_to_target import race
from benchmarks.time_to_target.pictures import save_curves, save_robustness
from benchmarks.time_to_target.tasks import TASKS, Data, Task, cross_entropy, draws, squared_error
from benchmarks.time_to_target.training import check_steps, lr_share, train, train_in_turns
from benchmarks.time_to_target.tuning import HEAT, best_rate
from examples.char_gpt import CharGPT
from tests.helpers.benchmarks import CPU, ENVIRONMENT
from tests.helpers.commands import python_module

HERE: dict[str, str | int] = {"date": "2026-01-02", "threads": 1}


def small_net() -> nn.Module:
    # Without a bias, which the batch norm would leave without a gradient.
    features = (nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(16, 8), nn.Linear(8, 3))


def small_data(folder: Path | None, batch_size: int, device: torch.device) -> Data:
    torch.manual_seed(5)
    images, labels = torch.randn(30, 1, 4, 4), torch.randint(3, (30,))
    return Data(draws(images, labels, batch_size), (images[:7], labels[:7]), (images[7:], labels[7:]))


SMALL = Task(
    "small", "loss", 1.0, False, 6, 4, 8, 0.0, small_data, small_net, cross_entropy, cross_entropy, checks=3
)  # fmt: skip


def run(contender: Contender, lr: float = 1e-3, task: Task = SMALL, seed: int = 0, tuning: bool = False) -> Any:
    return train(task, small_data(None, 8, CPU), contender, lr, seed=seed, tuning=tuning, device=CPU)


# ── contenders ──


@pytest.mark.parametrize("net", ["convolutions", "gpt"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_trains_every_parameter(name: str, net: str) -> None:
    torch.manual_seed(0)
    is_gpt, contender = net == "gpt", CONTENDERS[name]
    model = CharGPT(5, layers=1, width=8, heads=2, context=4) if is_gpt else small_net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = contender.build(model, contender.rates[0], contender.options, is_gpt)
    for _ in range(2):
        inputs, targets = small_data(None, 8, CPU).draw(torch.Generator())
        if is_gpt:
            inputs = targets = torch.randint(5, (6, 4))
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_every_contender_has_the_same_number_of_rates_over_two_decades() -> None:
    for name, contender in CONTENDERS.items():
        if name != "thor_untuned":  # its point is to have but its default
            assert len(contender.rates) == TRIALS, name
            assert contender.rates[-1] / contender.rates[0] == pytest.approx(100), name
    assert len({contender.colour for contender in CONTENDERS.values()}) == len(CONTENDERS)


def test_muon_on_a_kernel_is_muon_on_its_matrix() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 2, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    ours, torchs = FlatMuon([kernel], lr=0.1), torch.optim.Muon([matrix], lr=0.1)
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        torchs.step()
        ours.zero_grad()
        assert kernel.grad is None
    # torch's iteration is in bfloat16, whose 8 bits the quintic's slope of 3.4 makes coarser at each of 5 steps.
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), rtol=0, atol=0.1 * 3 * 0.05)


@pytest.mark.parametrize("size", [(5, 9), (9, 5)])
def test_the_newton_schulz_iteration_applies_its_polynomial_to_the_singular_values(size: tuple[int, int]) -> None:
    matrix, (a, b, c) = torch.randn(size, dtype=torch.float64), (3.4445, -4.7750, 2.0315)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    s = S / S.norm()
    for _ in range(3):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(matrix, (a, b, c), 3, 1e-7), U @ s.diag() @ Vh)


# ── training ──


def test_contenders_start_from_the_same_weights_and_see_the_same_batches() -> None:
    data, seen = small_data(None, 8, CPU), {name: list[Tensor]() for name in ("thor", "sgd", "soap")}
    for name, tensors in seen.items():

        def model(tensors: list[Tensor] = tensors) -> nn.Module:
            made = small_net()
            tensors.extend(p.detach().clone() for p in made.parameters())
            return made

        def draw(generator: torch.Generator, tensors: list[Tensor] = tensors) -> tuple[Tensor, Tensor]:
            tensors.extend(batch := data.draw(generator))
            return batch

        task = dataclasses.replace(SMALL, model=model)
        train(task, data._replace(draw=draw), CONTENDERS[name], 1e-3, seed=3, tuning=False, device=CPU)
    assert len(seen["thor"]) == len(list(small_net().parameters())) + 2 * SMALL.steps
    torch.testing.assert_close(seen["thor"], seen["sgd"], rtol=0, atol=0)
    torch.testing.assert_close(seen["soap"], seen["sgd"], rtol=0, atol=0)


def test_weights_decay_alike_whatever_the_learning_rate_and_vectors_do_not() -> None:
    models = []
    for lr in (0.0, 1e-30):
        torch.manual_seed(0)
        models.append(small_net())
        task = dataclasses.replace(SMALL, decay=0.1, model=lambda: models[-1])
        run(CONTENDERS["sgd"], lr, task)
    left = torch.tensor([1 - 0.1 * lr_share(step, 6) for step in range(6)]).prod()
    torch.manual_seed(0)
    for p, *trained in zip(small_net().parameters(), *(model.parameters() for model in models), strict=True):
        for one in trained:
            torch.testing.assert_close(one, p * left if p.dim() >= 2 else p)


@pytest.mark.parametrize(("tuning", "expected"), [(True, 1.0), (False, 4.0)])
def test_tuning_looks_at_the_validation_split_and_the_rest_at_the_test_split(tuning: bool, expected: float) -> None:
    inputs, targets = torch.ones(4, 2), torch.zeros(4, 2)
    data = Data(lambda generator: (inputs, inputs), (inputs, targets), (inputs, targets + 3))
    task = dataclasses.replace(
        SMALL, model=lambda: nn.Linear(2, 2), loss=squared_error, score=lambda _, y: y.mean() + 1.0
    )
    still = Contender("still", lambda *_: StandingStill(), (1.0,), "black")
    values = train(task, data, still, 1.0, seed=0, tuning=tuning, device=CPU)["values"]
    assert values == [expected] * len(values)


class StandingStill:
    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []

    def step(self) -> None:
        """Nothing."""

    def zero_grad(self) -> None:
        """Nothing."""


class Fails(StandingStill):
    def step(self) -> None:
        torch.linalg.cholesky(-torch.eye(2))


def test_the_clock_sees_the_optimizer_built_and_stands_still_in_validation() -> None:
    def slow_score(outputs: Tensor, targets: Tensor) -> Tensor:
        time.sleep(0.5)
        return torch.zeros(())

    def slow_build(*_: Any) -> StandingStill:
        time.sleep(0.2)
        return StandingStill()

    quick = dataclasses.replace(SMALL, score=slow_score)
    seconds = run(Contender("slow", slow_build, (1.0,), "black"), task=quick)["seconds"]
    assert 0.2 <= seconds[0] <= seconds[-1] < 1.0  # three validations take 1.5


def test_a_training_that_diverges_or_fails_in_linear_algebra_ends_with_none() -> None:
    assert run(CONTENDERS["sgd"], 1e30)["values"] == [None]
    assert run(Contender("fails", lambda *_: Fails(), (1.0,), "black"))["values"] == [None]


def test_in_turns_each_trains_as_it_does_alone() -> None:
    together = {name: (contender, contender.rates[1 % len(contender.rates)]) for name, contender in CONTENDERS.items()}
    together["diverges"] = (CONTENDERS["sgd"], 1e30)
    records = train_in_turns(SMALL, small_data(None, 8, CPU), together, seed=0, tuning=False, device=CPU)
    for name, (contender, lr) in together.items():
        alone = run(contender, lr)
        assert records[name]["values"] == alone["values"], name
        assert len(records[name]["seconds"]) == len(alone["seconds"])


def test_turns_go_from_one_check_to_the_next_and_each_clock_sees_its_own_steps_alone() -> None:
    order: list[str] = []

    class Stepping(StandingStill):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self.seconds = name, seconds

        def step(self) -> None:
            order.append(self.name)
            time.sleep(self.seconds)

    together = {
        name: (Contender(name, lambda *_, own=(name, seconds): Stepping(*own), (1.0,), "black"), 1.0)
        for name, seconds in (("slow", 0.1), ("quick", 0.0))
    }
    records = train_in_turns(SMALL, small_data(None, 8, CPU), together, seed=0, tuning=False, device=CPU)
    assert order == ["slow", "slow", "quick", "quick"] * 3
    assert records["slow"]["seconds"][-1] >= 0.6
    assert records["quick"]["seconds"][-1] < 0.3


def test_the_schedule_rises_to_its_peak_once_and_falls() -> None:
    rates = [lr_share(step, 200) for step in range(200)]
    assert max(rates) == rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-3


# ── figures ──


def test_intervals_are_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom, t in enumerate(race.STUDENT, start=1):
        assert t == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)
    values = [1.0, 4.0, 2.5, 7.0]
    low, high = stats.t.interval(0.95, 3, loc=3.625, scale=stats.sem(values))
    mean, half = race.interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=2e-3)


def made_up_runs() -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[tuple[list[float | None], list[float]]]] = {
        "thor": [([2.0, 0.9, 0.8], [1.0, 2.0, 3.0]), ([0.5, 0.4, 0.4], [2.0, 3.0, 4.0])],
        "adamw": [([2.0, 2.0, 1.0], [1.0, 2.0, 4.0]), ([2.0, 1.0, 1.0], [3.0, 4.0, 5.0])],
        "sgd": [([2.0, 2.0, 1.0], [1.0, 2.0, 3.0]), ([2.0, None], [1.0, 2.0])],
    }
    return {name: [{"values": values, "seconds": seconds} for values, seconds in own] for name, own in runs.items()}


def made_up_summary() -> dict[str, Any]:
    task, rates = dataclasses.replace(SMALL, steps=30), {"thor": 0.003, "adamw": 0.0003, "sgd": 0.03}
    return {
        "words": "small", "scale": "cpu", "metric": "loss", "target": 1.0, "higher_is_better": False,
        "environment": ENVIRONMENT,
        "steps": [10, 20, 30],
        "tuning": {"thor": {"0.001": 2.0, "0.003": 0.5}, "adamw": {"0.0003": 1.0, "0.001": None}, "sgd": {}},
        "optimizers": race.summarise(task, made_up_runs(), rates, CONTENDERS),
    }  # fmt: skip


def test_steps_and_seconds_to_the_target_are_those_of_the_first_check_that_reached_it() -> None:
    thor, adamw, _ = made_up_summary()["optimizers"].values()
    assert thor["steps_to_target"][0] == (20 + 10) / 2
    assert thor["seconds_to_target"][0] == (2 + 2) / 2
    assert adamw["seconds_to_target"][0] == (4 + 4) / 2
    # On either seed half of AdamW's seconds: no spread.
    assert thor["seconds_ratio"] == [0.5, 0.5, 0.5]
    assert adamw["seconds_ratio"] is None  # the fastest of the others, to which all ratios are
    assert thor["final"][0] == pytest.approx(0.6)
    assert not thor["lr_is_at_an_end_of_its_grid"]
    assert adamw["lr_is_at_an_end_of_its_grid"]


def test_a_target_that_some_seed_missed_has_no_mean_but_is_told() -> None:
    summary = made_up_summary()
    sgd = summary["optimizers"]["sgd"]
    assert (sgd["reached"], sgd["steps_to_target"], sgd["seconds_ratio"], sgd["final"]) == (1, None, None, None)
    *_, row = race.cells({"small": summary})
    assert row[1] == "momentum SGD"
    assert "1 of 2 got there" in row
    assert "not finite" in row


def test_the_best_rate_is_the_one_with_the_best_value_that_is_finite() -> None:
    falling, rising = SMALL, dataclasses.replace(SMALL, higher_is_better=True)
    final = {0.1: 3.0, 0.2: 2.0, 0.3: None}
    assert best_rate(falling, final, CONTENDERS["thor"]) == 0.2
    assert best_rate(rising, final, CONTENDERS["thor"]) == 0.1
    assert best_rate(falling, {}, CONTENDERS["thor_untuned"]) == DEFAULT_RATE


def test_the_pictures_take_trainings_that_ended_early_or_were_never_tuned(tmp_path: Path) -> None:
    save_curves(made_up_summary(), tmp_path / "new" / "curves.png")
    save_robustness(made_up_summary(), tmp_path / "rates.png")
    for path in (tmp_path / "new" / "curves.png", tmp_path / "rates.png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_readme_takes_the_table_from_the_summary() -> None:
    block = readme.time_to_target_block({"summary": {"small": made_up_summary()}, "runs": {}})
    assert "| small: loss ≤ 1; 2 seeds | THOR | 0.003 | 15 ± 64 | 2.0 ± 0.0 | 0.50 (0.50–0.50) |" in block
    assert "after 2 learning rates" in block
    assert "A processor, 2 threads" in block


# ── results ──


def test_finished_trainings_are_kept_and_not_repeated(tmp_path: Path) -> None:
    path, done = tmp_path / "results.json", []

    def now() -> dict[str, Any]:
        done.append(1)
        return {"values": [1.0]}

    for _ in range(2):
        results = Results(path, {**HERE, "date": str(len(done))})  # another day is no other machine
        assert results.get_or_train("gpt thor lr=1", [1], now) == {"values": [1.0]}
    assert len(done) == 1
    results.get_or_train("gpt thor lr=1", [2], now)  # other options
    Results(path, {**HERE, "threads": 2}).get_or_train("gpt thor lr=1", [1], now)  # another machine
    assert len(done) == 3


def test_what_another_process_wrote_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path, HERE).put("summary", "gpt", {"words": "old"})
    Results(path, HERE).get_or_train("gpt sgd", [], lambda: {"values": [0.0]})
    first, second = Results(path, HERE), Results(path, HERE)
    first.forget("gpt", "sgd")
    first.get_or_train("gpt thor", [], lambda: {"values": [1.0]})
    first.put("summary", "gpt", {"words": "new"})
    second.get_or_train("digits thor", [], lambda: {"values": [2.0]})
    second.put("summary", "digits", {"words": "digits"})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [key.split()[:2] for key in content["runs"]] == [["gpt", "thor"], ["digits", "thor"]]
    assert content["summary"] == {"gpt": {"words": "new"}, "digits": {"words": "digits"}}


def test_forgetting_drops_one_optimizer_of_one_workload_and_the_heats_it_ran_in(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", HERE)
    for key in ("gpt thor lr=1", "gpt thor_plain lr=1", "digits thor lr=1", "gpt heat seed=0", "digits heat seed=0"):
        results.get_or_train(key, [], lambda: {"values": [1.0]})
    results.forget("gpt", "thor", HEAT)
    left = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["runs"]
    assert [key.rsplit(" ", 1)[0] for key in left] == ["gpt thor_plain lr=1", "digits thor lr=1", "digits heat seed=0"]


# ── the command ──


@pytest.mark.slow
def test_the_command_tunes_trains_draws_and_prints(tmp_path: Path) -> None:
    out = tmp_path / "race.json"
    options = ("--workload=digits", "--optimizer", "thor", "thor_untuned", "adamw", f"--out={out}", "--steps=3")
    printed = python_module("benchmarks.time_to_target", *options, "--seeds=2", columns=220)
    content = json.loads(out.read_text(encoding="utf-8"))
    kinds = [[word for word in key.split()[1:-1] if "lr=" not in word] for key in content["runs"]]
    # The untuned one is not tuned, but runs in the heats.
    assert kinds == [["thor", "tuning"], ["adamw", "tuning"]] * TRIALS + [["heat", "seed=0"], ["heat", "seed=1"]]
    heats = [run for key, run in content["runs"].items() if " heat " in key]
    assert all(heat.keys() == {"thor", "thor_untuned", "adamw"} for heat in heats)
    for row in race.cells(content["summary"]):
        assert all(cell in printed for cell in row)
    assert (tmp_path / "race_digits.png").is_file()
    assert (tmp_path / "race_digits_rates.png").is_file()


def test_a_workload_without_its_data_says_what_to_do() -> None:
    with pytest.raises(SystemExit, match=r"tinyshakespeare: say --data DIR"):
        TASKS["cpu"]["gpt"].data(None, 2, CPU)


@pytest.mark.parametrize("scale", TASKS)
def test_both_scales_have_the_same_tasks_and_check_as_often_as_they_say(scale: str) -> None:
    assert TASKS[scale].keys() == TASKS["cpu"].keys()
    for task in TASKS[scale].values():
        assert len(check_steps(task.steps, task.checks)) == task.checks
        assert task.seeds >= 3


def test_half_the_squared_distance_of_a_row_is_what_the_autoencoder_minimises() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(squared_error(x, y), 0.5 * F.mse_loss(x, y) * 4)


def test_the_readme_has_a_column_of_seconds_for_each_workload() -> None:
    other = {**made_up_summary(), "optimizers": {"muon": made_up_summary()["optimizers"]["adamw"]}}
    block = readme.race_block({"summary": {"small": made_up_summary(), "large": other}, "runs": {}})
    assert "| optimizer | small: loss ≤ 1 | large: loss ≤ 1 |" in block
    assert "| THOR | 2.00 ± 0.00 |  |" in block
    assert "| momentum SGD | 1 of 2 got there |  |" in block
    assert "| Muon |  | 4.00 ± 0.00 |" in block
    assert "small: small (2 seeds)" in block
