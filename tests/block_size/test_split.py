"""Laws of the choice of the block size, and of ``block_size="auto"`` under a Trainer."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_thor import Curvature, ThorCallback, configure_thor
from lightning_thor.block_size import choose
from lightning_thor.block_size.choose import BlockSplit, candidates, choose_block_size, cross
from lightning_thor.block_size.spectral_loss import spectral_losses
from lightning_thor.linalg.block_diagonal import partition
from lightning_thor.trainer import block_size_trial, callback
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, trainer

# ── the loss of cutting ──


def covariance(width: int, rows: int, seed: int = 0) -> Tensor:
    x = torch.randn(width, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x + x.mean(0, keepdim=True) * 3  # something that blocks lose
    return x @ x.T / rows


def block_diagonal(matrix: Tensor, block_size: int) -> Tensor:
    kept = torch.zeros_like(matrix)
    size = partition(len(matrix), block_size).size
    for start in range(0, len(matrix), size):
        kept[start : start + size, start : start + size] = matrix[start : start + size, start : start + size]
    return kept


def spectral_loss(matrix: Tensor, block_size: int) -> float:
    return float(spectral_losses(matrix[None], [block_size], partition)[0])


def formula(matrix: Tensor, block_size: int) -> float:
    """As the paper has it."""
    parts, whole = (torch.linalg.eigvalsh(m @ m.T)[-1] for m in (block_diagonal(matrix, block_size), matrix))
    return 1 - float(parts / whole) ** 0.5


@pytest.mark.parametrize(("width", "rows"), [(10, 50), (48, 100), (49, 100), (257, 300), (300, 7)])
@pytest.mark.parametrize("block_size", [1, 16, 64, 128])
def test_the_spectral_loss_is_the_papers_formula(width: int, rows: int, block_size: int) -> None:
    matrix = covariance(width, rows)
    expected = formula(matrix, block_size)
    assert spectral_loss(matrix, block_size) == pytest.approx(expected, abs=1e-6)
    assert spectral_loss(matrix.float(), block_size) == pytest.approx(expected, abs=1e-5)


def test_what_is_block_diagonal_already_loses_nothing() -> None:
    matrix = block_diagonal(covariance(256, 500), 64)
    assert spectral_loss(matrix, 64) == pytest.approx(0, abs=1e-9)
    assert spectral_loss(matrix, 32) > 0.01
    assert spectral_loss(torch.zeros(100, 100), 16) == 0


def test_a_flat_spectrum_is_no_harder() -> None:
    """Independent coordinates: the largest eigenvalue lies close to the next ones."""
    x = torch.randn(1000, 4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = x @ x.T
    assert spectral_loss(matrix, 128) == pytest.approx(formula(matrix, 128), abs=1e-4)


def test_groups_are_one_matrix() -> None:
    parts = torch.stack([covariance(60, 100, seed) for seed in range(3)])
    found = spectral_losses(parts, [1, 20, 60], partition)
    whole = torch.block_diag(*parts)
    expected = torch.tensor([spectral_loss(whole, size) for size in (1, 20, 60)], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


# ── the crossing ──


def test_the_candidates_are_the_papers() -> None:
    assert candidates(2048) == [1, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert candidates(4608)[-2:] == [4096, 4608]
    assert candidates(16) == [1, 16]


def test_the_papers_crossing_gives_the_papers_choice() -> None:
    """At 106 between 64 and 128, as ResNet-50 had it on an Ascend 910."""
    place = math.log2(106 / 64)  # of the way from 64 to 128
    crossing, chosen = cross([1, 64, 128, 256], [0, 0.5 - place, 1.5 - place, 1], [1, 0.5, 0.5, 0])
    assert (crossing, chosen) == (pytest.approx(106), 128)


@pytest.mark.parametrize(
    ("shares", "speeds", "crossing", "chosen"),
    [
        ([0.0, 0.2, 1.0], [1.0, 0.8, 0.2], 2**4.4285714, 16),
        ([0.0, 0.8, 1.0], [1.0, 0.2, 0.1], 2**2.5, 16),
        ([0.4, 0.8, 1.0], [1.0, 0.1, 0.1], 2 ** (4 * 0.6 / 1.3), 1),
        ([0.0, 0.5, 1.0], [1.0, 0.5, 0.2], 16, 16),
        ([1.0, 1.0, 1.0], [1.0, 0.5, 0.2], 1, 1),
        ([0.0, 0.5, 1.0], [1.0, 2.0, 3.0], 32, 32),
        ([0.0, 0.5, 0.0], [1.0, 0.4, 0.3], 2 ** (4 / 1.1), 16),
    ],
    ids=["nearer to the lower", "nearer to the upper", "to 1", "at one", "at the first", "never", "twice"],
)
def test_the_choice_is_the_candidate_nearest_to_the_first_crossing(
    shares: list[float], speeds: list[float], crossing: float, chosen: int
) -> None:
    assert cross([1, 16, 32], shares, speeds) == (pytest.approx(crossing), chosen)


def test_one_candidate_is_chosen() -> None:
    assert cross([1], [1.0], [1.0]) == (1.0, 1)


# ── what is measured on a network ──


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(70, 33), nn.BatchNorm1d(33), nn.Linear(33, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(nn.functional.dropout(self.norm(self.first(x)).tanh(), 0.1))
        return out


def net_and_loss() -> tuple[Net, Callable[[], Tensor]]:
    torch.manual_seed(5)
    net, x = Net().double(), torch.randn(90, 70, dtype=torch.float64).cumsum(1)
    return net, lambda: net(x).square().mean()


def timed_as(monkeypatch: pytest.MonkeyPatch, power: float) -> None:
    """Times without noise: a block of size b takes as long as b ** power."""

    def seconds(factors: Any, block_size: int, *_: Any) -> float:
        return float(block_size**power)

    monkeypatch.setattr(choose, "_inversion_seconds", seconds)


def test_the_shares_are_those_of_the_factors_of_the_batch() -> None:
    net, loss = net_and_loss()
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[f"{name}.A"] = inputs[0].detach()
            output.register_hook(lambda g: seen.update({f"{name}.G": g}))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in net.named_children() if name != "norm"]
    state = torch.get_rng_state()
    loss().backward()
    torch.set_rng_state(state)
    for handle in handles:
        handle.remove()
    factors = [rows.T @ rows for key, rows in seen.items() if key != "last.G"]  # 1 × 1 cannot be cut
    found = choose_block_size(net, loss)
    assert (found.candidates, found.n_factors, found.left_out) == ([1, 16, 32, 64, 70], 3, {})
    expected = [sum(formula(A, size) < 0.01 for A in factors) / 3 for size in found.candidates]
    assert found.shares == pytest.approx(expected)
    assert 0 < expected[3] < 1  # something to see


def test_the_choice_is_where_the_measured_curves_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    net, loss = net_and_loss()
    for power in (0.0, 0.1, 1.0, 3.0):
        timed_as(monkeypatch, power)
        found = choose_block_size(net, loss)
        assert found.speeds == pytest.approx([size**-power for size in found.candidates])
        assert (found.crossing, found.block_size) == cross(found.candidates, found.shares, found.speeds)
    assert found.block_size < 70
    timed_as(monkeypatch, 0.0)
    assert choose_block_size(net, loss).block_size == 70  # larger blocks cost nothing


def test_what_is_timed_is_what_a_refresh_inverts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Boring()
    (x, y), *_ = module.data()
    whole_layers = Curvature(module, block_size=None).layers.values()
    wholes = [whole for layer in whole_layers for whole in (layer.A, layer.G) if whole and whole.n_blocks == 1]
    for size in (1, 4, 16, 64):
        timed: dict[int, int] = {}

        def seconds(n: int, size: int, *_: Any, timed: dict[int, int] = timed) -> float:
            timed[size] = n
            return 1.0

        monkeypatch.setattr(choose, "_seconds_of_inverting", seconds)
        monkeypatch.setattr(choose, "candidates", lambda widest, size=size: [size])
        choose_block_size(module, lambda: module.loss(module(x), y))
        stacks = Curvature(module, block_size=size).factors.batches
        # Norms are diagonal whatever the block size, and so is everything else with blocks of 1, timed as 2.
        n_single = sum(whole.width for whole in wholes if size == 1)
        assert timed == ({2: n_single} if size == 1 else {own: len(s.sums) for own, s in stacks.items() if own > 1})


def test_many_blocks_are_timed_by_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[int, int]] = []

    def seconds(n: int, size: int, *_: Any) -> float:
        timed.append((n, size))
        return float(n)

    monkeypatch.setattr(choose, "_seconds_of_inverting", seconds)
    monkeypatch.setattr(choose, "TIMED_NUMEL", 16**2 * 3)
    whole = partition(160, None)
    assert choose._inversion_seconds([whole], 16, partition, torch.device("cpu"), torch.float32) == pytest.approx(10.0)
    assert timed == [(3, 16)]


def test_a_larger_network_takes_several_passes_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net, loss = net_and_loss()
    net.eval()  # no dropout, which would differ between passes
    calls: list[int] = []

    def counted() -> Tensor:
        calls.append(1)
        return loss()

    timed_as(monkeypatch, 1.0)
    at_once = choose_block_size(net, counted)
    assert len(calls) == 1
    monkeypatch.setattr(choose, "PORTION_NUMEL", 33**2 * 2)
    assert choose_block_size(net, counted) == at_once
    assert len(calls) == 1 + 2  # 70², which is too much alone, then 33² twice


def test_gradients_buffers_and_random_numbers_stay() -> None:
    net, loss = net_and_loss()
    loss().backward()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    grads = {p: (p.grad, p.grad.clone()) for p in net.parameters() if p.grad is not None}
    state = torch.get_rng_state()
    choose_block_size(net, loss)
    assert_bitwise(dict(net.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), state)
    for p, (grad, value) in grads.items():
        assert p.grad is grad
        assert torch.equal(grad, value)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_failing_loss_leaves_no_trace_either() -> None:
    net, loss = net_and_loss()

    def failing() -> Tensor:
        loss()
        raise KeyError("broken data")

    before = net.norm.running_mean.clone()
    with pytest.raises(KeyError, match="broken data"):
        choose_block_size(net, failing)
    assert torch.equal(net.norm.running_mean, before)
    assert not any(module._forward_hooks for module in net.modules())


def test_factors_that_are_too_wide_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net, loss = net_and_loss()
    monkeypatch.setattr(choose, "WIDEST", 69)
    found = choose_block_size(net, loss)
    assert (found.candidates[-1], found.n_factors) == (33, 2)
    assert found.left_out == {"first.A": "70 wide, more than 69"}
    monkeypatch.setattr(choose, "WIDEST", 9)
    with pytest.raises(ValueError, match=r"No factor could be looked at .*first.A \(70 wide, more than 9\).*a number"):
        choose_block_size(net, loss)


def test_a_batch_that_is_not_finite_is_told() -> None:
    net, _ = net_and_loss()
    with pytest.raises(ValueError, match=r"No factor could be looked at .*\(not finite\)"):
        choose_block_size(net, lambda: net(torch.full((4, 70), float("nan"), dtype=torch.float64)).mean())


def test_layers_that_the_loss_does_not_use_are_left_out() -> None:
    net = nn.ModuleList([nn.Linear(20, 2), nn.Linear(20, 2)])
    found = choose_block_size(net, lambda: net[0](torch.randn(5, 20)).sum())
    assert found.left_out == {"1.A": "not observed", "1.G": "not observed"}
    assert found.n_factors == 2


def test_a_network_of_single_numbers_and_one_of_nothing_have_blocks_of_one() -> None:
    single = nn.Linear(1, 1)
    assert choose_block_size(single, lambda: single(torch.ones(3, 1)).sum()).block_size == 1
    norm = nn.LayerNorm(8)
    assert choose_block_size(norm, lambda: norm(torch.randn(3, 8)).sum()).candidates == [1]


# ── under a Trainer ──


class Careful(Boring):
    """Everything that a trial could disturb: dropout, running means, a metric, a list, a counter, a log."""

    def __init__(self, data: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.norm, self.accuracy = nn.BatchNorm2d(1), MulticlassAccuracy(3, average="micro")
        self.seen, self.losses = 0, list[float]()
        self.given = None if data is None else data()  # the same loaders whenever they are asked for

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.functional.dropout(self.net(self.norm(x)), 0.2)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        x, y = batch
        logits = self(x + torch.rand(()))
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        loss = self.loss(logits, y)
        self.log_dict({"loss": loss}, on_step=True)
        self.logger.log_metrics({"seen": self.seen}, step=self.global_step)
        self.seen += 1
        self.losses.append(float(loss.detach()))
        return loss

    def train_dataloader(self) -> Any:
        return self.data(shuffle=True) if self.given is None else self.given


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(12)
    return TensorDataset(torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 3)


def with_own_generator() -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))


def with_workers() -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=8, shuffle=True, num_workers=1, persistent_workers=True)


def results(folder: Path, module: Careful, block_size: Any, **options: Any) -> tuple[L.Trainer, list[Any]]:
    torch.manual_seed(21)
    own = ThorCallback(update_every_n_steps=2, block_size=block_size, summary=False)
    logger = CSVLogger(folder, name=str(block_size))
    found = trainer(folder, own, logger=logger, log_every_n_steps=1, **options)
    found.fit(module)
    assert found.logger is logger
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # No two fits take the same time.
    metrics = [{name: row[name] for name in row if not name.startswith("thor/time_in_")} for row in rows]
    counts = [found.global_step, found.current_epoch, found.fit_loop.total_batch_idx, module.seen]
    buffers = [buffer.clone() for buffer in module.buffers()]
    return found, [everything(found), buffers, counts, module.losses, metrics, torch.rand(3)]


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (None, {}),
        (None, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
        (with_own_generator, {}),
        (with_workers, {}),
        (lambda: {"a": [with_own_generator()], "b": [with_own_generator()]}, {}),
    ],
    ids=["plain", "bf16", "generator", "workers", "several"],
)
def test_a_fit_that_chose_its_block_size_is_bitwise_the_fit_with_that_size(
    tmp_path: Path, data: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Several(Careful):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return super().training_step(batch["a"][0] if isinstance(batch, dict) else batch, batch_idx)

    timed_as(monkeypatch, 0.2)
    found, chosen = results(tmp_path, Several(data), "auto", **options)
    own = callback_of(found)
    assert own.block_size == own.split.block_size == 16
    _, fixed = results(tmp_path, Several(data), 16, **options)
    assert_bitwise(chosen[:4], fixed[:4])
    assert chosen[4] == fixed[4]
    assert torch.equal(chosen[5], fixed[5])


def test_a_loader_that_is_there_already_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where configure_optimizers asks for the number of steps."""

    class Counting(Careful):
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches == 8
            return super().configure_optimizers()

    timed_as(monkeypatch, 0.2)
    _, chosen = results(tmp_path, Counting(with_own_generator), "auto")
    _, fixed = results(tmp_path, Counting(with_own_generator), 16)
    assert_bitwise(chosen[:4], fixed[:4])


