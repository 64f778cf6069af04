"""Laws of rows: ``g @ a.T`` is the weight's gradient, and factors equal those of per-sample gradients."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_thor import Curvature
from lightning_thor.factors.layout import SIDES
from lightning_thor.layers import norm
from lightning_thor.layers.base import Layer, LayerKind
from lightning_thor.layers.conv import CONVOLUTION
from lightning_thor.layers.discovery import discover_layers
from lightning_thor.layers.norm import BATCH_NORM, GROUP_NORM, RMS_NORM
from lightning_thor.layers.patches import taken_lines
from tests.helpers.boring import assert_bitwise
from tests.helpers.fakes import FakeCommunicator
from tests.helpers.formulas import preconditioned

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(5, 3), (7, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False), (7, 5)),
    "linear on a sequence": (lambda: nn.Linear(5, 3), (4, 6, 5)),
    "linear on a vector": (lambda: nn.Linear(5, 3), (5,)),
    "linear, four dimensions": (lambda: nn.Linear(5, 3), (2, 3, 2, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (5, 3, 6, 7)),
    "conv2d, 1x1": (lambda: nn.Conv2d(3, 4, 1, stride=2), (5, 3, 6, 7)),
    "conv2d, stride and padding": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (5, 3, 6, 7)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (5, 3, 6, 7)),
    "conv1d, one position": (lambda: nn.Conv1d(4, 6, 1, stride=2), (3, 4, 9)),
    "conv2d, one position": (lambda: nn.Conv2d(3, 4, 1, stride=(1, 2)), (5, 3, 6, 7)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (5, 3, 6, 7)),
    "conv2d, not square": (lambda: nn.Conv2d(3, 4, (1, 5), stride=(2, 1), padding=(0, 2)), (5, 3, 6, 7)),
    "conv2d, dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1), padding=2), (5, 3, 7, 7)),
    "conv2d, dilated same": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding="same"), (5, 3, 7, 7)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (5, 3, 6, 7)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (5, 3, 6, 7)),
    "conv2d, replicate same": (lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="replicate"), (5, 3, 6, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 4, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (5, 4, 5, 5)),
    "conv2d, one image": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=1), (2, 2, 4, 5, 3)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(3, 4, 3), (5, 3, 6, 7)),
    "transposed conv2d, output padding": (
        lambda: nn.ConvTranspose2d(3, 4, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 2), dilation=(2, 1)),
        (5, 3, 4, 3),
    ),
    "transposed conv2d, output padding as large as the stride": (
        lambda: nn.ConvTranspose2d(3, 4, 3, dilation=2, output_padding=1),
        (5, 3, 4, 3),
    ),
    "transposed conv2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (5, 4, 3, 3)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 3, (2, 3, 1), stride=(1, 2, 1)), (2, 2, 3, 2, 3)),
    "layer norm": (lambda: nn.LayerNorm(5), (7, 5)),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((4, 5)), (7, 4, 5)),
    "layer norm, no bias": (lambda: nn.LayerNorm(5, bias=False), (3, 4, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), (7, 5)),
    "rms norm, two dimensions": (lambda: nn.RMSNorm((4, 5), eps=1e-3), (7, 4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (7, 6, 4, 4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5), (7, 5)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3), (7, 3, 4, 4)),
    "batch norm, kept in eval mode": (lambda: nn.BatchNorm2d(3).eval(), (7, 3, 4, 4)),
    "batch norm of all processes": (lambda: nn.SyncBatchNorm(3), (7, 3, 4, 4)),
}


def seen_by(module: nn.Module, x: Tensor, precondition_bias: bool = False) -> tuple[Layer, Tensor, Tensor]:
    """The layer, its input and the gradient of a random smooth loss of its output; gradients are filled in."""
    (layer,) = discover_layers(module, block_size=None, precondition_bias=precondition_bias)[0].values()
    y = module(x)
    y.retain_grad()
    (y * torch.randn_like(y)).sin().mean().backward()
    return layer, x, y.grad


def grad_matrix(layer: Layer) -> Tensor:
    return layer.kind.to_matrix(layer, [p.grad for p in layer.parameters if p.grad is not None])


@pytest.mark.parametrize("precondition_bias", [False, True])
@pytest.mark.parametrize(
    ("name", "memory_format"),
    [(name, torch.contiguous_format) for name in CASES]
    # Not group norm: torch 2.13's own backward crashes there on a CPU, with no hook of ours involved.
    + [(n, torch.channels_last) for n, (_, shape) in CASES.items() if len(shape) == 4 and n != "group norm"],
)
def test_g_times_a_is_the_gradient(name: str, memory_format: torch.memory_format, precondition_bias: bool) -> None:
    make, shape = CASES[name]
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=memory_format)
    module = make().double()
    layer, a, g = seen_by(module, x, precondition_bias)
    rows = layer.observe(a, g, torch.float64, None)
    found = rows.g.sum(-1, keepdim=True) if rows.a is None else rows.g @ rows.a.mT
    torch.testing.assert_close(found, grad_matrix(layer), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 4, 4), (7, 5, 9), (1, 5, 3), (0, 5, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norms_have_the_same_rows_on_all_devices(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], channels_last: bool
) -> None:
    """A GPU has them by torch's batch norm, in half the kernels; on a CPU its parts are faster."""
    a, g = 1e3 + torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    if channels_last:
        a, g = (x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (a, g))
    before = a.clone()
    of_a_cpu = BATCH_NORM.rows(nn.BatchNorm1d(5), a, g, torch.float64, None)
    monkeypatch.setattr(norm, "UNFUSED_DEVICES", set())
    of_a_gpu = BATCH_NORM.rows(nn.BatchNorm1d(5), a, g, torch.float64, None)
    torch.testing.assert_close(of_a_gpu.g, of_a_cpu.g, rtol=1e-9, atol=1e-9)
    assert_bitwise(a, before)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_rows_give_the_gradient(padding_idx: int | None) -> None:
    module = nn.Embedding(6, 4, padding_idx=padding_idx).double()
    layer, a, g = seen_by(module, torch.tensor([[0, 2, 5], [5, 2, 1]]))
    rows = layer.observe(a, g, torch.float64, None)
    one_hot = torch.nn.functional.one_hot(a.flatten(), 6).double()
    torch.testing.assert_close(rows.g @ one_hot, grad_matrix(layer), rtol=1e-10, atol=1e-12)
    kept = one_hot if padding_idx is None else one_hot[a.flatten() != padding_idx]
    torch.testing.assert_close(rows.token_counts, kept.sum(0))
    assert int(rows.n_rows) == len(kept)


