"""Which layers of a model have curvature, and why the others have none."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized

from lightning_thor.layers import attention
from lightning_thor.layers.base import Layer, LayerKind, ModuleUse, type_name
from lightning_thor.layers.conv import CONVOLUTION
from lightning_thor.layers.embedding import EMBEDDING
from lightning_thor.layers.functional import calls_function_within, children_used_by, may_compute_weight
from lightning_thor.layers.linear import LINEAR
from lightning_thor.layers.matrices import MatricesKind, matrices_of, role_of
from lightning_thor.layers.recurrent import Recurrent, weight_names
from lightning_thor.layers.registry import EXPAND, KfacApprox, find_kind, unsupported_reason
from lightning_thor.linalg import block_diagonal

NOT_TRAINED = ("frozen", "not in the optimizer")
"""How the reasons begin for which a layer has no curvature as long as its parameters are not trained."""

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""What wrappers call the module that they wrap."""

SKIPPED = "in skip_layers"
"""The reason for which a layer has none that was named so."""


def unwrapped_name(name: str) -> str:
    """A module's name without the parts that `torch.compile` and torch's ``checkpoint_wrapper`` add.

    >>> unwrapped_name("net._orig_mod.0"), unwrapped_name("net._checkpoint_wrapped_module")
    ('net.0', 'net')
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def name_some(names: list[str], n: int = 5) -> str:
    """The first ``n`` names of modules, for a sentence.

    >>> name_some(["", "a", "b"], n=2), name_some([])
    ('(the model itself), a and 1 more', 'none')
    """
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return (", ".join(name or "(the model itself)" for name in names[:n]) or "none") + more


def matrix_layers(model: nn.Module, without: Container[nn.Parameter] = ()) -> list[str]:
    """Names of the linear layers, projections and convolutions that train; the last is taken as the output layer. The
    weights of recurrent layers, and experts that lie in one parameter, come first: they make states.

    Those whose weight is among ``without`` are left out.

    Each row of the output layer is a class, a token or a number to predict: equal singular values would move the rarest
    as far as the most frequent. Nor are embeddings matrices in this sense.

    >>> matrix_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 9), nn.RNN(9, 9)))
    ['3.weight_ih_l0', '3.weight_hh_l0', '0', '2']
    """
    found = ((use, find_kind(type(use.module))) for use in _uses(model))
    matrices = [(use, kind[0]) for use, kind in found if kind is not None and kind[0].is_matrix]
    matrices.sort(key=lambda one: one[0].caller is not one[0].module or _is_one_matrix(*one))
    weights = [(use.name, use.weight) for use, _ in matrices]
    return [name for name, w in weights if isinstance(w, Tensor) and w.requires_grad and w not in without]


def _is_one_matrix(use: ModuleUse, kind: LayerKind) -> bool:
    """Whether a module's own parameter is one matrix, as that of a linear layer, whatever its forward is."""
    return kind in (LINEAR, CONVOLUTION) or (isinstance(kind, MatricesKind) and use.param_slice is None)