def test_the_rate_finder_comes_after_the_choice(tmp_path: Path) -> None:
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-2, num_training_steps=4)
    own = ThorCallback(block_size="auto", summary=False)
    found = trainer(tmp_path, finder, own, max_epochs=1)
    found.fit(Boring())
    assert (own.curvature.step, own.split is not None) == (4, True)


def test_a_resumed_run_takes_the_block_size_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(block_size: Any, folder: Path, **options: Any) -> L.Trainer:
        each = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        own = ThorCallback(update_every_n_steps=3, block_size=block_size, summary=False)
        found = trainer(tmp_path, own, each, enable_checkpointing=True, max_epochs=2)
        found.fit(Boring(), **options)
        return found

    timed_as(monkeypatch, 0.2)
    unbroken = fit("auto", tmp_path / "a")
    monkeypatch.setattr(callback, "try_block_sizes", None)  # not to be called again
    path = tmp_path / "a" / "epoch=0.ckpt"
    resumed = fit("auto", tmp_path / "b", ckpt_path=path, weights_only=True)
    assert_bitwise(everything(resumed), everything(unbroken))
    assert callback_of(resumed).block_size == callback_of(unbroken).block_size == 16
    assert callback_of(resumed).split is None
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["ThorCallback"]["block_size"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="version that did not note its block size"):
        fit("auto", tmp_path / "c", ckpt_path=path)
    fit(16, tmp_path / "d", ckpt_path=path)


