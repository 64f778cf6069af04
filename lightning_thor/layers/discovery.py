"""Which layers of a model have curvature, and why the others have none."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_thor.layers import attention
from lightning_thor.layers.base import Layer, LayerKind, ModuleUse
from lightning_thor.layers.custom import user_matrix, weight_name_of
from lightning_thor.layers.registry import (
    ATTENTION,
    CONVOLUTION,
    EMBEDDING,
    EXPAND,
    LINEAR,
    LINEAR_TRANSPOSED,
    NORMS,
    REGISTERED,
    TRANSPOSED,
    KfacApprox,
    find_kind,
    unsupported_reason,
)
from lightning_thor.linalg import block_diagonal


def uncompiled_name(name: str) -> str:
    """A module's name without what `torch.compile` put into it.

    >>> uncompiled_name("net._orig_mod.0"), uncompiled_name("net._orig_mod")
    ('net.0', 'net')
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def name_some(names: list[str], n: int = 5) -> str:
    """The first of some names of modules, as the part of a sentence.

    >>> name_some(["", "a", "b"], n=2), name_some([])
    ('(the model itself), a and 1 more', 'none')
    """
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return (", ".join(name or "(the model itself)" for name in names[:n]) or "none") + more


def matrix_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers, projections and convolutions that train; the last is taken as the output layer.

    Each row of that one is a class, a token or a number to predict, and a direction with equal singular values would
    move the rarest as far as the most frequent. Embeddings are no matrices in this sense either.

    >>> matrix_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(5, 9)))
    ['0', '2', '3']
    """
    kinds = ((use, find_kind(use.module)) for use in _uses(model))
    matrices = [use for use, found in kinds if found is not None and found[0].is_matrix]
    weights = [(use.name, getattr(use.module, use.weight_name)) for use in matrices]
    return [name for name, weight in weights if isinstance(weight, Tensor) and weight.requires_grad]


def discover_layers(
    model: nn.Module,
    *,
    block_size: int | None,
    precondition_bias: bool,
    only: Set[nn.Parameter] | None = None,
    statistics: KfacApprox = EXPAND,
    fused: Mapping[str, int] | None = None,
    diagonal_G: Container[str] = (),
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Every weight of ``model``: those with curvature, and why the others have none; by name.

    A weight has the name of the module that owns it (of the first of them, if it is tied), as in
    ``model.named_modules()`` without the ``_orig_mod.`` that `torch.compile` adds. The three that an attention packs
    into one have names of their own: ``q_proj``, ``k_proj`` and ``v_proj`` in it.

    Tied weights: where modules of one kind share a weight, each is a use of one layer, and their rows are added up.
    Where an embedding shares it with a linear layer (the table of a language model), both have statistics of their
    own, and the embedding's are folded into the linear layer's when those are inverted: `FactorState` says how.

    Args:
        model: what to look at.
        block_size: largest block; None for whole factors.
        precondition_bias: take the biases of linear layers and convolutions into A, as its last coordinate; not if the
            weight is tied.
        only: leave out layers whose weight is not among these parameters.
        statistics: what is gathered.
        fused: linear layers whose outputs are concatenations of that many parts, by pattern of their name: their G is
            cut at the borders of the parts.
        diagonal_G: the names of layers whose G is to be its diagonal alone.

    Raises:
        ValueError: ``fused`` names no linear layer, or a number that does not divide its outputs.
    """
    left_out: dict[str, str] = {}
    # By weight, and where in it, in the order of the model.
    found: dict[tuple[nn.Parameter, int], dict[LayerKind, list[ModuleUse]]] = {}
    for use in _uses(model):
        kind, reason = _judged(use, only, statistics)
        if kind is None or reason is not None:
            left_out[use.name] = reason or unsupported_reason(use.module)
            continue
        weight = getattr(use.module, use.weight_name)
        kinds = found.setdefault((weight, 0 if use.param_slice is None else use.param_slice.start), {})
        refused = next((uses for other, uses in kinds.items() if not _can_be_tied(kind, other, statistics)), None)
        if refused is not None:
            left_out[use.name] = f"shares its weight with {refused[0].name!r}, which is preconditioned"
        else:
            kinds.setdefault(kind, []).append(use)
    layers: dict[str, Layer] = {}
    for kinds in found.values():
        tied = sum(len(uses) for uses in kinds.values()) > 1
        for kind, uses in kinds.items():
            parts = _parts(uses[0], kind, fused or {})
            sizes = block_size, 1 if uses[0].name in diagonal_G else block_size
            with_bias = precondition_bias and not tied and (only is None or _bias_of(uses[0]) in only)
            layer = _layer(tuple(uses), kind, statistics, sizes, with_bias, parts)
            if kind is EMBEDDING and len(kinds) > 1:
                layer = replace(layer, tied_to=kinds[LINEAR][0].name)
            layers[layer.name] = layer
    _check_that_all_are_linear(fused or {}, layers)
    order = {use.name: index for index, use in enumerate(_uses(model))}
    return dict(sorted(layers.items(), key=lambda item: order[item[0]])), left_out