def discover_layers(
    model: nn.Module,
    *,
    block_size: int | None,
    precondition_bias: bool,
    only: Set[nn.Parameter] | None = None,
    statistics: KfacApprox = EXPAND,
    fused: Mapping[str, int] | None = None,
    skip_layers: Sequence[str] = (),
    diagonal_G: Container[str] = (),
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The weights of ``model`` that have curvature, and why the others have none.

    A weight has the name of the module that owns it (of the first of them, if it is tied), as in
    ``model.named_modules()`` without what wrappers add (see `unwrapped_name`). The three that an attention packs
    into one have names of their own: ``q_proj``, ``k_proj`` and ``v_proj`` in it.

    Tied weights: where modules of one kind share a weight, each is a use of one layer, and their rows are added up.
    Where an embedding shares it with a linear layer (the table of a language model), both have statistics of their
    own, and the embedding's are added to the linear layer's at inversion: see `FactorState`.

    Args:
        model: any module.
        block_size: largest block; None for whole factors.
        precondition_bias: take the biases of linear layers and convolutions into A, as its last coordinate; not if the
            weight is tied, nor a bias that several layers share, or that is no plain parameter (pruned, parametrized).
        only: leave out layers whose weight is not among these parameters.
        statistics: K-FAC-expand, K-FAC-reduce, or nn.thor's.
        fused: number of parts that a linear layer's outputs are a concatenation of, by pattern of its name: G is
            partitioned at the borders of the parts.
        skip_layers: leave out layers with these names, or of these patterns of names, all that is inside of them, and
            what shares their weights.
        diagonal_G: names of modules that use a weight whose G is its diagonal alone.

    Returns:
        The layers by name, in the order of the model, and the reasons by name.

    Raises:
        ValueError: ``fused`` names no linear layer, or a number that does not divide its outputs; ``skip_layers`` names
            no layer.
    """
    fused = fused or {}
    left_out: dict[str, str] = {}
    uses = list(_uses(model))
    # Not those of modules of other kinds: BERT's head holds the bias of the linear layer in it too.
    modules = {use.module for use in uses if find_kind(type(use.module)) is not None}
    n_modules = Counter(p for module in modules for p in module.parameters(recurse=False))
    shared = {p for p, n in n_modules.items() if n > 1}
    skipped = {use.name: _place(use) for use in uses if any(_is_in(use.name, pattern) for pattern in skip_layers)}
    skipped_places = set(skipped.values())
    # By weight, and by first row in it.
    found: dict[tuple[nn.Parameter, int], dict[LayerKind, list[ModuleUse]]] = {}
    for use in uses:
        kind = SKIPPED if use.name in skipped else _check(use, only, statistics, shared)
        if not isinstance(kind, str) and _place(use) in skipped_places:
            kind = "shares its weight with a layer in skip_layers"
        if isinstance(kind, str):
            left_out[use.name] = kind
            continue
        kinds = found.setdefault(_place(use), {})
        refused = next((others for other, others in kinds.items() if not _can_be_tied(kind, other, statistics)), None)
        if refused is not None:
            left_out[use.name] = f"shares its weight with {refused[0].name!r}, which is preconditioned"
        else:
            kinds.setdefault(kind, []).append(use)
    layers: dict[str, Layer] = {}
    for kinds in found.values():
        is_tied = sum(len(tied) for tied in kinds.values()) > 1
        for kind, (use, *tied) in kinds.items():
            bias = _bias_of(use) if precondition_bias and not is_tied else None
            takes_bias = bias is not None and bias.requires_grad and (only is None or bias in only)
            takes_bias = takes_bias and bias not in shared
            is_diagonal = any(one.name in diagonal_G for one in (use, *tied))
            block_sizes = block_size, 1 if is_diagonal else block_size
            layer = _layer((use, *tied), kind, statistics, block_sizes, takes_bias, fused)
            if kind.ties_to in kinds:
                layer = replace(layer, tied_to=kinds[kind.ties_to][0].name)
            layers[layer.name] = layer
    # They may train later, or belong to another optimizer.
    idle = [
        use
        for use in uses
        if left_out.get(use.name, "").startswith(NOT_TRAINED) and not isinstance(use.caller, nn.MultiheadAttention)
    ]
    known = [(use.name, find_kind(type(use.module))) for use in idle]
    _check_fused(fused, layers, [name for name, found_kind in known if found_kind and found_kind[0].is_linear])
    order = {use.name: index for index, use in enumerate(uses)}
    for pattern in skip_layers:
        if not any(_is_in(name, pattern) for name in order):
            raise ValueError(f"skip_layers: {pattern!r} is the name of no layer. There are: {name_some(list(order))}.")
    return dict(sorted(layers.items(), key=lambda item: order[item[0]])), left_out


def _place(use: ModuleUse) -> tuple[Any, int]:
    """The weight, None if it is no plain parameter, and the first row in it."""
    weight = dict(use.module.named_parameters(recurse=use.is_computed)).get(use.weight_name)
    return weight, 0 if use.param_slice is None else use.param_slice.start


def _uses(model: nn.Module) -> Iterator[ModuleUse]:
    """Each place where a weight might be, in the order of the model."""
    inside: dict[nn.Module, nn.MultiheadAttention] = {}
    parents: dict[nn.Module, tuple[nn.Module, str]] = {}
    """Of linear layers that are not called, with their roles."""
    for full_name, module in model.named_modules():
        name = unwrapped_name(full_name)
        if _owner(name) != name:
            continue  # the parts of a parametrized weight
        if isinstance(module, nn.MultiheadAttention):
            inside.update((child, module) for child in module.modules() if child is not module)
            yield from _projections(name, module)
            continue
        if isinstance(module, Recurrent):
            for weight in weight_names(module):
                yield ModuleUse(f"{name}.{weight}" if name else weight, module, weight, None, module, weight)
            continue
        own, found = dict(module.named_parameters(recurse=False)), find_kind(type(module))
        if found is not None and isinstance(found[0], MatricesKind):
            yield from _matrices(name, module, found[0])
            continue
        # A user's kind is told the module's own input and output.
        if found is not None and found[0] in (CONVOLUTION, EMBEDDING, LINEAR) and calls_function_within(module):
            yield ModuleUse(name, module, caller=module, role="weight", is_computed=may_compute_weight(module))
            continue
        parents.update((child, (module, role)) for role, child in children_used_by(module).items())
        if module in parents:
            yield ModuleUse(name, module, "weight", None, *parents[module])
            continue
        if own or is_parametrized(module, "weight"):
            outer = inside.get(module)
            weight_name = "weight" if found is None else found[0].weight_name
            role = "" if outer is None else "out_proj" if module is outer.out_proj else "?"
            source = None if found is None or outer is not None else _source_of_weight(module, found[0])
            yield ModuleUse(name, module, source or weight_name, None, outer, role, is_computed=source is not None)


NORMED = (_WeightNorm, _SpectralNorm)
"""Parametrizations under which a parameter's gradient is about that of the weight. (With curvature, networks of
orthogonal weights trained worse than without.)"""


def _source_of_weight(module: nn.Module, kind: LayerKind) -> str | None:
    """The name of the parameter that a module computes its weight from at each call, where it is of the weight's shape
    and its gradient the weight's but for a scale: by ``weight_norm``, ``spectral_norm`` or pruning; else None.

    >>> from torch.nn.utils.parametrizations import weight_norm
    >>> _source_of_weight(weight_norm(nn.Conv1d(2, 3, 1)), CONVOLUTION)
    'parametrizations.weight.original1'
    """
    name = kind.weight_name
    shape = None if name in module._parameters else kind.computed_shape(module)
    if is_parametrized(module, name) and not all(isinstance(one, NORMED) for one in module.parametrizations[name]):  # type: ignore[index]
        return None
    places = {f"parametrizations.{name}.original{n}" for n in ("", 0, 1)} | {f"{name}_v", f"{name}_orig"}
    found = [other for other, p in module.named_parameters() if other in places and p.shape == shape]
    return found[0] if len(found) == 1 else None


def parameters_of(model: nn.Module, names: Container[str]) -> dict[str, set[nn.Parameter]]:
    """The parameters of the modules that use weights by these names, see `discover_layers`; by name. Of a recurrent
    layer, whose weights are layers of their own, the weight alone."""
    return {
        use.name: {
            p
            for name, p in use.module.named_parameters(recurse=use.is_computed)
            if name == use.weight_name or not isinstance(use.module, Recurrent)
        }
        for use in _uses(model)
        if use.name in names
    }


def weights_of(model: nn.Module, names: Container[str]) -> dict[str, Tensor]:
    """The weights by these names, see `discover_layers`; without modules of which no kind is known."""
    uses = [use for use in _uses(model) if use.name in names and (use.caller or find_kind(type(use.module)))]
    return {use.name: use.weight for use in uses}


def _projections(name: str, module: nn.MultiheadAttention) -> Iterator[ModuleUse]:
    width = module.embed_dim
    for index, role in enumerate(("q_proj", "k_proj", "v_proj")):
        is_packed = getattr(module, "in_proj_weight", None) is not None
        param_slice = slice(index * width, (index + 1) * width) if is_packed else None
        weight_name = "in_proj_weight" if is_packed else f"{role}_weight"
        yield ModuleUse(f"{name}.{role}" if name else role, module, weight_name, param_slice, module, role)


def _matrices(name: str, module: nn.Module, kind: MatricesKind) -> Iterator[ModuleUse]:
    is_transposed, prefix = kind.is_transposed(module), f"{name}." if name else ""
    if is_parametrized(module):
        yield from (ModuleUse(prefix + weight, module, weight, None, module) for weight in module.parametrizations)  # type: ignore[union-attr]
    for weight, p in matrices_of(module).items():
        if p.dim() == 2:
            yield ModuleUse(prefix + weight, module, weight, None, module, role_of(weight, None, is_transposed))
            continue
        for number in range(len(p)):
            part, role = slice(number, number + 1), role_of(weight, number, is_transposed)
            yield ModuleUse(f"{prefix}{weight}.{number}", module, weight, part, module, role)


def _check(
    use: ModuleUse, only: Set[nn.Parameter] | None, statistics: KfacApprox, shared: Set[nn.Parameter]
) -> LayerKind | str:
    """The kind of a use, or why it has no curvature with these statistics; several layers have the parameters
    ``shared``."""
    parameters = list(use.module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return "frozen"
    found = find_kind(type(use.module))
    if found is None or statistics.rows_of(found[0]) is None:
        return unsupported_reason(use.module)
    (kind, base), module = found, use.module
    if isinstance(use.caller, nn.MultiheadAttention):
        if use.role not in attention.ROLES or kind.in_attention is None:
            return "inside nn.MultiheadAttention, which uses its parameters without calling it"
        if not attention.IS_SUPPORTED or type(use.caller).forward is not nn.MultiheadAttention.forward:
            return f"{type_name(use.caller)} has a forward that is not torch's, as it is known here"
        kind = kind.in_attention
        if statistics.rows_of(kind) is None:
            return unsupported_reason(module)
    own = dict(module.named_parameters(recurse=use.is_computed))
    weight = own.get(use.weight_name)
    if weight is None:
        return "its weight is not a plain parameter (parametrized, or not affine)"
    if is_lazy(weight):
        return "lazy and not initialised: run one forward pass before fit"
    if not weight.requires_grad:
        return "frozen"
    if only is not None and weight not in only:
        return "not in the optimizer"
    bias = _bias_of(use)
    kind = kind.of_weight(module, weight)
    if kind.owns_all_parameters and bias is None and getattr(module, "bias", None) is not None:
        return "its bias is not a plain parameter (parametrized, or a buffer)"
    if kind.owns_all_parameters and bias in shared and weight not in shared:
        return "shares its bias with another layer"
    if kind.owns_all_parameters and not all(p.requires_grad for p in own.values()):
        return "frozen in part"
    if kind.owns_all_parameters and only is not None and not all(p in only for p in own.values()):
        return "not in the optimizer in part"
    if weight.numel() == 0:
        return "empty weight"
    # Where a weight is computed before the forward, one of its own is refused: no gradient tells what it does.
    check = LayerKind if use.is_computed and use.caller is not module else type(kind)
    reason = check.unsupported_reason(kind, module, base)
    return reason or (kind if weight.is_floating_point() else f"weight of dtype {weight.dtype}")


def _can_be_tied(one: LayerKind, other: LayerKind, statistics: KfacApprox) -> bool:
    return one is other or (statistics.split_embedding_G and (one.ties_to is other or other.ties_to is one))


def _bias_of(use: ModuleUse) -> nn.Parameter | None:
    """The bias, if it is a parameter itself: not one that pruning or a parametrization computes from others."""
    # Packed as the weight is; where the weights are apart (kdim, vdim) their one bias is plain.
    name = "bias" if use.param_slice is None else "in_proj_bias"
    return dict(use.module.named_parameters(recurse=False)).get(name)


def _layer(
    uses: tuple[ModuleUse, ...], kind: LayerKind, statistics: KfacApprox, block_sizes: tuple[int | None, int | None],
    takes_bias: bool, fused: Mapping[str, int],
) -> Layer:  # fmt: skip
    """The layer of a weight, with ``block_sizes`` of A and of G; ``takes_bias`` asks for a bias, which some kinds have
    no place for."""
    use, (size_A, size_G), rows_of = uses[0], block_sizes, statistics.rows_of(kind)
    if use.role == "k_proj" and rows_of == kind.reduced_rows:
        # A softmax cancels what all keys have in common: their gradients add up to 0, and such a G would be rounding.
        rows_of = kind.rows
    assert rows_of is not None
    weight: nn.Parameter = use.weight  # type: ignore[assignment]
    shape = weight.shape
    if use.param_slice is not None:
        shape = torch.Size((use.param_slice.stop - use.param_slice.start, *shape[1:]))
    groups, width_A, width_G = kind.factor_widths(use.module, shape)
    with_bias, bias = kind.takes_bias and takes_bias, _bias_of(use)
    parameters = (weight,) if bias is None or not (with_bias or kind.owns_all_parameters) else (weight, bias)
    A = None if width_A is None else statistics.partition(width_A + with_bias, size_A, groups)
    own_parts = kind.n_parts(use.module, shape)
    n_parts = next((n for pattern, n in fused.items() if kind.is_linear and fnmatchcase(use.name, pattern)), own_parts)
    if width_G % n_parts:
        raise ValueError(f"fused: the {width_G} outputs of {use.name!r} cannot be {n_parts} equal parts.")
    G = statistics.partition(width_G // n_parts, size_G, groups * n_parts)
    if kind.diagonal == "G":
        G = block_diagonal.diagonal(width_G)
    elif kind.diagonal == "A" and width_A is not None:
        A = block_diagonal.diagonal(width_A)
        G = G if statistics.split_embedding_G else statistics.partition(width_G, None, 1)
    loss_terms = statistics.loss_terms or kind.loss_terms
    return Layer(uses, parameters, A, G, kind, rows_of, loss_terms, masks_rows=statistics.masks_rows)


def _is_in(name: str, pattern: str) -> bool:
    """Whether a module has a name of this pattern, or is inside of one that has.

    >>> [_is_in(name, "blocks.*.mlp") for name in ("blocks.0.mlp", "blocks.0.mlp.up", "blocks.0.mlps")]
    [True, True, False]
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _check_fused(fused: Mapping[str, int], layers: Mapping[str, Layer], idle: Sequence[str]) -> None:
    """Check that each pattern names a linear layer with curvature, or one of the ``idle`` ones, which do not train."""
    linear = [name for name, layer in layers.items() if layer.kind.is_linear]
    for pattern in fused:
        if not any(fnmatchcase(name, pattern) for name in (*linear, *idle)):
            raise ValueError(
                f"fused: {pattern!r} is the name of no linear layer with curvature. There are: "
                f"{', '.join(linear) or 'none'}. (The projections of nn.MultiheadAttention are apart anyway.)"
            )