class Manual(Boring):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class WithoutLoss(Boring):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return None


class ReadOnce(Boring):
    def train_dataloader(self) -> Any:
        return (batch for batch in self.data())


class OwnIterator:
    def __iter__(self) -> OwnIterator:
        return self

    def __next__(self) -> list[Tensor]:
        raise AssertionError("a batch was taken")


class ReadOnceToo(Boring):
    def train_dataloader(self) -> Any:
        return OwnIterator()


class FetchesItself(Boring):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


class NotToBeCopied(Boring):
    def __init__(self) -> None:
        super().__init__()
        self.generator = (number for number in range(3))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Manual, "in manual optimization would train"),
        (FetchesItself, "on a batch, but it takes dataloader_iter"),
        (WithoutLoss, r"WithoutLoss.training_step returned NoneType"),
        (ReadOnce, "cannot look at the first batch of a generator"),
        (ReadOnceToo, "take the first batch away from a OwnIterator"),
        (NotToBeCopied, r"a copy of NotToBeCopied, which cannot be copied \(TypeError"),
    ],
)
def test_what_cannot_be_tried_is_told(tmp_path: Path, module: type[Boring], words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}.*Give block_size a number"):
        trainer(tmp_path, ThorCallback(block_size="auto", summary=False)).fit(module())


