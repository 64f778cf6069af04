"""What is preconditioned, as a rich table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightning_thor.blocks import Blocks
from lightning_thor.curvature import Curvature
from lightning_thor.layers import plain_name


def curvature_table(curvature: Curvature) -> Table:
    """One line per weight: its factors, block sizes and memory, or why it has none. Modules that are tied to a layer
    before them have lines of their own."""
    total = sum(curvature.n_bytes(name) for name in curvature.layers)
    table = Table(
        title="THOR curvature",
        caption=f"{len(curvature.layers)} layers preconditioned, {_size(total)} in all; "
        "other parameters, their biases too, take plain momentum",
    )
    for column in ("layer", "type", "weight", "curvature"):
        table.add_column(column, overflow="fold")
    table.add_column("memory", justify="right", no_wrap=True)
    modules = {plain_name(name): module for name, module in curvature.model.named_modules()}
    place = {name: index for index, name in enumerate(modules)}
    used = {use.name: (name, use) for name, layer in curvature.layers.items() for use in layer.uses}

    def owner(name: str) -> str:
        # The projections of an attention are no modules: they are in one.
        return name if name in modules else name.rpartition(".")[0]

    for name in sorted([*used, *curvature.left_out], key=lambda name: place[owner(name)]):
        kind = type(modules[owner(name)]).__name__
        if name in curvature.left_out:
            table.add_row(name or "(root)", kind, "", f"plain: {curvature.left_out[name]}", style="dim")
            continue
        layer = curvature.layers[used[name][0]]
        shape = "×".join(map(str, layer.own_part(layer.parameters[0]).shape)) + (" + bias" if layer.with_bias else "")
        if name != layer.name:
            table.add_row(name or "(root)", kind, shape, f"tied: its rows are added to {layer.name!r}")
            continue
        factors = f"G {_cut(layer.G)}" if layer.A is None else f"A {_cut(layer.A)}, G {_cut(layer.G)}"
        if layer.folded_into is not None:
            factors += f", tied: folded into {layer.folded_into!r}"
        table.add_row(name or "(root)", kind, shape, factors, _size(curvature.n_bytes(name)))
    return table


def print_curvature(curvature: Curvature) -> None:
    """Print `curvature_table` to standard output."""
    Console().print(curvature_table(curvature))


def _cut(blocks: Blocks) -> str:
    """>>> _cut(Blocks(1, 256, 2, 128)), _cut(Blocks(1, 10, 10, 1)), _cut(Blocks(4, 9, 1, 9))
    ('2 × 128²', 'diagonal 10', '4 × 9²')
    """
    if blocks.size == 1 and blocks.width > 1:
        return f"diagonal {blocks.width}"
    return f"{blocks.groups * blocks.n_blocks} × {blocks.size}²"


def _size(n_bytes: int) -> str:
    """>>> _size(512), _size(3 * 2**20)
    ('512 B', '3.0 MiB')
    """
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