def _uses(model: nn.Module) -> Iterator[ModuleUse]:
    """Each place where a weight might be, in the order of the model."""
    inside: dict[nn.Module, nn.MultiheadAttention] = {}
    for full_name, module in model.named_modules():
        name = uncompiled_name(full_name)
        if isinstance(module, nn.MultiheadAttention):
            inside.update((child, module) for child in module.modules() if child is not module)
            yield from _projections(name, module)
            continue
        own = dict(module.named_parameters(recurse=False))
        if own or "weight" in getattr(module, "parametrizations", {}):
            outer = inside.get(module)
            role = "" if outer is None else "out_proj" if module is outer.out_proj else "?"
            yield ModuleUse(name, module, weight_name_of(module), None, outer, role)


def _projections(name: str, module: nn.MultiheadAttention) -> Iterator[ModuleUse]:
    width = module.embed_dim
    for index, role in enumerate(("q_proj", "k_proj", "v_proj")):
        packed = getattr(module, "in_proj_weight", None) is not None
        part = slice(index * width, (index + 1) * width) if packed else None
        weight_name = "in_proj_weight" if packed else f"{role}_weight"
        yield ModuleUse(f"{name}.{role}" if name else role, module, weight_name, part, module, role)


def _judged(
    use: ModuleUse, only: Set[nn.Parameter] | None, statistics: KfacApprox
) -> tuple[LayerKind | None, str | None]:
    """The kind of a use, if it has curvature with these statistics, and what speaks against it, if anything."""
    found = find_kind(use.module)
    if found is None or found[0].name not in statistics.rows:
        return None, None
    kind, base = found
    if use.attention is not None:
        if use.role not in attention.ROLES or found[0] not in (LINEAR, ATTENTION):
            return None, "inside nn.MultiheadAttention, which uses its parameters without calling it"
        if not attention.IS_SUPPORTED or type(use.attention).forward is not nn.MultiheadAttention.forward:
            return None, f"{type(use.attention).__name__} has a forward that is not torch's, as it is known here"
        if ATTENTION.name not in statistics.rows:
            return None, None
        kind = ATTENTION
    return kind, _reason_against(use, kind, base, only)


def _reason_against(
    use: ModuleUse, kind: LayerKind, base: type[nn.Module], only: Set[nn.Parameter] | None
) -> str | None:
    """Why this module takes plain momentum, or None if nothing speaks against its curvature."""
    module = use.module
    own = dict(module.named_parameters(recurse=False))
    weight = own.get(use.weight_name)
    if weight is None:
        return "its weight is not a plain parameter (parametrized, or not affine)"
    if isinstance(weight, nn.UninitializedParameter):
        return "lazy and not initialised: run one forward pass before fit"
    if not weight.requires_grad:
        return "frozen"
    if only is not None and weight not in only:
        return "not in the optimizer"
    if kind in NORMS and not all(p.requires_grad for p in own.values()):
        return "frozen in part"
    if kind in NORMS and only is not None and not all(p in only for p in own.values()):
        return "not in the optimizer in part"
    if weight.numel() == 0:
        return "empty weight"
    # A linear layer's own forward (LoRA, quantised training) still multiplies by its weight; others may do anything.
    if kind not in (LINEAR, ATTENTION) and type(module).forward is not base.forward:
        return f"{type(module).__name__} has a forward of its own, which may not be {base.__name__}'s"
    if isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq):
        return "sparse or frequency-scaled gradient"
    if not weight.is_floating_point():
        return f"weight of dtype {weight.dtype}"
    return None