@contextmanager
def trained(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A context in which these parameters are not frozen."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


LOW_COVERAGE = 0.5
"""Share of the trained weights below which too few have curvature."""
LOW_COVERAGE_ADVICE = (
    "Give modules of your own curvature with lightning_thor.register_layer, also those that multiply by parameters of "
    "their own, or keep all experts in one. Name layers that can have none in skip_layers: these, and all inside of "
    "them, train with plain momentum."
)


def coverage(model: nn.Module, layers: Mapping[str, Layer], only: Set[nn.Parameter] | None) -> float:
    """The share of the trained weights, of ``only`` these parameters if given, that have curvature; 0 if none train."""
    return _share(*_trained_and_own(model, layers, only))


def warn_of_low_coverage(
    model: nn.Module,
    layers: Mapping[str, Layer],
    left_out: Mapping[str, str],
    only: Set[nn.Parameter] | None,
    skip_layers: Sequence[str],
) -> bool:
    """Warn where less than half of the trained weights have curvature, and name the largest that have none; returns
    whether it did. Weights that were skipped on purpose do not count."""
    of_training, own = _trained_and_own(model, layers, only)
    modules = [(_owner(unwrapped_name(name)), module) for name, module in model.named_modules()]
    # Those of an attention or a recurrent layer have names of their own.
    of_training = of_training - {
        *weights_of(model, {name for name, why in left_out.items() if why == SKIPPED}).values()
    }
    for name, module in modules:
        if any(_is_in(name, pattern) for pattern in skip_layers):
            of_training = of_training - set(module.parameters())
    if all(map(is_lazy, of_training)) or _share(of_training, own) >= LOW_COVERAGE:
        return False
    sizes: dict[str, int] = {}
    preconditioned = {name for name, module in modules if not own.isdisjoint(module.parameters(recurse=False))}
    for name, module in modules:
        lacking = [p for p in module.parameters(recurse=False) if p in of_training - own and not is_lazy(p)]
        # Not the biases of layers that have curvature.
        counted = [p for p in lacking if p.dim() > 1 or name not in preconditioned]
        sizes[name] = sizes.get(name, 0) + sum(p.numel() for p in counted)
    least = 0.05 * sum(sizes.values())
    largest = [name for name in sorted(sizes, key=lambda name: -sizes[name]) if sizes[name] > least]
    # The weights of an attention or a recurrent layer have names of their own.
    reasons = dict.fromkeys(why for name, why in left_out.items() if {name, name.rpartition(".")[0]} & {*largest})
    warnings.warn(
        f"Curvature preconditions {_share(of_training, own):.0%} of the weights that are trained. The largest of the "
        f"others are those of {name_some(largest, 3)} ({'; '.join(list(reasons)[:3]) or 'plain parameters'}). "
        f"{LOW_COVERAGE_ADVICE}",
        stacklevel=3,
    )
    return True


def _share(of_training: Set[nn.Parameter], own: Set[nn.Parameter]) -> float:
    """The share of the trained weights that have curvature; 0 if none train."""
    n_trained, n_own = (sum(p.numel() for p in some if not is_lazy(p)) for some in (of_training, of_training & own))
    return n_own / n_trained if n_trained else 0.0


def _trained_and_own(
    model: nn.Module, layers: Mapping[str, Layer], only: Set[nn.Parameter] | None
) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """The parameters that train, and those that have curvature."""
    trained = {p for p in model.parameters() if p.requires_grad and (only is None or p in only)}
    return trained, {p for layer in layers.values() for p in layer.parameters}


def _owner(name: str) -> str:
    """The module whose parameter a module stands for: of `torch.nn.utils.parametrize` the one that it parametrizes.

    >>> _owner("net.0.parametrizations.weight"), _owner("net.0"), _owner("parametrizations.weight")
    ('net.0', 'net.0', '')
    """
    parts = name.split(".")
    return ".".join(parts[: parts.index("parametrizations")]) if "parametrizations" in parts else name