class PerSample(nn.Module):
    """A layer and the sum of squares of its output for each sample: a loss whose gradients can be had one by one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def losses(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return (y * torch.linspace(1.0, 2.0, y[0].numel(), dtype=y.dtype).view(y[0].shape)).sin().flatten(1).sum(1)


PER_SAMPLE = [
    "linear",
    "conv1d",
    "conv2d, stride and padding",
    "conv2d, groups",
    "conv2d, depthwise",
    "conv2d, circular",
    "conv3d",
]


@pytest.mark.parametrize("name", [*PER_SAMPLE, "layer norm", "rms norm", "group norm", "batch norm, kept in eval mode"])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_factors_are_those_of_per_sample_gradients(name: str, loss_reduction: str) -> None:
    """Brute force: each sample alone through the layer, its patches by F.unfold's definition, its output gradient."""
    make, shape = CASES[name]
    model = PerSample(make().double())
    x = torch.randn(shape, dtype=torch.float64)
    curvature = Curvature(model, block_size=None, averaging=0.0, max_rows=None, loss_reduction=loss_reduction)
    losses = model.losses(x)
    (losses.mean() if loss_reduction == "mean" else losses.sum()).backward()
    curvature.update()
    layer = curvature.layers["layer"]
    A = torch.zeros(layer.A.shape, dtype=torch.float64) if layer.A else None
    G = torch.zeros(layer.G.shape, dtype=torch.float64)
    for sample in x:
        model.zero_grad()
        y = model.layer(sample[None])
        y.retain_grad()
        weights = torch.linspace(1.0, 2.0, y[0].numel(), dtype=y.dtype).view(y[0].shape)
        (y[0] * weights).sin().sum().backward()
        if layer.A is None:  # the gradient of scale and shift itself, squared
            grads = torch.cat([p.grad.flatten() for p in layer.parameters])
            G += grads.square().view(G.shape) / len(x)
            continue
        a = brute_force_patches(layer, sample, y)
        g = y.grad[0].reshape(layer.G.groups, layer.G.width, -1)
        A += (a @ a.mT)[:, None] / (len(x) * g.shape[-1])
        G += (g @ g.mT)[:, None] / len(x)
    if A is not None:
        torch.testing.assert_close(curvature.factors.blocks(0, "A", "average"), A, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(curvature.factors.blocks(0, "G", "average"), G, rtol=1e-10, atol=1e-12)


def brute_force_patches(layer: Layer, sample: Tensor, y: Tensor) -> Tensor:
    """What each output position sees, found by differentiating: d(output of a layer with one-hot weight)/d(weight)."""
    module = layer.module
    width, groups = layer.A.width, layer.A.groups
    state = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    columns = []
    for entry in range(width):
        state["weight"].zero_().view(len(state["weight"]), width)[:, entry] = 1.0
        seen = torch.func.functional_call(module, state, (sample[None],))[0]
        columns.append(seen.reshape(groups, -1, y[0, 0].numel())[:, 0])
    return torch.stack(columns, dim=1)


def test_positions_of_a_sequence_are_samples() -> None:
    """A linear layer on [batch, positions, width] with a mean over all of them is one on [batch * positions, width]."""
    flat, sequence = (Curvature(nn.Sequential(nn.Linear(5, 3)).double(), block_size=2, averaging=0.0) for _ in range(2))
    sequence.model.load_state_dict(flat.model.state_dict())
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    flat.model(x.view(24, 5)).sin().mean().backward()
    sequence.model(x).sin().mean().backward()
    for curvature in (flat, sequence):
        curvature.update()
    for side in SIDES:
        torch.testing.assert_close(sequence.factors.blocks(0, side, "average"), flat.factors.blocks(0, side, "average"))


def test_max_rows_takes_rows_evenly_and_keeps_their_scale() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(1, 4, dtype=torch.float64).expand(1000, 4)
    whole, part = (Curvature(model, averaging=0.0, max_rows=rows) for rows in (None, 10))
    model(x).square().mean().backward()
    for curvature in (whole, part):
        curvature.update()
    assert part.factors.counts.sum() == 0  # cleared
    for side in SIDES:  # all rows are alike, so some of them give the same expectation
        torch.testing.assert_close(part.factors.blocks(0, side, "average"), whole.factors.blocks(0, side, "average"))


@pytest.mark.parametrize(
    ("n_processes", "max_rows", "rows"),
    [(1, 1024, 1024), (2, 1024, 512), (3, 1024, 342), (8, 1024, 256), (2, 100, 100), (4, None, 3000)],
)
def test_processes_share_max_rows(n_processes: int, max_rows: int | None, rows: int) -> None:
    """A hundred processes should not take a hundred times as many: the curvature is that of one with all batches."""
    model = nn.Sequential(nn.Linear(4, 3))
    curvature = Curvature(model, max_rows=max_rows)
    curvature.connect(FakeCommunicator(n_processes))
    model(torch.randn(3000, 4)).square().mean().backward()
    assert curvature.factors.counts[0, 0] == rows
    model.zero_grad()
    curvature.discard()
    with torch.autocast("cpu", torch.bfloat16):  # the input is kept by the hooks, thinned
        model(torch.randn(3000, 4)).square().mean().backward()
    assert curvature.factors.counts[0, 0] == rows


@pytest.mark.parametrize("statistics", ["expand", "reduce"])
def test_rows_that_are_taken_in_forward_under_autocast_are_those_taken_in_backward(statistics: str) -> None:
    """Autocast leaves float64 as it is."""
    model, x = nn.Linear(5, 3).double(), torch.randn(8, 6, 5, dtype=torch.float64)
    found = []
    for enabled in (False, True):
        curvature = Curvature(model, max_rows=7, averaging=0.0, statistics=statistics)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(x).sin().mean()
        loss.backward()
        curvature.update()
        curvature.close()
        found.append([curvature.factors.blocks(0, side, "average") for side in SIDES])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


LINES = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (7, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=1), (7, 3, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=1), (4, 2, 4, 5, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (7, 4, 5, 3)),
}


