"""What users' programs, configuration files and logs name stays where it is, however the package is built inside."""

from __future__ import annotations

import csv
import inspect
import re
from collections.abc import Callable, Iterator
from inspect import Parameter
from pathlib import Path
from typing import Any

import pytest
from jsonargparse._util import get_import_path, import_object  # what resolves and writes a class_path
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry

import lightning_thor
from lightning_thor import ThorCallback
from lightning_thor.curvature.part_timer import OWN_PARTS
from tests.helpers.boring import Boring, trainer
from tests.helpers.launching import ROOT, run

NAMES = {
    "Curvature",
    "Thor",
    "ThorCallback",
    "ThorDDPStrategy",
    "ThorModelParallelStrategy",
    "ThorMonitor",
    "configure_thor",
    "ShardedCurvature",
    "ThorStrategyMixin",
    "choose_block_size",
    "exact_factors",
    "register_layer",
    "setup_fabric",
}
CLASSES_OF_CONFIGURATIONS = [
    "lightning_thor.Curvature",
    "lightning_thor.Thor",
    "lightning_thor.ThorCallback",
    "lightning_thor.ThorDDPStrategy",
    "lightning_thor.ThorModelParallelStrategy",
    "lightning_thor.ThorMonitor",
    "lightning_thor.recipes.ResNet50Damping",
    "lightning_thor.recipes.ResNet50LearningRate",
    "lightning_thor.schedules.Exponential",
    "lightning_thor.schedules.GrowingInterval",
    "lightning_thor.schedules.PerStepLR",
    "lightning_thor.schedules.Polynomial",
]
ADDRESSES = [
    *CLASSES_OF_CONFIGURATIONS,
    "lightning_thor.choose_block_size",
    "lightning_thor.configure_thor",
    "lightning_thor.exact_factors",
    "lightning_thor.register_layer",
    "lightning_thor.setup_fabric",
    "lightning_thor.mindspore.MindSporeThor",
    "lightning_thor.mindspore.thor",
    "lightning_thor.recipes.Recipe",
    "lightning_thor.recipes.bert_large",
    "lightning_thor.recipes.resnet50_imagenet",
    "lightning_thor.sharded.ShardedCurvature",
    "lightning_thor.split.choose_block_size",
]
ATTRIBUTES = [
    "lightning_thor.schedules.Polynomial",
    "lightning_thor.sharded.ShardedCurvature",
    "lightning_thor.split.choose_block_size",
]
"""Some that ``import lightning_thor`` alone is enough for."""