def test_a_step_that_takes_the_batch_alone_and_gives_a_dict_is_tried(tmp_path: Path) -> None:
    class Other(Boring):
        def training_step(self, batch: list[Tensor]) -> Any:
            return {"loss": super().training_step(batch, 0)}

    found = trainer(tmp_path, ThorCallback(block_size="auto", summary=False), max_epochs=1)
    found.fit(Other())
    assert callback_of(found).split is not None


# ── the report ──

SPLIT = BlockSplit(32, 24.3, [1, 16, 32, 40], [0.0, 0.4, 0.7, 1.0], [1e-3, 1.5e-3, 2e-3, 4e-3], 7, {}, "cpu")


def printed(made: BlockSplit) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(block_size_trial.split_table(made))
    text: str = console.file.getvalue()
    return text


def test_the_table_shows_both_curves_and_the_choice() -> None:
    text = printed(SPLIT)
    (chosen,) = (line for line in text.splitlines() if "→" in line)
    assert [word in chosen for word in ("32", "70%", "0.500", "2 ms")] == [True] * 4
    assert all(words in text for words in ("block size: 32", "cross at 24", "7 factors on cpu", "100%", "0.250"))
    assert "Not looked at" not in text
    many = {f"head{n}.G": "9000 wide" for n in range(7)}
    assert "head4.G (9000 wide) and 2 more" in printed(replace(SPLIT, left_out=many)).replace("\n", " ")


