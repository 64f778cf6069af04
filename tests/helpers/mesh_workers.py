"""Trainings over meshes of two and four ranks: replicas, shards and tensor parallelism, in plain loops.

``python mesh_workers.py FOLDER NAME ...`` runs these trainings of `TRAININGS`; each rank saves what came out of it as
``FOLDER/<name>-<rank>.pt``. `trained` starts that program once for all tests.
"""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from lightning_thor import Curvature, ShardedCurvature, Thor, register_layer
from lightning_thor.distributed.dtensor import local_parts
from lightning_thor.distributed.process_group import ProcessGroupCommunicator, new_worker_grid
from tests.helpers.distributed_workers import listed_collectives, whole
from tests.helpers.launching import fork, run_forked
from tests.helpers.sharded_workers import fully_shard

VOCABULARY, WIDTH, N_SAMPLES, LENGTH, N_STEPS = 11, 8, 4, 6, 4


class Text(nn.Module):
    """A language model with a table, norms, a column-parallel and a row-parallel layer, and a head."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)
        self.last = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.down(self.up(self.norm(x)).tanh())
        logits: Tensor = self.head(self.last(x))
        return logits


class Experts(nn.Module):
    """As a linear layer, with a weight for every third position: three experts in one parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.stack = nn.Parameter(linear.weight.detach() * torch.tensor([0.5, 1.0, 1.5])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        output = x.new_zeros(*x.shape[:-1], self.stack.shape[1])
        for number, one in enumerate(self.stack):
            output[:, number::3] = nn.functional.linear(x[:, number::3], one)
        return output


register_layer(Experts, matrices="out_in")


class OfEachKind(nn.Module):
    """In the place of a linear layer: an attention, a convolution with groups, a norm of groups and a GRU."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, bias=False, batch_first=True)
        self.convolution = nn.Conv1d(WIDTH, 6, 3, groups=2, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.recurrent = nn.GRU(6, n_outputs, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        output: Tensor = self.recurrent(self.norm(self.convolution(x.mT)).mT)[0]
        return output


class Adapted(nn.Module):
    """A frozen layer and a low-rank one beside it (LoRA)."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.reduce, self.expand = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, frozen.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.frozen(x) + self.expand(self.reduce(x))
        return adapted


def changed(model: Text, policy: str) -> Text:
    """The model of one process, with frozen, adapted, tied, stacked, checkpointed, compiled or other layers.

    The policy ``"half"`` leaves the first half of the hidden features without a gradient at first.
    """
    if policy == "frozen":
        model.up.requires_grad_(False)
        model.norm.requires_grad_(False)
    elif policy == "lora":
        model.up = Adapted(model.up)  # type: ignore[assignment]
    elif policy == "half":
        with torch.no_grad():
            model.down.weight[:, : model.up.out_features // 2] = 0.0
    elif policy == "of_each_kind":
        model.up = OfEachKind(model.up.out_features)  # type: ignore[assignment]
    elif policy == "experts":
        model.up, model.down = Experts(model.up), Experts(model.down)  # type: ignore[assignment]
    elif policy == "tied":
        model.head.weight = model.table.weight
    elif policy == "activation_checkpointing":
        model.up = checkpoint_wrapper(model.up)
    elif policy == "compiled":
        # Not the norm, to which a split table hands an output that is still on its way: torch 2.13 loses its gradient.
        for layer in (model.up, model.down):
            layer.compile(backend="aot_eager")
    return model


SHARDED_BY: dict[str, dict[str, Any]] = {
    "no_reshard": {"reshard_after_forward": False},
    "reshard_to_two": {"reshard_after_forward": 2},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
}
"""Options of ``fully_shard`` by policy."""
IN_BFLOAT16 = ("mixed", "autocast")
"""Policies that take products in bfloat16 and keep factors in float32: FSDP2's, and that of precision="bf16-mixed"."""


def batch(number: int) -> Tensor:
    """Tokens ``[N_SAMPLES, LENGTH + 1]``."""
    return torch.randint(VOCABULARY, (N_SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(number))


class Case(NamedTuple):
    """One training."""

    mode: str = "natural"
    shape: tuple[int, int, int] = (1, 1, 1)
    """Replicas, shards of each, and ranks of tensor parallelism."""
    sequence: bool = False
    """Whether norms are sequence-parallel, and the loss takes sharded logits."""
    hidden: int = 16
    """With 12, a block of 4 lies on two ranks of tensor parallelism."""
    options: tuple[tuple[str, Any], ...] = ()
    """Of the curvature."""
    policy: str = ""
    """How the model is sharded or changed: see `changed`, `SHARDED_BY` and `train`."""
    inverse_workers: int | None = None
    """Ranks that store a layer's inverses; None: all."""
    begins_over: tuple[int, int, int] | None = None
    """Another ``shape``, over which it is trained until a checkpoint in its middle."""

    @property
    def n_ranks(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def n_micro(self) -> int:
        return 2 if self.policy == "accumulation" else 1


def parallelized(model: Text, tensor: Any, shards: Any, *, sequence: bool = False, **options: Any) -> Text:
    """Share out products over the mesh ``tensor``, and weights over the mesh ``shards``, where these are not None."""
    if tensor is not None:
        rows = Shard(1) if sequence else Replicate()
        plan: dict[str, Any] = {
            "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=rows),
            "up": ColwiseParallel(input_layouts=rows),
            "down": RowwiseParallel(output_layouts=rows),
            "head": ColwiseParallel(
                input_layouts=rows,
                output_layouts=Shard(-1) if sequence else Replicate(),
                use_local_output=not sequence,
            ),
        }
        if sequence:
            plan |= {"norm": SequenceParallel(), "last": SequenceParallel()}
        parallelize_module(model, tensor, plan)
    if shards is not None:
        fully_shard(model.up, mesh=shards, **options)
        fully_shard(model, mesh=shards, **options)
    return model


@functools.lru_cache
def mesh_of(shape: tuple[int, int, int]) -> Any:
    """With process groups of its own, which take long to connect."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tensor"))


def made(case: Case) -> tuple[nn.Module, Curvature, Thor]:
    """A model over the mesh of ``case``, its curvature and its optimizer."""
    model = changed(Text(case.hidden), case.policy).to(torch.float32 if case.policy in IN_BFLOAT16 else torch.float64)
    if case.n_ranks > 1:
        replicas, n_shards, width = case.shape
        mesh = mesh_of(case.shape)
        shards = mesh["replicate", "shard"] if replicas > 1 else mesh["shard"] if n_shards > 1 else None
        tensor = mesh["tensor"] if width > 1 else None
        parallelized(model, tensor, shards, sequence=case.sequence, **SHARDED_BY.get(case.policy, {}))
    options = {
        "block_size": 4,
        "update_every_n_steps": 2,
        "loss_multiplier": lambda: 1 / case.n_micro,
        **dict(case.options),
    }
    curvature = Curvature(model, mode=case.mode, **options)
    if case.inverse_workers is not None and case.n_ranks > 1:
        grid = new_worker_grid(case.inverse_workers, tensor_parallel_size=case.shape[2])
        curvature.connect(ProcessGroupCommunicator(), worker_grid=grid)
    preconditioner: Any = ShardedCurvature(curvature) if case.n_ranks > 1 else curvature
    optimizer = Thor(model.parameters(), lr=0.02, mode=case.mode, weight_decay=0.1, preconditioner=preconditioner)
    return model, curvature, optimizer


def state_of(model: nn.Module, curvature: Curvature, optimizer: Thor) -> dict[str, Any]:
    """What `torch.distributed.checkpoint` saves, and loads in place."""
    weights, moments = get_state_dict(model, optimizer)
    of_curvature = curvature.state_dict()
    curvature.gather_inverses(of_curvature)
    return {"weights": weights, "moments": moments, "curvature": of_curvature}


def move(begun: tuple[nn.Module, Curvature, Thor], case: Case) -> tuple[nn.Module, Curvature, Thor]:
    """Go on over the mesh of ``case`` from a checkpoint."""
    folder = [tempfile.mkdtemp(prefix="lightning_thor_moves_")]
    dist.broadcast_object_list(folder)
    save(state_of(*begun), checkpoint_id=folder[0])
    model, curvature, optimizer = made(case)
    load(state := state_of(model, curvature, optimizer), checkpoint_id=folder[0])
    set_state_dict(model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"])
    curvature.load_state_dict(state["curvature"])
    dist.barrier()
    shutil.rmtree(folder[0], ignore_errors=True)
    return model, curvature, optimizer


def train(case: Case) -> dict[str, Any]:
    """Everything that the laws compare, whole."""
    over = case._replace(shape=case.begins_over or case.shape)
    model, curvature, optimizer = made(over)
    sent, n_of_model = [], []
    for number in range(N_STEPS):
        if number == N_STEPS // 2 and over != case:
            over = case
            model, curvature, optimizer = move((model, curvature, optimizer), case)
        replicas, n_shards, width = over.shape
        tokens = batch(number).chunk(replicas * n_shards)[dist.get_rank() // width if over.n_ranks > 1 else 0]
        n_of_model.append(0)
        for place, some in enumerate(tokens.chunk(case.n_micro)):
            if case.n_micro > 1 and case.n_ranks > 1:
                model.set_requires_gradient_sync(place == case.n_micro - 1)  # type: ignore[operator]
            communication = CommDebugMode()
            with communication if case in COUNTED else nullcontext(), loss_parallel():
                with torch.autocast("cpu", torch.bfloat16, enabled=case.policy == "autocast"):
                    logits = model(some[:, :-1]).flatten(0, 1)
                    loss = nn.functional.cross_entropy(logits, some[:, 1:].flatten()) / case.n_micro
                loss.backward()
            if case in COUNTED:
                n_of_model[-1] += communication.get_total_counts()
        with listed_collectives() as calls:
            optimizer.step()
        sent.append([(call["op"], call["numel"]) for call in calls])
        optimizer.zero_grad()
    names = {p: name for name, p in model.named_parameters()}
    states, batches, of_curvature = optimizer.state.values(), curvature.factors.batches.values(), curvature.state_dict()
    curvature.gather_inverses(of_curvature)
    keys = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    return {
        "weights": whole({name: p.detach().clone() for p, name in names.items()}),
        "state": whole({names[p]: {k: v for k, v in one.items() if k in keys} for p, one in optimizer.state.items()}),
        "curvature": {k: v for k, v in of_curvature.items() if not isinstance(v, str)},
        "bytes": {
            "weights": sum(p.nbytes for p in local_parts(model.parameters())),
            "momentum": sum(m.nbytes for m in local_parts(one[keys[0]] for one in states if keys[0] in one)),
            "curvature": sum(x.nbytes for one in batches for x in (one.sums, one.average, one.inverse)),
        },
        "sent": sent,
        "n_of_model": n_of_model,
    }


MESHES = {
    "fsdp": (1, 4, 1),
    "hsdp": (2, 2, 1),
    "tp": (1, 1, 2),
    "tp_fsdp": (1, 2, 2),
    "tp_of_four": (1, 1, 4),
    "tp_hsdp": (2, 1, 2),
}
MODES = ("natural", "polar", "adam")
TRAININGS: dict[str, Case] = {
    **{f"{mesh}_{mode}": Case(mode, shape) for mesh, shape in MESHES.items() for mode in ("natural", "polar", "adam")},
    **{
        f"{mesh}_sequence_{mode}": Case(mode, MESHES[mesh], sequence=True)
        for mesh in ("tp", "tp_fsdp")
        for mode in ("natural", "polar", "adam")
    },
    **{f"{mesh}_on_borders": Case(shape=MESHES[mesh], hidden=12) for mesh in ("tp", "tp_fsdp", "tp_of_four")},
    "tp_on_borders_adam": Case("adam", MESHES["tp"], hidden=12),
    **{
        policy: Case(shape=(1, 2, 1), policy=policy)
        for policy in (
            "no_reshard",
            "offload",
            "mixed",
            "accumulation",
            "frozen",
            "lora",
            "tied",
            "activation_checkpointing",
            "compiled",
        )
    },
    **{
        f"{mesh}_autocast_{mode}": Case(mode, MESHES[mesh], policy="autocast")
        for mesh in ("fsdp", "hsdp", "tp", "tp_fsdp")
        for mode in ("natural", "polar", "adam")
    },
    **{
        f"{mesh}_experts_{mode}": Case(mode, MESHES[mesh], policy="experts")
        for mesh in ("fsdp", "hsdp")
        for mode in ("natural", "polar", "adam")
    },
    **{f"mixed_{mode}": Case(mode, (1, 2, 1), policy="mixed") for mode in ("polar", "adam")},
    "fsdp_reshard_to_two": Case(shape=MESHES["fsdp"], policy="reshard_to_two"),
    **{f"hsdp_of_each_kind_{mode}": Case(mode, MESHES["hsdp"], policy="of_each_kind") for mode in MODES},
    "fsdp_of_each_kind": Case(shape=MESHES["fsdp"], policy="of_each_kind", options=(("precondition_bias", True),)),
    **{f"tp_fsdp_to_hsdp_{mode}": Case(mode, MESHES["hsdp"], begins_over=MESHES["tp_fsdp"]) for mode in MODES},
    "fsdp_to_tp_fsdp_workers": Case("adam", MESHES["tp_fsdp"], inverse_workers=2, begins_over=MESHES["fsdp"]),
    "fsdp_experts_workers": Case(shape=MESHES["fsdp"], policy="experts", inverse_workers=2),
    "tp_compiled": Case(shape=MESHES["tp"], policy="compiled"),
    "tp_reduce": Case(shape=MESHES["tp"], options=(("statistics", "reduce"),)),
    "tp_masked": Case(shape=MESHES["tp"], policy="half", options=(("statistics", "masked"),)),
    **{
        f"{mesh}_workers_{mode}": Case(mode, MESHES[mesh], inverse_workers=n)
        for mesh, n in (("fsdp", 1), ("hsdp", 2), ("tp_fsdp", 2))
        for mode in ("natural", "polar", "adam")
    },
    "two_workers": Case(shape=MESHES["fsdp"], inverse_workers=2),
    "two_workers_of_two": Case(shape=(1, 2, 1), inverse_workers=1),
    "workers_and_rule": Case(
        shape=MESHES["fsdp"],
        inverse_workers=2,
        options=(("stagger", True), ("trace_rule", (0.05, 0.001)), ("update_every_n_steps", 1)),
    ),
    "tp_fsdp_whole": Case(shape=MESHES["tp_fsdp"], options=(("block_size", None),)),
}
COUNTED = (TRAININGS["tp_adam"], TRAININGS["tp_on_borders"])
"""Of which the model's own messages are counted: that takes as long as all the rest of a training."""
PLAIN = ("hsdp_natural", "tp_fsdp_sequence_natural", "tp_adam", "tp_on_borders", "tp_fsdp_workers_adam")
"""Of the tests that are not marked slow."""
LONG = (
    *(name for name in TRAININGS if name.startswith(("tp_of_four", "tp_hsdp"))),
    *("fsdp_polar", "hsdp_adam", "tp_polar"),
    *(f"tp_sequence_{mode}" for mode in ("natural", "adam")),
    *(f"tp_fsdp_sequence_{mode}" for mode in ("polar", "adam")),
    "tp_fsdp_whole",
    *(f"hsdp_of_each_kind_{mode}" for mode in ("natural", "polar")),
    "tp_fsdp_to_hsdp_natural",
    "tp_fsdp_to_hsdp_polar",
    "fsdp_of_each_kind",
    *(f"fsdp_autocast_{mode}" for mode in ("polar", "adam")),
    *(f"hsdp_autocast_{mode}" for mode in MODES),
    *(f"tp_autocast_{mode}" for mode in ("natural", "adam")),
    *(f"tp_fsdp_autocast_{mode}" for mode in MODES),
    *(f"fsdp_experts_{mode}" for mode in ("natural", "adam")),
    *(f"hsdp_experts_{mode}" for mode in ("natural", "polar")),
    *(f"fsdp_workers_{mode}" for mode in ("natural", "polar")),
    *(f"hsdp_workers_{mode}" for mode in ("natural", "adam")),
    "tp_fsdp_workers_polar",
    *(f"mixed_{mode}" for mode in ("polar", "adam")),
)
"""Of the tests that are marked long: other combinations of what the other tests hold on as many ranks."""


def work(folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for name in names:
        torch.save(train(TRAININGS[name]), folder / f"{name}-{dist.get_rank()}.pt")
    dist.barrier()


@functools.lru_cache
def launched(names: tuple[str, ...]) -> tuple[tempfile.TemporaryDirectory[str], str]:
    """The folder with the results of these trainings (it goes with the cache), and what the processes printed."""
    folder = tempfile.TemporaryDirectory(prefix="lightning_thor_meshes_")
    return folder, run_forked(__file__, folder.name, *names)[1]


def trained(name: str) -> list[dict[str, Any]]:
    """What the training ``name`` gave on each rank."""
    ordinary = tuple(one for one in TRAININGS if one not in {*PLAIN, *LONG})
    folder, printed = launched(next(some for some in (PLAIN, LONG, ordinary) if name in some))
    files = [Path(folder.name) / f"{name}-{rank}.pt" for rank in range(TRAININGS[name].n_ranks)]
    assert all(file.is_file() for file in files), f"{name!r} did not end. They printed: ...{printed[-6000:]}"
    return [torch.load(file, weights_only=True) for file in files]


if __name__ == "__main__":
    for n_ranks in (2, 4):
        chosen = [name for name in sys.argv[2:] if TRAININGS[name].n_ranks == n_ranks]
        fork(n_ranks, partial(work, Path(sys.argv[1]), chosen))
