"""Laws of several `Thor` under one callback, and of one that comes in mid-run: each has its own curvature."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_thor import Curvature, Thor, ThorCallback, ThorMonitor, configure_thor
from lightning_thor.preconditioning.modes import ModeName
from lightning_thor.trainer.pictures import _is_kept, read_looks
from tests.helpers.boring import Boring, assert_bitwise, callback_of, trainer, without_words
from tests.helpers.distributed_workers import TwoPasses, TwoThors, one_rank, state, two_ranks


class Gan(L.LightningModule):
    """A generator and a discriminator of four numbers, with a `Thor` each."""

    automatic_optimization = False

    def __init__(self, toggles: bool = True) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.toggles = toggles

    def losses(self, x: Tensor, z: Tensor, number: int) -> Tensor:
        """Of the discriminator (0), or of the generator (1)."""
        fake = self.generator(z)
        if number:
            return F.softplus(-self.discriminator(fake)).mean()
        real, fake = self.discriminator(x), self.discriminator(fake.detach())
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for number, optimizer in enumerate(self.optimizers()):
            if self.toggles:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.losses(*batch, number))
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [configure_thor(self.discriminator, lr=0.01), configure_thor(self.generator, lr=0.02, mode="polar")]

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(5)
        data = [[torch.randn(8, n, generator=generator) for n in (4, 3)] for _ in range(4)]
        return torch.utils.data.DataLoader(data, batch_size=None)


def everything(found: L.Trainer) -> Any:
    """Weights, momenta and curvatures."""
    states = [without_words(curvature.state_dict()) for curvature in callback_of(found).curvatures]
    momenta = [optimizer.state_dict()["state"] for optimizer in found.optimizers]
    return copy.deepcopy([found.lightning_module.state_dict(), momenta, states])


def fit(folder: Path, module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    found = trainer(folder, *callbacks, **options)
    found.fit(module)
    return found


def test_a_gan_is_the_plain_loop_with_two_curvatures(tmp_path: Path) -> None:
    found = fit(tmp_path, Gan())
    module = Gan()
    optimizers = module.configure_optimizers()
    curvatures = [
        Curvature(module, mode=mode, update_every_n_steps=2, parameters=own.parameters(), output_layer=last)
        for mode, own, last in (
            ("natural", module.discriminator, "discriminator.2"),
            ("polar", module.generator, "generator.2"),
        )
    ]
    for _ in range(2):
        for batch in module.train_dataloader():
            for number, optimizer in enumerate(optimizers):
                optimizer.preconditioner = curvatures[number]
                module.zero_grad()
                with curvatures[1 - number].paused():
                    module.losses(*batch, number).backward()
                optimizer.step()
    assert [list(one.layers) for one in callback_of(found).curvatures] == [
        ["discriminator.0", "discriminator.2"],
        ["generator.0", "generator.2"],
    ]
    assert [one.step for one in callback_of(found).curvatures] == [8, 8]
    assert_bitwise(everything(found)[2], [without_words(one.state_dict()) for one in curvatures])
    assert_bitwise([p.detach() for p in found.lightning_module.parameters()], [p.detach() for p in module.parameters()])


@pytest.mark.parametrize("mode", ["polar", "adam"])
def test_each_network_has_an_output_layer_of_its_own(tmp_path: Path, mode: ModeName) -> None:
    """With the diagonal of its G alone; a copy and a curvature with further layers keep it."""

    class OneMode(Gan):
        def configure_optimizers(self) -> Any:
            return [configure_thor(one, lr=0.01, mode=mode) for one in (self.discriminator, self.generator)]

    found = fit(tmp_path, OneMode())
    for network, curvature in zip(("discriminator", "generator"), callback_of(found).curvatures, strict=True):
        curvature.include()
        for one in (curvature, copy.deepcopy(curvature)):
            assert one.layers[f"{network}.0"].G.size > 1
            assert one.layers[f"{network}.2"].G.size == 1
            assert one.polar_layers == ({f"{network}.0"} if mode == "polar" else set())


def test_a_hidden_layers_thor_does_not_take_the_last_of_them_for_the_output_layer(tmp_path: Path) -> None:
    """Whose optimizer is another, as with Muon."""

    class Hidden(Gan):
        def configure_optimizers(self) -> Any:
            hidden = [p for p in self.parameters() if p is not self.discriminator[2].weight]
            return [Thor(hidden, lr=0.01, mode="polar"), torch.optim.AdamW([self.discriminator[2].weight])]

    found = callback_of(fit(tmp_path, Hidden())).curvature
    assert found is not None
    assert found.polar_layers == {"generator.0", "generator.2", "discriminator.0"}


def test_an_output_layer_that_is_none_of_the_models_is_refused() -> None:
    words = r"output_layer must be the name of a linear layer or convolution of the model "
    with pytest.raises(ValueError, match=rf"{words}\(generator.0, .*'head'"):
        Curvature(Gan(), mode="polar", output_layer="head")
    tied = nn.ModuleDict({"table": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    tied["head"].weight = tied["table"].weight
    with pytest.raises(ValueError, match=rf"{words}\(head\), got 'table'"):
        Curvature(tied, mode="adam", output_layer="table")


def test_what_zero_grad_throws_away_is_no_statistics(tmp_path: Path) -> None:
    """The generator's loss flows through the discriminator, whose gradients are zeroed before its own backward."""
    assert_bitwise(everything(fit(tmp_path, Gan(toggles=False))), everything(fit(tmp_path, Gan())))