@pytest.mark.parametrize("name", LINES)
def test_max_rows_of_a_convolution_takes_lines_of_all_samples(name: str) -> None:
    """Each row that is taken is one of the whole, with its own gradient; few lines come from many samples."""
    make, shape = LINES[name]
    module = make().double()
    layer, a, g = seen_by(module, torch.randn(shape, dtype=torch.float64))
    whole = layer.observe(a, g, torch.float64, None)
    positions, first = whole.n_rows // shape[0], (a if name == "transposed" else g).shape[2]
    part = layer.observe(a, g, torch.float64, 5 * positions // first)
    assert part.n_rows == 5 * positions // first
    assert part.n_samples == part.n_rows / positions
    both, some = torch.cat([whole.a, whole.g], 1).flatten(0, 1), torch.cat([part.a, part.g], 1).flatten(0, 1)
    equal = (both[:, :, None] == some[:, None, :]).all(0)  # which of all rows each of the taken ones is
    taken = equal.int().argmax(0)
    assert equal.any(0).all()
    assert len(set(taken.tolist())) == part.n_rows
    assert len(set((taken // positions).tolist())) >= 4


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SOME_CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "stride": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": (4, 3, 2), "padding": (2, 0, 1), "stride": (1, 3, 2), "dilation": (2, 1, 3)},
]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("dims", CONVOLUTIONS)
@pytest.mark.parametrize(
    "options",
    [
        *SOME_CONVOLUTIONS,
        {"kernel_size": 2, "padding": "same", "dilation": 3, "groups": 4},
        {"kernel_size": 3, "padding": "valid", "stride": 2},
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 1, "padding": 0, "stride": (2, 1, 1)},
        {"kernel_size": 1, "padding": 1, "stride": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_lines", [2, 13])
def test_lines_that_are_taken_are_those_of_the_whole_to_the_bit(
    mode: str, dims: int, options: dict[str, Any], n_lines: int
) -> None:
    """Whether the lines that they see are read (few), or the whole input: for inputs of any layout and precision."""
    of_axes = {key: value[:dims] if isinstance(value, tuple) else value for key, value in options.items()}
    module = CONVOLUTIONS[dims](4, 8, padding_mode=mode, **of_axes)
    a = torch.randn(3, 4, *(8, 7, 6)[:dims])
    a.view(-1)[0] = math.inf  # a line of zeros is not some line times zero
    g = torch.randn_like(module(a))
    first, rest = g.shape[2], g.shape[3:].numel()
    index = taken_lines(3, first, n_lines, a.device)
    index = torch.arange(3 * first) if index is None else index
    columns = (index[:, None] * rest + torch.arange(rest)).flatten()
    innermost = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (a, g)]
    for given in ((a, g), innermost, (a.half(), g.half())):
        whole, part = (CONVOLUTION.rows(module, *given, torch.float32, rows) for rows in (None, n_lines * rest))
        assert_bitwise(part.a, whole.a[..., columns])
        assert_bitwise(part.g, whole.g[..., columns])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("dims", CONVOLUTIONS)
@pytest.mark.parametrize(
    "options",
    SOME_CONVOLUTIONS,
    ids=str,
)
def test_a_reduced_row_of_an_image_is_the_mean_of_its_patches_and_the_sum_of_its_gradients(
    mode: str, dims: int, options: dict[str, Any]
) -> None:
    of_axes = {key: value[:dims] if isinstance(value, tuple) else value for key, value in options.items()}
    module = CONVOLUTIONS[dims](4, 8, padding_mode=mode, **of_axes).double()
    a = torch.randn(3, 4, *(8, 7, 6)[:dims], dtype=torch.float64)
    g = torch.randn_like(module(a))
    rows = CONVOLUTION.rows(module, a, g, torch.float64, None)
    for given in ((a, g), [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (a, g)]):
        reduced = CONVOLUTION.reduced_rows(module, *given, torch.float64, None)
        torch.testing.assert_close(reduced.a, rows.a.unflatten(-1, (3, -1)).mean(-1))
        torch.testing.assert_close(reduced.g, rows.g.unflatten(-1, (3, -1)).sum(-1))


def test_max_rows_are_images_of_a_convolution_where_each_is_one_row() -> None:
    """And not so few that they have as many positions: of images of 32 x 32 it would be one."""
    a = torch.randn(7, 2, 32, 32)
    module = nn.Conv2d(2, 3, 3)
    g = torch.randn_like(module(a))
    assert CONVOLUTION.reduced_rows(module, a, g, torch.float32, 1024).n_rows == 7
    assert CONVOLUTION.reduced_rows(module, a, g, torch.float32, 5).n_rows == 5


def test_large_kernels_on_inputs_of_ever_new_sizes_do_not_fill_the_memory() -> None:
    conv, most = nn.Conv1d(1, 1, 80, stride=2), 1000
    for length in range(2100, 2130):
        a = torch.zeros(1, 1, length)
        CONVOLUTION.rows(conv, a, conv(a).detach(), torch.float32, most)
    held = [x for x in gc.get_objects() if type(x) is Tensor and x.dtype == torch.int64 and x.numel() == 80 * most]
    assert len({x.data_ptr() for x in held}) <= 16


def test_an_index_of_millions_is_not_kept() -> None:
    conv, a = nn.Conv2d(1, 1, 3, padding=1), torch.zeros(16, 1, 128, 128)
    CONVOLUTION.rows(conv, a, conv(a).detach(), torch.float32, 10**6)
    n = 9 * a.numel()
    assert not [x for x in gc.get_objects() if type(x) is Tensor and x.dtype == torch.int64 and x.numel() == n]


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Conv3d(1, 2, 3, padding=1), (2, 1, 6, 32, 32)), (nn.Conv2d(1, 2, 3, padding=1), (2, 1, 6, 1024))],
    ids=["volume", "spectrogram"],
)
def test_the_only_line_that_is_taken_does_not_see_the_padding(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Or entries of the kernel that only ever see zeros there would have no part in A."""
    layer, a, g = seen_by(module, torch.ones(shape))
    seen = layer.observe(a, g, torch.float32, 1024)
    assert seen.n_rows == 1024
    assert seen.a.sum(-1).amin() > 0


def test_max_rows_takes_at_least_one_line() -> None:
    layer, a, g = seen_by(nn.Conv2d(2, 3, 3, padding=1), torch.randn(10, 2, 5, 5))
    assert layer.observe(a, g, torch.float32, 1).n_rows == 5


@pytest.mark.parametrize("module", [nn.LayerNorm(6), nn.RMSNorm(6)])
def test_max_rows_of_a_norm_takes_some_of_its_positions(module: nn.Module) -> None:
    layer, a, g = seen_by(module, torch.randn(4, 9, 6))
    whole, part = (layer.observe(a, g, torch.float32, rows) for rows in (None, 7))
    assert (part.n_rows, part.n_samples) == (7, 7)
    # Sums over other numbers of rows may round otherwise.
    assert torch.isclose(whole.g[0].T[:, None], part.g[0].T, rtol=1e-5, atol=1e-6).all(-1).any(0).all()


@pytest.mark.parametrize(
    ("positions", "max_rows", "taken"),
    [
        ((), None, 7),
        ((4, 4), 7, 7),
        ((), 3, 3),
        ((4, 4), 3, 3),
        ((16, 12), 84, 7),
        ((16, 12), 72, 3),
        ((16, 12), 1, 1),
        ((64, 48), 96, 3),
    ],
)
@pytest.mark.parametrize("kind", [GROUP_NORM, BATCH_NORM])
def test_max_rows_of_a_norm_of_channels_takes_whole_samples(
    kind: LayerKind, positions: tuple[int, ...], max_rows: int | None, taken: int
) -> None:
    """As many as rows, of 16 times as many positions; their rows are those of a batch that has no other samples."""
    module = nn.GroupNorm(4, 4) if kind is GROUP_NORM else nn.BatchNorm2d(4)
    a, g = torch.randn(2, 7, 4, *positions, dtype=torch.float64)
    rows = kind.rows(module, a, g, torch.float64, max_rows)
    assert (rows.n_rows, rows.n_samples, rows.g.shape) == (taken, taken, (1, 8, taken))
    step = {7: 1, 3: 3, 1: 7}[taken]
    alone = kind.rows(module, a[::step], g[::step], torch.float64, None)
    assert_bitwise(rows.g, alone.g)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.BatchNorm2d(6).eval()])
@pytest.mark.parametrize("max_rows", [3, 9])
def test_norms_of_some_samples_have_the_expectation_of_all(norm: nn.Module, max_rows: int) -> None:
    """The mean of G over all rotations of a batch, by which each sample is taken as often, is G of the whole batch."""
    model = nn.Sequential(norm).double()
    x = torch.randn(7, 6, 12, 16, dtype=torch.float64)
    whole, part = (Curvature(model, averaging=0.0, max_rows=rows, update_every_n_steps=1) for rows in (None, max_rows))
    found = []
    for start in range(7):
        model(x.roll(start, 0)).sin().sum((1, 2, 3)).mean().backward()
        for curvature in (whole, part):
            curvature.update()
        found.append(part.factors.blocks(0, "G", "average").clone())
    torch.testing.assert_close(torch.stack(found).mean(0), whole.factors.blocks(0, "G", "average"))
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 6), nn.BatchNorm2d(6), nn.BatchNorm2d(6).eval()])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_of_samples_that_are_alike_some_give_a_norm_the_same_G(norm: nn.Module, loss_reduction: str) -> None:
    model = nn.Sequential(norm).double()
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64).expand(8, 6, 4, 4)
    options: dict[str, Any] = {"averaging": 0.0, "loss_reduction": loss_reduction}
    whole, part = (Curvature(model, max_rows=rows, **options) for rows in (None, 3))
    losses = model(x).sin().sum((1, 2, 3))
    (losses.mean() if loss_reduction == "mean" else losses.sum()).backward()
    for curvature in (whole, part):
        curvature.update()
    torch.testing.assert_close(part.factors.blocks(0, "G", "average"), whole.factors.blocks(0, "G", "average"))


def test_rows_that_are_left_out_do_not_change_the_expectation() -> None:
    """Images that look the same everywhere: their lines have the statistics of the whole."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1)).double()
    x = torch.randn(1, 2, 1, 1, dtype=torch.float64).expand(8, 2, 5, 5)
    whole, part = (Curvature(model, averaging=0.0, max_rows=rows) for rows in (None, 15))
    model(x).square().mean().backward()
    for curvature in (whole, part):
        curvature.update()
    torch.testing.assert_close(part.factors.positions, whole.factors.positions)
    for side in SIDES:
        torch.testing.assert_close(part.factors.blocks(0, side, "average"), whole.factors.blocks(0, side, "average"))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 3), torch.randn(0, 4)),
        (nn.Conv2d(2, 3, 3), torch.randn(0, 2, 5, 5)),
        (nn.Embedding(4, 3), torch.zeros(0, 7, dtype=torch.int64)),
        (nn.LayerNorm(4), torch.randn(0, 4)),
        (nn.GroupNorm(2, 4), torch.randn(0, 4, 5)),
        (nn.BatchNorm1d(4), torch.randn(0, 4)),
        (nn.BatchNorm2d(4), torch.randn(0, 4, 5, 5)),
        (nn.BatchNorm1d(4), torch.randn(3, 4, 0)),
    ],
)
def test_an_empty_batch_is_observed_as_nothing(layer: nn.Module, x: Tensor) -> None:
    curvature = Curvature(layer)
    layer(x).sum().backward()
    assert curvature.factors.flat_sums.abs().sum() == 0
    curvature.update()
    assert curvature.factors.updates.sum() == 0
    assert all(torch.isfinite(d).all() for d in curvature.precondition({layer.weight: layer.weight.grad}).values())


