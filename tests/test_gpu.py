"""What only a GPU can show: that nothing waits for it, NCCL, a real loss scale, deterministic kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_thor import Curvature, ThorCallback, configure_thor
from lightning_thor.distributed import factor_reducer
from lightning_thor.distributed.communicator import SingleProcess, WorkerGrid
from lightning_thor.distributed.process_group import ProcessGroupCommunicator
from lightning_thor.linalg.decompositions import damped_inverses
from lightning_thor.linalg.matrix_sign import msign
from tests.helpers.boring import Boring, assert_bitwise, callback_of, everything, trainer
from tests.helpers.fakes import FakeCommunicator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: python -m pytest tests/test_gpu.py")

MODES = ["natural", "polar", "adam"]


class Net(nn.Module):
    """Every kind of layer that has curvature, but for recurrent ones; tokens ``[N, 6]`` to logits ``[N, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 16, padding_idx=0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norms = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.RMSNorm(16))
        self.images = nn.Sequential(
            nn.Unflatten(1, (6, 4, 4)),
            nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False),  # behind a norm a bias has gradients of rounding alone
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(self.images(self.norms(x).flatten(1)))
        return out


def trained(device: str, dtype: torch.dtype, n_steps: int, mode: str, **options: Any) -> list[Tensor]:
    """The weights after some steps, refreshes and plain ones."""
    torch.manual_seed(1)
    model, step = stepper(device, dtype, mode, **options)
    for _ in range(n_steps):
        step()
    return [p.detach().cpu() for p in model.parameters()]


def stepper(device: str, dtype: torch.dtype, mode: str, **options: Any) -> tuple[nn.Module, Callable[[], None]]:
    """A model, and what takes one step of its training, always on the same batch."""
    torch.manual_seed(1)
    model, tokens, labels = Net().to(device, dtype), torch.randint(9, (12, 6)), torch.randint(5, (12,))
    tokens, labels = tokens.to(device), labels.to(device)
    own = {"update_every_n_steps": 3, "block_size": 8, "max_rows": 32, **options}
    optimizer = configure_thor(model, lr=0.01, mode=mode, preconditioner=Curvature(model, mode=mode, **own))

    def step() -> None:
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


@pytest.mark.parametrize("mode", MODES)
def test_a_training_is_that_of_a_cpu(mode: str) -> None:
    there, here = (trained(device, torch.float64, 7, mode) for device in ("cuda", "cpu"))
    torch.testing.assert_close(there, here, rtol=1e-8, atol=1e-10)


class Recurrent(nn.Module):
    """``[N, T, 6]`` to ``[N, T, 5]``."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layers, self.head = kind(6, 8, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x)[0])
        return out


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_layer_trains_as_on_a_cpu(kind: Any) -> None:
    """Where cuDNN computes the plain steps, and torch the refreshes."""
    found = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(1)
        model, x = Recurrent(kind).double().to(device), torch.randn(4, 7, 6, dtype=torch.float64).to(device)
        curvature = Curvature(model, update_every_n_steps=3)
        optimizer = configure_thor(model, lr=0.01, preconditioner=curvature)
        for _ in range(7):
            model(x).sin().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert curvature.factors.updates.tolist() == [3.0] * 9
        found.append([p.detach().cpu() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [8, 32, 64, 100, 256])
def test_inverses_of_float32_are_those_of_float64(size: int) -> None:
    x = torch.randn(40, size, 2 * size, device="cuda")
    blocks = torch.bmm(x, x.mT) / (2 * size)
    damping = torch.full((40,), 0.1, device="cuda")
    found, succeeded = damped_inverses(blocks, damping)
    exact = torch.linalg.inv(blocks.double() + 0.1 * torch.eye(size, dtype=torch.float64, device="cuda"))
    assert bool(succeeded.all())
    error = (found - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    # Condition numbers are below 40: products in TF32 would miss this a hundredfold.
    assert float(error.max()) < 2e-5


def test_the_sign_of_a_matrix_is_orthogonal_in_half_the_precision_too() -> None:
    found = msign(torch.randn(3, 64, 200, device="cuda"))
    spectrum = torch.linalg.svdvals(found)
    assert 0.9 < float(spectrum.min()) <= float(spectrum.max()) < 1.1


@contextmanager
def none_may_wait() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_check_that_would_wait_is_seen() -> None:
    with none_may_wait(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones((), device="cuda").item()


@pytest.mark.parametrize("mode", ["natural", "polar"])
@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"trace_rule": "THOR"}, {"damping_rule": "pi"}])
def test_no_step_waits_for_the_device(mode: str, options: dict[str, Any]) -> None:
    _, step = stepper("cuda", torch.float32, mode, **options)
    for _ in range(7):  # what a first round waits for it waits for once: tables of indices that go to the device
        step()
    with none_may_wait():
        for _ in range(6):
            step()


def test_a_profile_of_plain_steps_shows_no_wait() -> None:
    _, step = stepper("cuda", torch.float32, "natural", update_every_n_steps=10)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        for _ in range(3):
            step()
    names = [event.key for event in profile.key_averages()]
    assert any("Launch" in name for name in names), "the profile saw no kernels"
    # The profiler itself waits for the device when it ends, by cudaDeviceSynchronize.
    assert not [name for name in names if "StreamSynchronize" in name or "EventSynchronize" in name or "DtoH" in name]


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank."""
    device = torch.device("cuda", torch.cuda.current_device())
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    yield
    dist.destroy_process_group()