def test_a_graph_that_is_kept_is_observed_with_the_gradients_after_zero_grad() -> None:
    """Also between a forward pass and its backward pass, where Lightning calls it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    twin, x = copy.deepcopy(model), torch.randn(5, 3)
    curvature, other = Curvature(model), Curvature(twin)
    optimizer = Thor(model.parameters(), preconditioner=curvature)
    out = model(x)
    out.square().mean().backward(retain_graph=True)
    optimizer.zero_grad()
    out.sin().mean().backward()
    twin(x).sin().mean().backward()
    for one in (curvature, other):
        one.update()
    assert_bitwise(without_words(curvature.state_dict()), without_words(other.state_dict()))


def test_two_thors_are_saved_and_go_on_bitwise(tmp_path: Path) -> None:
    each = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    unbroken = fit(tmp_path, Gan(), each, max_epochs=3, enable_checkpointing=True)
    resumed = trainer(tmp_path, max_epochs=3)
    resumed.fit(Gan(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert_bitwise(everything(resumed), everything(unbroken))


def test_figures_of_each_are_logged_and_no_layer_is_left_out_for_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = CSVLogger(tmp_path)
    callback = ThorCallback(summary=True)
    options: dict[str, Any] = {"enable_model_summary": True, "enable_progress_bar": True}
    fit(tmp_path, Gan(), callback, logger=logger, log_every_n_steps=1, **options)
    metrics = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"thor/refreshes", "thor-1/refreshes", "thor-1/update_to_weights"} <= set(metrics)
    assert [one.left_out for one in callback.curvatures] == [{}, {}]
    printed = capsys.readouterr().out
    assert printed.count("THOR curvature: 2 layers preconditioned") == 2
    assert "THOR after 8 steps: each layer was refreshed 8 times" in printed


class SlowGan(Gan):
    """The generator takes every fourth step of the discriminator."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for number, optimizer in enumerate(self.optimizers()):
            if number and batch_idx:
                continue
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.losses(*batch, number))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_the_monitors_ages_are_in_the_steps_of_each(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = (ThorCallback(update_every_n_steps=2, trace_rule=(1e-9, 0.0)), ThorMonitor(every_n_refreshes=1))
    fit(tmp_path, SlowGan(), *callbacks, logger=logger, max_epochs=6)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["thor/age/generator.0"]]
    ages = [float(row[f"thor/age/{name}.0"]) for row in rows for name in ("generator", "discriminator")]
    assert max(ages) <= 3  # an interval and the trace rule's delay
    looks = read_looks(tmp_path)
    steps = [[look["layers"][f"{name}.0"]["step"] for look in looks] for name in ("generator", "discriminator")]
    assert steps[0][-1] == 6
    assert steps[1] == [look["step"] for look in looks]
    kept = [index for index in range(1, len(looks)) if _is_kept(looks, index, "generator.0")]
    inverted = [look["layers"]["generator.0"]["inverted_at"] for look in looks]
    assert kept == [n for n in range(1, len(looks)) if inverted[n] == inverted[n - 1]]
    assert len(kept) < len(looks) - 1


class Ensemble(L.LightningModule):
    """Networks that see the same batches, each with a `Thor` of its own, trained by one backward pass.

    Args:
        members: of each its seed, learning rate and mode.
    """

    automatic_optimization = False

    def __init__(self, members: list[tuple[int, float, ModeName]]) -> None:
        super().__init__()
        self.settings = members
        self.networks = nn.ModuleList()
        for seed, _, _ in members:
            torch.manual_seed(seed)
            self.networks.append(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        optimizers = self.optimizers()
        self.manual_backward(torch.stack([F.mse_loss(network(x), y) for network in self.networks]).sum())
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            configure_thor(network, lr=lr, mode=mode)
            for network, (_, lr, mode) in zip(self.networks, self.settings, strict=True)
        ]

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(6)
        data = [[torch.randn(8, n, generator=generator) for n in (4, 2)] for _ in range(5)]
        return torch.utils.data.DataLoader(data, batch_size=None)