@pytest.mark.parametrize("name", ["linear on a sequence", "conv2d, stride and padding", "conv2d, groups", "conv1d"])
def test_reduced_factors_are_those_of_averaged_inputs_and_summed_gradients(name: str) -> None:
    """By brute force, sample by sample, for a loss with one term per sample (Eschenhagen et al. 2023, section 3.2)."""
    make, shape = CASES[name]
    model = PerSample(make().double())
    x = torch.randn(shape, dtype=torch.float64)
    curvature = Curvature(model, block_size=None, averaging=0.0, max_rows=None, statistics="reduce")
    model.losses(x).mean().backward()
    curvature.update()
    layer = curvature.layers["layer"]
    A, G = torch.zeros(layer.A.shape, dtype=torch.float64), torch.zeros(layer.G.shape, dtype=torch.float64)
    for sample in x:
        y = model.layer(sample[None])
        y.retain_grad()
        (y[0] * torch.linspace(1.0, 2.0, y[0].numel(), dtype=y.dtype).view(y[0].shape)).sin().sum().backward()
        if isinstance(layer.module, nn.Linear):
            a, g = sample.T[None], y.grad[0].T[None]
        else:
            a, g = brute_force_patches(layer, sample, y), y.grad[0].reshape(layer.G.groups, layer.G.width, -1)
        a, g = a.mean(-1, keepdim=True), g.sum(-1, keepdim=True)
        A += (a @ a.mT)[:, None] / len(x)
        G += (g @ g.mT)[:, None] / len(x)
    torch.testing.assert_close(curvature.factors.blocks(0, "A", "average"), A, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(curvature.factors.blocks(0, "G", "average"), G, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("precondition_bias", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_identity_inverses_give_the_gradient_back(name: str, precondition_bias: bool) -> None:
    """The matrix form of every kind of weight, there and back."""
    make, shape = CASES[name]
    layer, _, _ = seen_by(make().double(), torch.randn(shape, dtype=torch.float64), precondition_bias)

    def identity(size: int, n_blocks: int) -> Tensor:
        return torch.eye(size, dtype=torch.float64).repeat(n_blocks, 1, 1)

    A = None if layer.A is None else identity(layer.A.size, layer.A.groups * layer.A.n_blocks).view(layer.A.shape)
    G = identity(layer.G.size, layer.G.groups * layer.G.n_blocks).view(layer.G.shape)
    grads = [p.grad for p in layer.parameters if p.grad is not None]
    assert_bitwise(preconditioned(layer, grads, A, G), grads)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_its_default_eps_is_observed_as_it_was_computed(dtype: torch.dtype, scale: float) -> None:
    """Beside its own output: where inputs are small eps decides, and which one torch takes is not for us to say."""
    torch.manual_seed(0)
    norm, a, g = nn.RMSNorm(16).to(dtype), (scale * torch.randn(64, 16)).to(dtype), torch.randn(64, 16).to(dtype)
    rows = RMS_NORM.rows(norm, a, g, torch.float32, None)
    expected = (g.float() * norm(a).detach().float()).T[None]
    torch.testing.assert_close(rows.g, expected, rtol=0.02, atol=1e-3)