def _can_be_tied(one: LayerKind, other: LayerKind, statistics: KfacApprox) -> bool:
    table_and_output = {one, other} == {EMBEDDING, LINEAR} and statistics.split_embedding_G
    return one == other or table_and_output


def _parts(use: ModuleUse, kind: LayerKind, fused: Mapping[str, int]) -> int:
    """Of how many parts the outputs of a linear layer are a concatenation."""
    parts = next((n for pattern, n in fused.items() if fnmatchcase(use.name, pattern)), 1)
    if parts > 1 and kind not in (LINEAR, LINEAR_TRANSPOSED):
        return 1
    weight = getattr(use.module, use.weight_name)
    out = weight.shape[1] if kind is LINEAR_TRANSPOSED else weight.shape[0]
    if out % parts:
        raise ValueError(f"fused: the {out} outputs of {use.name!r} cannot be {parts} equal parts.")
    return parts


def _check_that_all_are_linear(fused: Mapping[str, int], layers: Mapping[str, Layer]) -> None:
    linear = [name for name, layer in layers.items() if layer.kind in (LINEAR, LINEAR_TRANSPOSED)]
    for pattern in fused:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ValueError(
                f"fused: {pattern!r} is the name of no linear layer with curvature. There are: "
                f"{', '.join(linear) or 'none'}. (The projections of nn.MultiheadAttention are apart anyway.)"
            )


def _bias_of(use: ModuleUse) -> nn.Parameter | None:
    # Packed as the weight is; where the weights are apart (kdim, vdim) their one bias is plain.
    bias: nn.Parameter | None = getattr(use.module, "bias" if use.param_slice is None else "in_proj_bias", None)
    return bias


def _layer(
    uses: tuple[ModuleUse, ...], kind: LayerKind, statistics: KfacApprox, block_sizes: tuple[int | None, int | None],
    precondition_bias: bool, parts: int,
) -> Layer:  # fmt: skip
    """``block_sizes``: of A and of G."""
    use, rows_of, partition = uses[0], statistics.rows[kind.name], statistics.partition
    module: Any = use.module
    weight: nn.Parameter = getattr(module, use.weight_name)
    bias = _bias_of(use)
    if kind in NORMS:
        own = (weight,) if bias is None else (weight, bias)
        return Layer(uses, own, None, block_diagonal.diagonal(sum(p.numel() for p in own)), kind, rows_of)
    if kind is EMBEDDING:
        G = partition(weight.shape[1], block_sizes[1] if statistics.split_embedding_G else None, 1)
        return Layer(uses, (weight,), block_diagonal.diagonal(len(weight)), G, kind, rows_of)
    groups: int = module.groups if kind in (CONVOLUTION, TRANSPOSED) else 1
    if kind in REGISTERED.values():
        # Not the weight itself, which may be sharded.
        groups, width_G, width_A = user_matrix(module, torch.empty(weight.shape, device=weight.device)).shape
    elif kind is TRANSPOSED:  # its weight is [in, out / groups, *kernel]; a bias does not belong to the rows
        width_A, width_G = len(weight) // groups, weight.numel() // len(weight)
    elif kind is LINEAR_TRANSPOSED:
        width_A, width_G = weight.shape
    else:
        n_rows = len(weight) if use.param_slice is None else use.param_slice.stop - use.param_slice.start
        width_A, width_G = weight.numel() // len(weight), n_rows // groups
    with_bias = precondition_bias and kind.takes_bias and bias is not None and bias.requires_grad
    parameters = (weight, bias) if with_bias and bias is not None else (weight,)
    A = partition(width_A + with_bias, block_sizes[0], groups)
    G = partition(width_G // parts, block_sizes[1], groups * parts)
    return Layer(uses, parameters, A, G, kind, rows_of, statistics.squares.get(kind.name))


@contextmanager
def trained(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These are not frozen in this context."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