def test_each_member_of_an_ensemble_trains_as_it_does_alone(tmp_path: Path) -> None:
    members: list[tuple[int, float, ModeName]] = [
        (0, 0.01, "natural"), (1, 0.03, "natural"), (2, 0.02, "polar"), (3, 0.005, "adam")
    ]  # fmt: skip
    together = fit(tmp_path, Ensemble(members))
    assert len(callback_of(together).curvatures) == len(members)
    weights, momenta, curvatures = everything(together)
    for number, member in enumerate(members):
        alone_weights, (alone_momenta,), (alone_curvature,) = everything(fit(tmp_path, Ensemble([member])))
        own = f"networks.{number}."
        assert_bitwise(
            {name.removeprefix(own): weight for name, weight in weights.items() if name.startswith(own)},
            {name.removeprefix("networks.0."): weight for name, weight in alone_weights.items()},
        )
        assert_bitwise(list(momenta[number].values()), list(alone_momenta.values()))
        layers = curvatures[number].pop("layers")
        assert [name.removeprefix(own) for name in layers] == ["0", "2", "3"]
        assert_bitwise(list(layers.values()), list(alone_curvature.pop("layers").values()))
        assert_bitwise(curvatures[number], alone_curvature)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("two_thors", TwoThors), ("two_passes", TwoPasses)])
def test_two_ranks_are_one_rank(name: str, kind: Any, tmp_path: Path) -> None:
    """Factors are sent in the steps: where one backward pass reaches layers of two `Thor`, the steps' order is equal on
    all ranks; where a step has two passes, none is known to be the last."""
    alone = one_rank(tmp_path, kind=kind)
    for result in two_ranks(name):
        torch.testing.assert_close(state(result), state(alone), rtol=1e-9, atol=1e-9)
        assert not any(call["in_backward"] for call in result["all_reduces"])


# ── a Thor that comes in mid-run ──


class Switching(Boring):
    """Adam in the first epoch, then Thor, then LBFGS."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_train_epoch_start(self) -> None:
        epoch = self.trainer.current_epoch
        if epoch == 1:
            self.trainer.strategy.optimizers = [configure_thor(self, lr=0.01)]
        elif epoch == 3:
            self.trainer.strategy.optimizers = [torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)]


def waiting() -> ThorCallback:
    return ThorCallback(update_every_n_steps=2, waits_for_thor=True, summary=False)


def test_adam_then_thor_then_lbfgs(tmp_path: Path) -> None:
    """As in a loop by hand; LBFGS leaves the curvature as it was."""
    found = fit(tmp_path, Switching(), waiting(), max_epochs=4)
    module, curvature = Boring(), None
    optimizer: Any = torch.optim.Adam(module.parameters(), lr=0.01)
    for epoch in range(3):
        if epoch == 1:
            curvature = Curvature(module, update_every_n_steps=2)
            optimizer = configure_thor(module, lr=0.01, preconditioner=curvature)
        for x, y in module.data():
            optimizer.zero_grad()
            module.loss(module(x), y).backward()
            optimizer.step()
    assert curvature is not None
    (own,) = callback_of(found).curvatures
    assert own.step == 8
    assert_bitwise(without_words(own.state_dict()), without_words(curvature.state_dict()))
    assert isinstance(found.optimizers[0], torch.optim.LBFGS)
    assert not any(module._forward_hooks for module in found.lightning_module.modules())


def test_a_state_waits_for_its_thor(tmp_path: Path) -> None:
    """A checkpoint of the epoch with Thor goes on with Adam, as configure_optimizers says, and then with Thor."""
    found = fit(tmp_path, Switching(), waiting(), max_epochs=3)
    state = callback_of(found).state_dict()

    class Loading(Switching):
        def on_fit_start(self) -> None:
            callback_of(self.trainer).load_state_dict(state)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if (self.trainer.current_epoch, batch_idx) == (1, 0):
                (curvature,) = callback_of(self.trainer).curvatures
                assert curvature.step == 8

    assert callback_of(fit(tmp_path, Loading(), waiting())).curvatures[0].step == 12


def test_a_thor_that_comes_back_has_its_curvature(tmp_path: Path) -> None:
    class Alternating(Boring):
        def configure_optimizers(self) -> Any:
            self.both = [configure_thor(self, lr=0.01), torch.optim.SGD(self.parameters(), lr=0.0)]
            return self.both[0]

        def on_train_epoch_start(self) -> None:
            self.trainer.strategy.optimizers = [self.both[self.trainer.current_epoch % 2]]

    found = fit(tmp_path, Alternating(), max_epochs=3)
    plain = fit(tmp_path, Boring(), max_epochs=2)  # with a schedule, which does not change the statistics' number
    assert len(callback_of(found).curvatures) == 1
    assert callback_of(found).curvature.step == callback_of(plain).curvature.step == 8
    assert_bitwise(callback_of(found).curvature.factors.updates, callback_of(plain).curvature.factors.updates)


def test_a_callback_that_waits_takes_a_choice_only() -> None:
    with pytest.raises(ValueError, match="waits_for_thor must be True or False, got 1"):
        ThorCallback(waits_for_thor=1)  # type: ignore[arg-type]


def test_a_block_size_to_be_chosen_needs_a_thor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='block_size="auto" needs the Thor when fit starts'):
        fit(tmp_path, Switching(), ThorCallback(block_size="auto", waits_for_thor=True))