def saved(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "500")
    block_size_trial.report_split(SPLIT, folder)
    assert json.loads((folder / "thor_split.json").read_text(encoding="utf-8")) == SPLIT.as_dict()
    assert SPLIT.as_dict()["speeds"] == pytest.approx([1, 2 / 3, 0.5, 0.25])
    return capsys.readouterr().out


def test_the_figures_and_a_picture_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("matplotlib.image", reason="pip install '.[plot]'")
    text = saved(tmp_path / "new", monkeypatch, capsys)
    assert str(tmp_path / "new" / "thor_split.png") in text
    pixels = image.imread(tmp_path / "new" / "thor_split.png")
    colours = {tuple(round(float(v) * 255) for v in pixel[:3]) for pixel in pixels.reshape(-1, pixels.shape[-1])}
    assert {(0x1B, 0x6C, 0xA8), (0xC8, 0x55, 0x3D)} <= colours  # both curves


def test_without_matplotlib_there_is_a_line_instead_of_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(block_size_trial, "find_spec", lambda name: None)
    assert "with matplotlib there would be a picture" in saved(tmp_path, monkeypatch, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thor_split.json"]


def test_a_fit_reports_its_choice_beside_the_loggers_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: Sequence[Any]
) -> None:
    logger = CSVLogger(tmp_path, name="mine")
    found = trainer(tmp_path, ThorCallback(block_size="auto"), logger=logger, max_epochs=1, enable_model_summary=True)
    found.fit(Boring())
    text = capsys.readouterr().out
    assert f"THOR block size: {callback_of(found).block_size}" in text
    assert text.index("THOR block size") < text.index("THOR curvature")
    assert (Path(logger.log_dir) / "thor_split.json").is_file()
    assert not [warning for warning in recwarn if "directory" in str(warning.message)]


def test_the_second_fit_of_a_callback_measures_anew(tmp_path: Path) -> None:
    own = ThorCallback(block_size="auto", summary=False)
    trainer(tmp_path, own, max_epochs=1).fit(Boring())
    first = own.split
    module = nn.Sequential(nn.Linear(64, 3))

    class Another(Boring):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), *module)

        def configure_optimizers(self) -> Any:
            return configure_thor(self)

    trainer(tmp_path, own, max_epochs=1).fit(Another())
    assert (first.candidates[-1], own.split.candidates[-1]) == (36, 64)


def test_attention_and_tied_weights_are_looked_at_too() -> None:
    """Their hooks are not those of a module that is called once."""
    torch.manual_seed(0)
    attention, linear = nn.MultiheadAttention(24, 2, batch_first=True), nn.Linear(24, 24)
    tied = nn.Linear(24, 24)
    tied.weight = linear.weight
    model = nn.ModuleList([attention, linear, tied])
    x = torch.randn(4, 6, 24)
    split = choose_block_size(model, lambda: tied(linear(attention(x, x, x)[0]).tanh()).square().mean())
    assert (split.n_factors, split.left_out) == (2 * 5, {})
