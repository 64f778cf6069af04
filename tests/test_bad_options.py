"""The law that a bad option is refused where it is written, with its name, what was got and what it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_thor import Curvature, Thor, ThorCallback, ThorDDPStrategy, ThorModelParallelStrategy, configure_thor
from lightning_thor.schedules import Exponential, GrowingInterval, Polynomial

Make = Callable[..., Any]
NAN, INF = float("nan"), float("inf")


def curvature(**options: Any) -> Curvature:
    return Curvature(nn.Linear(3, 2), **options)


def included(**options: Any) -> list[str]:
    return curvature().include(**options)


def thor(**options: Any) -> Thor:
    return Thor(nn.Linear(3, 2).parameters(), **options)


def thor_group(**options: Any) -> Thor:
    return Thor([{"params": list(nn.Linear(3, 2).parameters()), **options}])


def configured(**options: Any) -> Thor:
    return configure_thor(nn.Linear(3, 2), **options)


BAD: dict[tuple[Make, ...], list[tuple[dict[str, Any], str]]] = {
    (curvature, ThorCallback): [
        *(
            ({"damping": value}, f"damping must be greater than 0.*got {value!r}")
            for value in (0.0, INF, -1, "0.1", True)
        ),
        *(({"averaging": value}, r"averaging must lie in \[0, 1\)") for value in (None, 1.0)),
        ({"block_size": True}, "block_size must be"),
        ({"block_size": 0}, "block_size must be"),
        ({"block_size": 12.5}, "block_size must be"),
        ({"update_every_n_steps": True}, "update_every_n_steps must be"),
        ({"update_every_n_steps": 0}, "update_every_n_steps must be"),
        ({"damping_rule": "none"}, "one of trace, pi, sqrt, got 'none'"),
        ({"max_rows": 0}, "max_rows must be"),
        ({"statistics": "shrink"}, "statistics must be one of expand, masked, reduce, thor, got .shrink."),
        *(({"skip_layers": value}, "skip_layers must be a list of names") for value in ("head", [1], None)),
        ({"loss_reduction": "none"}, "loss_reduction must be 'mean' or 'sum', got 'none'"),
        *(
            ({"trace_rule": rule}, "trace_rule must be one of THOR, THOR_stop, THOR_NT")
            for rule in ("thor", (0.01,), (0.001, 0.01), (-1, -2), (NAN, 0), ("a", "b"), 0.01, True)
        ),
    ],
    (curvature,): [
        ({"mode": "muon"}, "mode must be one of natural, polar, adam, got 'muon'"),
        ({"block_size": "auto"}, r"choose_block_size\(model, loss_of_a_batch\)"),
        *(({name: 3.0}, f"{name} must be a function.*got 3.0") for name in ("loss_terms", "loss_multiplier")),
        ({"output_layer": [""]}, r"output_layer must be the name of a layer, or None, got \[''\]"),
        ({"damping": 10**400}, "damping must be greater than 0"),
        ({"parameters": [nn.Parameter(torch.zeros(1))]}, "parameters must be the model's: none of those"),
    ],
    (ThorCallback,): [
        ({"block_size": "Auto"}, r"block_size must be an int of at least 1.*\"auto\" \(ThorCallback\), got 'Auto'"),
        ({"loss_terms": 3}, "loss_terms must be a function of a batch"),
    ],
    (thor, thor_group): [
        *(
            ({name: "x"}, f"{name} must be a number, got 'x'")
            for name in ("lr", "momentum", "beta2", "weight_decay", "match_rms", "kl_clip", "clip_norm")
        ),
        ({"lr": -1.0}, "lr must be 0 or greater, got -1.0"),
        ({"lr": NAN}, "lr must be 0 or greater, got nan"),
        ({"lr": 10**400}, "lr must be 0 or greater, got 1000"),
        ({"lr": torch.tensor(0.1)}, "lr must be a number"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, "momentum must lie in"),
        ({"weight_decay": -1e-4}, "weight_decay must be 0 or greater"),
        ({"weight_decay": True}, "weight_decay must be a number, got True"),
        *(
            ({name: value}, f"{name} must be True or False, got {value!r}")
            for name in ("nesterov", "decoupled_weight_decay")
            for value in ("False", 1, None)
        ),
        ({"match_rms": 0.0}, "match_rms must be greater than 0"),
        ({"match_rms": None, "kl_clip": -1.0}, "kl_clip must be greater than 0"),
        ({"match_rms": 0.2, "kl_clip": 1e-3}, "set one of them to None"),
        ({"clip_norm": 0.0}, "clip_norm must be greater than 0"),
        ({"mode": "muon"}, "mode must be one of natural, polar, adam, got 'muon'"),
        ({"mode": None}, "mode must be one of natural, polar, adam, got None"),
        ({"mode": "polar", "match_rms": None, "kl_clip": 1e-3}, "kl_clip is for directions of gradients"),
        ({"mode": "adam", "match_rms": None, "kl_clip": 1e-3}, "kl_clip is for directions of gradients"),
        ({"mode": "adam", "beta2": 1.0}, "beta2 must lie in"),
    ],
    (thor_group,): [({"weight_deacy": 0.1}, "does not know the option weight_deacy")],
    (configured,): [({"lr": -1}, "lr must be 0 or greater, got -1")],
    (ThorDDPStrategy, ThorModelParallelStrategy): [
        *(
            ({"factor_bucket_mb": value}, "factor_bucket_mb must be a number of megabytes greater than 0")
            for value in (0, -1.0, INF, True, "25")
        ),
        ({"factor_bucket_mb": 1, "split_indices": [3]}, r"factor_bucket_mb=1 and split_indices=\[3\] both say"),
        *(
            ({"split_indices": split}, "split_indices must be one or more layer numbers that increase")
            for split in ([], [3, 3], [5, 2], [-1, 4])
        ),
        *(({"inverse_workers": n}, f"inverse_workers must be at least 1, got {n}: give a divisor") for n in (0, -2)),
    ],
    (Polynomial,): [
        ({"start": 1.0, "end": 0.0, "n_steps": 10}, "end must be greater than 0, got 0.0"),
        ({"start": 1.0, "end": 0.1, "n_steps": 0}, "n_steps must be greater than 0"),
    ],
    (Exponential,): [({"start": 0.2, "factor": -0.5, "every_n_steps": 10}, "factor must be greater than 0")],
    (GrowingInterval,): [
        ({"start": 0, "end": 10}, "start must be greater than 0"),
        ({"start": 1, "end": 10, "growth": 0.0}, "growth must be greater than 0"),
        ({"start": 1, "end": 10.0}, r"end must be an int, a number of steps, got 10\.0"),
        ({"start": 1.5, "end": 10}, r"start must be an int, a number of steps, got 1\.5"),
        ({"start": 20, "end": 10}, r"end must be at least start.*start=20, end=10"),
    ],
}  # fmt: skip
OF_A_WRONG_TYPE: dict[tuple[Make, ...], list[tuple[dict[str, Any], str]]] = {
    (curvature, included): [
        ({"parameters": value}, "parameters must be those of modules.*but holds")
        for value in (["weight"], [("weight", 1.0)])
    ],
    (ThorCallback,): [({"blocksize": 3}, "blocksize")],
    (thor,): [({"dampening": 0.1}, "dampening")],
    (configured,): [({"damping": 0.1}, "damping")],
    (ThorDDPStrategy, ThorModelParallelStrategy): [
        ({"bf16_factors": "bf16"}, "bf16_factors must be True or False, got 'bf16'"),
        *(({"split_indices": split}, "must be a list of ints") for split in ("26", 26, [1.0], [True])),
        *(
            ({"inverse_workers": value}, "inverse_workers must be an int, or None for all processes, got ")
            for value in (True, 1.0, "1", [1])
        ),
    ],
}
CASES = [
    pytest.param(make, options, error, message, id=f"{make.__name__} {options}")
    for table, error in ((BAD, ValueError), (OF_A_WRONG_TYPE, TypeError))
    for makes, lines in table.items()
    for options, message in lines
    for make in makes
]


@pytest.mark.parametrize(("make", "options", "error", "message"), CASES)
def test_a_bad_option_is_refused(make: Make, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_adam_is_the_mode_of_all_groups_or_of_none() -> None:
    first, second = nn.Linear(3, 2).parameters()
    with pytest.raises(ValueError, match="modes adam, natural cannot share a curvature"):
        Thor([{"params": [first], "mode": "adam"}, {"params": [second]}])