class OneOfTwo(FakeCommunicator):
    """As if there were two ranks, of which one sends nothing: sums are NCCL's, of one rank."""

    def __init__(self) -> None:
        super().__init__()
        self._ranks = ProcessGroupCommunicator()

    def all_reduce(self, flat: Tensor) -> Any:
        self.in_backward.append(torch._C._current_graph_task_id() != -1)
        return self._ranks.all_reduce(flat)


@pytest.mark.usefixtures("nccl")
def test_factors_that_travel_by_nccl_arrive_and_nothing_waits() -> None:
    torch.manual_seed(1)
    x, models = torch.randn(64, 24, device="cuda"), []
    for connected in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)).cuda()
        curvature = Curvature(model, update_every_n_steps=2, block_size=16)
        communicator = OneOfTwo()
        if connected:
            everyone = WorkerGrid(SingleProcess(), SingleProcess())
            curvature.connect(
                communicator, bucket_fn=factor_reducer.by_size(2048), is_sync_step=lambda: True, worker_grid=everyone
            )
        optimizer = configure_thor(model, lr=0.01, preconditioner=curvature)

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(6):
            step()
        with none_may_wait():
            for _ in range(2):
                step()
        models.append([p.detach() for p in model.parameters()])
        # The first window learns what a layer gives, the second in which order; from then on all start in backward.
        assert not connected or (len(communicator.in_backward) >= 8 and all(communicator.in_backward[-2:]))
    alone, sent = (torch.cat([p.flatten() for p in model]) for model in models)
    assert torch.equal(sent, alone)


@pytest.mark.usefixtures("nccl")
def test_nccl_gathers_and_swaps() -> None:
    own = torch.arange(5.0, device="cuda")
    assert torch.equal(ProcessGroupCommunicator().all_gather(own), own)
    assert torch.equal(ProcessGroupCommunicator().all_to_all(own, [5], [5]), own)


@pytest.fixture
def deterministic() -> Iterator[dict[str, Any]]:
    """Options of a Trainer; torch's choice of kernels is afterwards what it was."""
    yield {"accelerator": "gpu", "deterministic": True}
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("strategy", ["thor_ddp", "thor_ddp_find_unused_parameters_true"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_a_trainer_of_one_rank_over_nccl_is_one_without(
    tmp_path: Path, deterministic: dict[str, Any], precision: Any, strategy: str
) -> None:
    fits = []
    for one in ("auto", strategy):
        found = trainer(tmp_path, precision=precision, strategy=one, use_distributed_sampler=False, **deterministic)
        found.fit(Boring())
        assert callback_of(found).curvature.factors.flat_sums.isfinite().all()
        fits.append([tensor.cpu() for tensor in everything(found)])
    assert_bitwise(*fits)


def test_a_step_that_overflows_is_skipped_and_the_curvature_with_it(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # halved until gradients of float16 hold it
    found = trainer(tmp_path, accelerator="gpu", max_epochs=12, plugins=[MixedPrecision("16-mixed", "cuda", scaler)])
    found.fit(Boring())
    curvature = callback_of(found).curvature
    assert 0 < curvature.step < found.global_step == 48
    assert all(torch.isfinite(tensor).all() for tensor in everything(found))
    assert curvature.factors.rejected_windows == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_fit_is_bitwise_the_unbroken_one(tmp_path: Path, deterministic: dict[str, Any], mode: str) -> None:
    options = {"precision": "16-mixed", "enable_checkpointing": True, **deterministic}
    saves = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    own = ThorCallback(update_every_n_steps=3, summary=False)
    unbroken = trainer(tmp_path, saves, own, max_epochs=4, **options)
    unbroken.fit(Boring(mode=mode))
    resumed = trainer(tmp_path, ThorCallback(update_every_n_steps=3, summary=False), max_epochs=4, **options)
    resumed.fit(Boring(mode=mode), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert_bitwise(everything(resumed), everything(unbroken))


@pytest.mark.slow
def test_a_compiled_model_has_the_statistics_of_one_that_is_not() -> None:
    def averages(compiled: bool) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).cuda()
        curvature = Curvature(model, block_size=16)
        run = torch.compile(model) if compiled else model
        run(torch.randn(64, 16, device="cuda")).square().sum().backward()
        curvature.update()
        return [stack.average for stack in curvature.factors.batches.values()]

    torch.testing.assert_close(averages(True), averages(False), rtol=1e-4, atol=1e-5)