CONFIGURATIONS = sorted((ROOT / "examples").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.py"))]


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def class_paths(file: Path) -> set[str]:
    return set(re.findall(r"class_path: (lightning_thor[\w.]*)", text_of(file)))


def named(file: Path) -> set[str]:
    """What a page writes with dots, or imports."""
    imports = re.findall(r"from (lightning_thor[\w.]*) import ([\w, ]+)", text_of(file))
    imported = {f"{module}.{name.strip()}" for module, names in imports for name in names.split(",")}
    return imported | set(re.findall(r"lightning_thor(?:\.\w+)+", text_of(file)))


WRITTEN = sorted(
    {*(a for file in CONFIGURATIONS for a in class_paths(file)), *(a for file in PAGES for a in named(file))}
)


def test_the_package_has_all_its_names() -> None:
    assert set(lightning_thor.__all__) == NAMES
    assert all(hasattr(lightning_thor, name) for name in lightning_thor.__all__)


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_leads_somewhere(address: str) -> None:
    assert import_object(address).__name__ == address.rpartition(".")[2]


@pytest.mark.parametrize("address", WRITTEN)
def test_so_does_every_one_that_the_documentation_and_the_examples_write(address: str) -> None:
    import_object(address)


def test_the_documentation_and_the_examples_were_read() -> None:
    assert {"lightning_thor.ThorCallback", "lightning_thor.recipes.ResNet50Damping"} <= set(WRITTEN)  # class_path
    assert {"lightning_thor.recipes", "lightning_thor.mindspore.thor"} <= set(WRITTEN)  # with dots, and imported
    assert all(map(class_paths, CONFIGURATIONS))


@pytest.mark.parametrize("address", CLASSES_OF_CONFIGURATIONS)
def test_a_saved_configuration_names_a_class_by_its_address(address: str) -> None:
    """LightningCLI writes a config.yaml beside each run's logs, from which the run can be repeated."""
    assert get_import_path(import_object(address)) == address


@pytest.mark.slow
def test_a_new_process_finds_them_and_the_strategies_after_nothing_but_the_import() -> None:
    program = f"""
import lightning_thor
{", ".join(ATTRIBUTES)}
from lightning.pytorch.strategies import StrategyRegistry
assert {{"thor_ddp", "thor_fsdp2"}} <= set(StrategyRegistry)
from jsonargparse._util import import_object
print(len([import_object(address) for address in {ADDRESSES + WRITTEN!r}]), "found")
"""
    status, printed = run(["-c", program])
    assert (status, printed.splitlines()[-1]) == (0, f"{len(ADDRESSES + WRITTEN)} found"), printed[-3000:]


@pytest.mark.parametrize("launcher", ["", "_spawn", "_fork", "_notebook"])
@pytest.mark.parametrize("unused", ["", "_find_unused_parameters_false", "_find_unused_parameters_true"])
def test_every_form_of_ddp_has_its_name(launcher: str, unused: str) -> None:
    assert StrategyRegistry[f"thor_ddp{launcher}{unused}"]["strategy"] is lightning_thor.ThorDDPStrategy


def test_sharded_models_have_their_strategy() -> None:
    assert StrategyRegistry["thor_fsdp2"]["strategy"] is lightning_thor.ThorModelParallelStrategy


def test_the_command_leads_somewhere() -> None:
    (address,) = re.findall(r'^lightning-thor = "([\w.]+:\w+)"$', text_of(ROOT / "pyproject.toml"), re.MULTILINE)
    assert callable(import_object(address.replace(":", ".")))


@pytest.mark.parametrize(
    ("trace_rule", "keys"),
    [
        (None, set()),
        ("THOR", {"thor/refreshed_share"}),
    ],
)
def test_a_fit_logs_these_keys(tmp_path: Path, trace_rule: Any, keys: set[str]) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    callback = ThorCallback(trace_rule=trace_rule, summary=False)
    trainer(tmp_path, callback, logger=logger, max_epochs=1, log_every_n_steps=1).fit(Boring())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        columns = next(csv.reader(file))
    always = {"failed_inversions", "rejected_windows", "refreshes", "inverse_age", "damping", "update_to_weights"}
    always |= {"factor_change", *(f"time_in_{part}" for part in OWN_PARTS)}
    assert {column for column in columns if column.startswith("thor")} == keys | {f"thor/{name}" for name in always}


# ── options ──


def a_function() -> None:
    """Stands for any, as the default of an option."""


def of_thor(
    params,
    lr=0.006,
    *,
    mode="natural",
    momentum=0.9,
    beta2=0.99,
    nesterov=True,
    weight_decay=0.0,
    decoupled_weight_decay=True,
    match_rms=0.2,
    rms_averaging=0.9,
    max_relative_step=0.01,
    kl_clip=None,
    clip_norm=None,
    preconditioner=None,
): ...


def of_callback(
    *,
    damping=0.2,
    damping_rule="trace",
    block_size=64,
    update_every_n_steps=None,
    averaging=0.8,
    precondition_bias=False,
    stagger=False,
    trace_rule=None,
    max_rows=1024,
    statistics="expand",
    loss_reduction="mean",
    fused=None,
    skip_layers=(),
    loss_terms=None,
    waits_for_thor=False,
    summary=None,
): ...


def of_curvature(
    model,
    *,
    mode="natural",
    damping=0.2,
    damping_rule="trace",
    block_size=64,
    update_every_n_steps=None,
    averaging=0.8,
    precondition_bias=False,
    stagger=False,
    trace_rule=None,
    max_rows=1024,
    statistics="expand",
    loss_reduction="mean",
    loss_multiplier=None,
    loss_terms=None,
    fused=None,
    skip_layers=(),
    parameters=None,
    output_layer=None,
): ...


def of_configure_thor(module, lr=0.006, *, weight_decay=0.0, **options): ...


def of_ddp(*args, factor_bucket_mb=None, split_indices=None, bf16_factors=False, inverse_workers=None, **kwargs): ...


def of_model_parallel(
    data_parallel_size="auto",
    tensor_parallel_size=1,
    *,
    replicas=1,
    factor_bucket_mb=None,
    split_indices=None,
    bf16_factors=False,
    inverse_workers=None,
    **kwargs,
): ...


def of_register_layer(module_type, rows_of=None, *, like=None, matrices=None, matrix=a_function, weight="weight"): ...


def of_mindspores_thor(
    net,
    learning_rate,
    damping,
    momentum,
    weight_decay=0.0,
    loss_scale=1.0,
    batch_size=32,
    use_nesterov=False,
    decay_filter=a_function,
    split_indices=None,
    enable_clip_grad=False,
    frequency=100,
    variant="gpu",
    params=None,
): ...


def of_choose_block_size(
    model,
    loss_of_a_batch,
    *,
    precondition_bias=False,
    max_rows=1024,
    statistics="expand",
    fused=None,
    skip_layers=(),
    parameters=None,
): ...


def of_recipe(
    learning_rate,
    damping,
    update_every_n_steps,
    weight_decay,
    batch_size,
    max_epochs=None,
    max_steps=-1,
    momentum=0.9,
    clip_norm=None,
    label_smoothing=0.0,
    loss_scale=1.0,
    split_indices=(),
): ...


def of_mode(
    name,
    decomposition,
    directions=None,
    change_basis=None,
    momentum_first=False,
    uses_matrix_sign=False,
    has_diagonal_head=False,
    matches_rms=True,
    fallback="plain momentum",
    serves=(),
): ...


def of_setup_fabric(fabric, module, optimizer, *, accumulate_grad_batches=1, **options): ...


def of_exact_factors(model, batches, loss, **options): ...


SIGNATURES: dict[str, Callable[..., None]] = {
    "lightning_thor.Thor": of_thor,
    "lightning_thor.ThorCallback": of_callback,
    "lightning_thor.Curvature": of_curvature,
    "lightning_thor.configure_thor": of_configure_thor,
    "lightning_thor.ThorDDPStrategy": of_ddp,
    "lightning_thor.ThorModelParallelStrategy": of_model_parallel,
    "lightning_thor.register_layer": of_register_layer,
    "lightning_thor.mindspore.thor": of_mindspores_thor,
    "lightning_thor.choose_block_size": of_choose_block_size,
    "lightning_thor.setup_fabric": of_setup_fabric,
    "lightning_thor.exact_factors": of_exact_factors,
    "lightning_thor.ShardedCurvature": lambda curvature, communicator=None, boxes_of=a_function: None,
    "lightning_thor.ThorMonitor": lambda *, every_n_refreshes=10, progress_bar=False: None,
    "lightning_thor.ThorStrategyMixin": of_ddp,
    "lightning_thor.preconditioning.modes.Mode": of_mode,
    "lightning_thor.preconditioning.modes.register_mode": lambda mode: None,
    "lightning_thor.recipes.Recipe": of_recipe,
    "lightning_thor.recipes.ResNet50Damping": lambda steps_per_epoch, variant="gpu": None,
    "lightning_thor.recipes.ResNet50LearningRate": lambda steps_per_epoch, variant="gpu": None,
    "lightning_thor.recipes.bert_large": lambda n_steps=30000: None,
    "lightning_thor.recipes.resnet50_imagenet": lambda steps_per_epoch, variant="gpu": None,
    "lightning_thor.schedules.Exponential": lambda start, factor, every_n_steps: None,
    "lightning_thor.schedules.GrowingInterval": lambda start, end, growth=0.1: None,
    "lightning_thor.schedules.PerStepLR": lambda optimizer, schedule, last_epoch=-1: None,
    "lightning_thor.schedules.Polynomial": lambda start, end, n_steps, power=1.0: None,
}
"""What programs are written for, with all arguments. New options with a default may come, with a line here; what is
here changes only with a line in CHANGELOG.md."""

METHODS: dict[str, dict[str, Callable[..., None]]] = {
    "lightning_thor.Curvature": {
        "close": lambda self: None,
        "connect": lambda self, communicator, *, bucket_fn=a_function, is_sync_step=None, worker_grid=None: None,
        "discard": lambda self: None,
        "export": lambda self: None,
        "figures": lambda self: None,
        "include": lambda self, parameters=(): None,
        "is_due": lambda self: None,
        "load_state_dict": lambda self, state: None,
        "paused": lambda self: None,
        "precondition": lambda self, grads, mode="natural": None,
        "state_dict": lambda self: None,
        "update": lambda self: None,
        "without_hooks": lambda self: None,
    },
    "lightning_thor.ThorStrategyMixin": {
        "check_parameters": lambda self, parameters: None,
        "connect_curvature": lambda self, curvature, parameters: None,
        "is_sync_step": lambda self: None,
        "new_worker_grid": lambda self: None,
    },
}
"""Likewise of methods: those that the API reference describes."""


def default_of(parameter: Parameter) -> str:
    if parameter.default is Parameter.empty:
        return "none"
    return "a function" if inspect.isfunction(parameter.default) else repr(parameter.default)


def broken_calls(found: Callable[..., Any], promised: Callable[..., Any]) -> Iterator[str]:
    """What would break, or silently change, a call that was written for ``promised``."""
    own, their = (dict(inspect.signature(one).parameters) for one in (found, promised))
    for name, parameter in their.items():
        if name not in own:
            yield f"{name} vanished"
            continue
        if own[name].kind != parameter.kind:
            yield f"{name} is {own[name].kind.description}, was {parameter.kind.description}"
        if default_of(own[name]) != default_of(parameter):
            yield f"{name} has the default {default_of(own[name])}, had {default_of(parameter)}"
    for name, parameter in own.items():
        if name not in their and parameter.default is Parameter.empty and "VAR" not in parameter.kind.name:
            yield f"{name} is new and has no default"
    places, before = ([n for n, p in of.items() if p.kind == Parameter.POSITIONAL_OR_KEYWORD] for of in (own, their))
    if places[: len(before)] != before:
        yield f"the first arguments are {', '.join(places[: len(before)])}, were {', '.join(before)}"


def not_promised(found: Callable[..., Any], promised: Callable[..., Any]) -> list[str]:
    """Arguments that came since ``promised`` was written, so that nothing would tell of a later change of them."""
    own = inspect.signature(found).parameters.values()
    known = inspect.signature(promised).parameters
    return [one.name for one in own if one.name not in known and "VAR" not in one.kind.name]


@pytest.mark.parametrize("address", SIGNATURES)
def test_calls_that_were_written_for_these_options_still_mean_the_same(address: str) -> None:
    found = import_object(address)
    pairs = {address: (found, SIGNATURES[address])}
    pairs |= {f"{address}.{name}": (getattr(found, name), one) for name, one in METHODS.get(address, {}).items()}
    for name, (own, promised) in pairs.items():
        wrong = "\n".join(broken_calls(own, promised))
        assert not wrong, f"{name}:\n{wrong}"
        assert not_promised(own, promised) == [], f"{name}: write them into SIGNATURES, or METHODS"


def test_all_that_the_api_reference_describes_is_promised() -> None:
    text = text_of(ROOT / "docs" / "reference.md")
    assert sorted(re.findall(r"^::: (\S+)$", text, re.MULTILINE)) == sorted(SIGNATURES)
    members = re.findall(r"^::: (\S+)\n +options:\n +members: \[(.*)\]$", text, re.MULTILINE)
    assert {address: set(names.split(", ")) for address, names in members} == {
        address: set(methods) for address, methods in METHODS.items()
    }


def test_changed_options_are_told_and_new_ones_are_not() -> None:
    def promised(params, lr=0.1, *, mode="natural", old=None): ...

    def grown(params, lr=0.1, new=1, *, mode="natural", old=None, newer=2, **others): ...

    def broken(lr, params, mode=None, *, new): ...

    assert list(broken_calls(grown, promised)) == []
    assert not_promised(grown, promised) == ["new", "newer"]
    assert list(broken_calls(broken, promised)) == [
        "lr has the default none, had 0.1",
        "mode is positional or keyword, was keyword-only",
        "mode has the default None, had 'natural'",
        "old vanished",
        "new is new and has no default",
        "the first arguments are lr, params, were params, lr",
    ]
