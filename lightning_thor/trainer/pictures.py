"""Pictures of what a run left in its folder, saved there and given to loggers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_thor.block_size.choose import BlockSplit
from lightning_thor.curvature.part_timer import REST
from lightning_thor.trainer.packages import is_lightnings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "thor_monitor.jsonl"
SPLIT = "thor_split.json"
N_NAMED = 8
"""Layers that a legend names; of more, colours show the depth."""
N_SPECTRA = 5
"""Layers whose spectra are drawn."""
QUIET = "#8a8f98"
COLOURS = {"directions": "#4c78a8", "statistics": "#59a14f", "inversion": "#e1812c", "communication": "#b279a2"}

Look = dict[str, Any]
"""A line of the file, see `lightning_thor.trainer.monitor`."""


def read_looks(folder: Path) -> list[Look]:
    """The looks that `ThorMonitor` wrote into a run's folder, by rising step: those of steps that a resumed fit took
    again are left out, and so is a line that was cut off when a run was killed or the disk was full.

    Raises:
        FileNotFoundError: it has no file of a monitor.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Trainer(callbacks=[ThorCallback(), ThorMonitor()]) writes it into the folder of "
            "the logger, such as lightning_logs/version_0."
        )
    looks: list[Look] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            look = json.loads(line)
        except json.JSONDecodeError:
            continue
        while looks and looks[-1]["step"] >= look["step"]:
            looks.pop()
        looks.append(look)
    return looks


def plot(run_dir: str) -> None:
    """Draw what ThorMonitor and block_size="auto" left in a run's folder, as thor_layers.png, thor_spectra.png,
    thor_step.png and thor_split.png there.

    Args:
        run_dir: folder of the run: that of the logger's files, such as lightning_logs/version_0.
    """
    folder = Path(run_dir)
    try:
        pictures = pictures_of(folder)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    for name, figure in pictures.items():
        figure.savefig(folder / f"thor_{name}.png")
        print(folder / f"thor_{name}.png")


def pictures_of(folder: Path) -> dict[str, Figure]:
    """Draw all that a run's folder has figures for: ``"layers"``, ``"spectra"``, ``"step"``, ``"split"``, by name.

    Raises:
        FileNotFoundError: it has neither a file of a monitor nor one of a chosen block size.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: there is nothing to draw in its files, or one is damaged.
    """
    pictures: dict[str, Figure] = {}
    has_split = (folder / SPLIT).is_file()
    looks = read_looks(folder) if not has_split or (folder / FILE).is_file() else []
    if not looks and not has_split:
        raise ValueError(f"There are no looks in {folder / FILE}: its run ended before ThorMonitor's first one.")
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("Pictures need matplotlib: pip install matplotlib.")
    if looks:
        pictures = {"layers": layers_figure(looks), "spectra": spectra_figure(looks)}
        if looks[-1]["seconds"] is not None:
            pictures["step"] = step_figure(looks)
    if has_split:
        try:
            split = json.loads((folder / SPLIT).read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{folder / SPLIT} is damaged. Delete it to draw what else is there.") from None
        pictures["split"] = split_figure(BlockSplit(**{key: split[key] for key in split if key != "speeds"}))
    return pictures


# ── loggers ──


def takes_pictures(logger: object) -> bool:
    """Whether a logger is one of Lightning's for TensorBoard, Weights & Biases or MLflow, and there can be pictures."""
    has_way = is_lightnings(logger, "TensorBoardLogger", "WandbLogger", "MLFlowLogger")
    return has_way and find_spec("matplotlib") is not None


def log_pictures(loggers: Sequence[Any], pictures: Mapping[str, Figure], step: int) -> None:
    """Give pictures, by name, that were drawn at a ``step`` to loggers of which `takes_pictures` says so."""
    for logger in loggers:
        for name, figure in pictures.items():
            if is_lightnings(logger, "WandbLogger"):
                logger.log_image(key=f"thor/{name}", images=[figure], step=step)
            elif is_lightnings(logger, "TensorBoardLogger"):
                logger.experiment.add_figure(f"thor/{name}", figure, global_step=step)
            else:
                logger.experiment.log_figure(logger.run_id, figure, f"thor/{name}.png")


# ── pictures ──


def layers_figure(looks: Sequence[Look]) -> Figure:
    """Draw over the steps of the looks, of which there is one or more, for A and G of each layer: trace, condition
    number, effective rank, and change; below, the refreshes."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    names = list(looks[-1]["layers"])
    figure = Figure(figsize=(10, 10.5), dpi=130, layout="constrained")
    grid = figure.subplots(5, 2, sharex=True, gridspec_kw={"height_ratios": [3, 3, 3, 3, 0.8]})
    colour_map = colormaps["tab10"] if len(names) <= N_NAMED else colormaps["viridis"]
    colours = {
        name: colour_map(index if len(names) <= N_NAMED else 0.95 * index / (len(names) - 1))
        for index, name in enumerate(names)
    }
    rows = ("trace", "condition", "effective_rank", "change")
    words = ("trace", "condition number, damped", "effective rank / width", "change at a refresh")
    has_marks = any(
        layer["stopped"] or _is_kept(looks, index, name)
        for index, look in enumerate(looks)
        for name, layer in look["layers"].items()
    )
    for column, side in enumerate(("A", "G")):
        for row, (key, word) in enumerate(zip(rows, words, strict=True)):
            axes = grid[row][column]
            for name in names:
                points = list(_points(looks, name, side, key))
                if not points:
                    continue
                colour, (steps, values, _) = colours[name], zip(*points, strict=True)
                axes.plot(steps, values, "-", color=colour, linewidth=1.4, alpha=0.9, label=name)
                if len(points) == 1:
                    axes.plot(steps, values, ".", color=colour)
                for step, value, index in points if has_marks and row == 0 else ():
                    if looks[index]["layers"][name]["stopped"]:
                        axes.plot(step, value, "x", color=colour, markersize=5)
                    elif _is_kept(looks, index, name):
                        axes.plot(step, value, "o", color=colour, markerfacecolor="white", markersize=4)
            _plain(axes)
            if key in ("trace", "condition"):
                axes.set_yscale("log")
            else:
                _in_per_cent(axes)
            if column == 0:
                axes.set_ylabel(word)
        refreshes = [refresh for look in looks for refresh in look["refreshes"]]
        rug = grid[4][column]
        rug.vlines([step for step, _ in refreshes], 0, [share for _, share in refreshes], color=QUIET, linewidth=0.8)
        rug.set_ylim(0, 1.05)
        rug.set_yticks([])
        rug.spines[["top", "right", "left"]].set_visible(False)
        rug.set_xlabel("step")
    grid[4][0].set_ylabel("refreshes", rotation=0, ha="right", va="center")
    grid[0][0].set_title("A: inputs", loc="left")
    grid[0][1].set_title("G: gradients of outputs", loc="left")
    n_layers = f"{len(names)} layers" if len(names) > 1 else "1 layer"
    marks = "; ○ kept, × stopped by the trace rule" if has_marks else ""
    figure.suptitle(f"Curvature of {n_layers}{marks}", x=0.02, ha="left", fontsize=13)
    if len(names) <= N_NAMED:
        # All layers have a G.
        handles, labels = grid[0][1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    else:
        colours_by_depth = ScalarMappable(Normalize(0, 1 / 0.95), colour_map)
        bar = figure.colorbar(colours_by_depth, ax=grid, location="bottom", shrink=0.6, aspect=60, pad=0.02)
        bar.set_ticks([0, 1], labels=[names[0], names[-1]])
        bar.set_label("depth", labelpad=-8)
        bar.outline.set_visible(False)
    return figure


def _points(looks: Sequence[Look], name: str, side: str, key: str) -> Iterator[tuple[int, float, int]]:
    """Steps and values of a figure of one factor, ranks over the width, and the numbers of the looks that have it."""
    for index, look in enumerate(looks):
        own = look["layers"].get(name, {}).get(side, {})
        if own.get(key) is not None:
            yield look["step"], own[key] / (own["width"] if key == "effective_rank" else 1), index


def _is_kept(looks: Sequence[Look], index: int, name: str) -> bool:
    """Whether the trace rule kept a layer all the time since the look before."""
    layer = looks[index]["layers"][name]
    # Of several optimizers each counts its own steps; files of earlier versions have those of the first one alone.
    before = looks[index - 1]["layers"].get(name, {}).get("step", looks[index - 1]["step"]) if index else 0
    return layer["stopped"] is not None and layer["inverted_at"] < before


def spectra_figure(looks: Sequence[Look]) -> Figure:
    """Draw the eigenvalues of A and G of some layers at the first and the last of the looks, which may be the same; of
    whole factors also what blocks of each size would lose of them."""
    from matplotlib.figure import Figure

    first, last = looks[0]["layers"], looks[-1]["layers"]
    known = [
        name
        for name, layer in last.items()
        if any(side in layer and layer[side]["eigenvalues"] and layer[side]["block_size"] > 1 for side in ("A", "G"))
    ]
    places = sorted({round(i * (len(known) - 1) / max(N_SPECTRA - 1, 1)) for i in range(N_SPECTRA)}) if known else []
    names = [known[place] for place in places]
    sides = [last[name][side] for name in names for side in ("A", "G") if side in last[name]]
    has_outside = any(side["outside"] for side in sides) and not any(side["is_partitioned"] for side in sides)
    n_rows, n_columns = 3 if has_outside else 2, max(len(names), 1)
    figure = Figure(figsize=(max(2.6 * n_columns, 7), 2.6 * n_rows + 0.9), dpi=130, layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for column, name in enumerate(names):
        for row, side in enumerate(("A", "G")):
            axes, own = grid[row][column], last[name].get(side)
            _plain(axes)
            if own is None or not own["eigenvalues"] or not own["trace"]:
                axes.set_axis_off()
                continue
            mean = own["trace"] / own["width"]
            before, shown = first.get(name, {}).get(side, {}), []
            if before.get("eigenvalues") and before["trace"]:
                shown = [value * before["width"] / before["trace"] for value in before["eigenvalues"]]
                axes.plot(before["ranks"], shown, color=QUIET, linewidth=1.2, label=f"step {looks[0]['step']}")
            relative = [value / mean for value in own["eigenvalues"]]
            axes.plot(own["ranks"], relative, color="#c8553d", linewidth=1.8, label=f"step {looks[-1]['step']}")
            _log2_x(axes)
            axes.set_yscale("log")
            axes.set_ylim(max(min(relative) / 2, 1e-7), 2 * max(*relative, *shown, 1e-6))
            if own["damping"]:
                axes.axhline(own["damping"] / mean, color="#1b6ca8", linewidth=1, linestyle="--", label="damping")
            blocks = "diagonal" if own["block_size"] == 1 else f"{own['n_blocks']} blocks of {own['block_size']}"
            shape = f"{own['width']} wide" + ("" if own["n_blocks"] == 1 else f", {blocks}")
            above = f"{_short(name)}\n" if row == 0 else ""
            axes.set_title(f"{above}{side}: {shape}", fontsize=9, loc="left")
            if column == 0:
                axes.set_ylabel("eigenvalue / mean")
            if row == 1:
                axes.set_xlabel("rank")
        if has_outside:
            _draw_losses(grid[2][column], last[name])
    if has_outside:
        grid[2][0].set_ylabel("lost by blocks, of ‖F‖²")
    handles, labels = grid[0][0].get_legend_handles_labels()
    if not handles:
        handles, labels = grid[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    if has_outside:
        what = "Spectra of whole factors, and what diagonal blocks would lose"
    else:
        what = "Spectra of the diagonal blocks (what lies outside of them is not stored: block_size=None shows it)"
    figure.suptitle(what, x=0.02, ha="left", fontsize=11)
    return figure


def _draw_losses(axes: Axes, layer: Mapping[str, Any]) -> None:
    """Draw what blocks of each size would lose of a layer's A and G, where these are whole and wide enough."""
    _plain(axes)
    axes.set_xlabel("block size")
    for side, colour in (("A", "#59a14f"), ("G", "#b279a2")):
        outside = layer.get(side, {}).get("outside") or {}
        if outside:
            sizes = list(map(int, outside))
            axes.plot(sizes, list(outside.values()), "o-", color=colour, markersize=3, label=side)
    if axes.has_data():
        _log2_x(axes)
        _in_per_cent(axes)
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "fits into one block", transform=axes.transAxes, ha="center", fontsize=9)


def step_figure(looks: Sequence[Look]) -> Figure:
    """Draw the share of each part of a step in its time: over all steps, and between looks, all of which have
    seconds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    spans = _spans(looks)
    total = {part: sum(seconds[part] for *_, seconds in spans) for part in spans[0][2]}
    everything = max(sum(total.values()), 1e-12)
    own = [part for part in COLOURS if total[part] > 0]
    figure = Figure(figsize=(8.5, 5), dpi=130, layout="constrained")
    bar, over_time = figure.subplots(2, 1, gridspec_kw={"height_ratios": [1, 3.2]})
    left = 0.0
    for part in (*own, REST):
        share = total[part] / everything
        bar.barh(0, share, left=left, height=0.8, color=COLOURS.get(part, "#d9dce1"), edgecolor="white")
        if part == REST:
            words = f"forward, backward and all else\n{share:.1%}"
            bar.text(left + share / 2, 0, words, ha="center", va="center", fontsize=9)
        left += share
    bar.set_xlim(0, 1)
    bar.set_axis_off()
    n_steps = looks[-1]["step"] - spans[0][0]
    each = 1e3 * everything / max(n_steps, 1)
    title = f"{sum(total.values()):.3g} s in {n_steps} steps, {each:{'.0f' if each >= 100 else '.3g'}} ms each"
    bar.set_title(title, loc="left", fontsize=11)
    edges = [start for start, *_ in spans] + [spans[-1][1]]
    floor = [0.0] * len(spans)
    for part in own:
        tops = [
            low + seconds[part] / max(sum(seconds.values()), 1e-12)
            for low, (*_, seconds) in zip(floor, spans, strict=True)
        ]
        label = f"{part}, {total[part] / everything:.1%}"
        over_time.stairs(tops, edges, baseline=floor, fill=True, color=COLOURS[part], label=label)
        floor = tops
    _plain(over_time)
    over_time.set_xlim(edges[0], edges[-1])
    over_time.set_ylim(0, 1.1 * max([*floor, 1e-3]))
    over_time.yaxis.set_major_formatter(PercentFormatter(1))
    over_time.set_xlabel("step")
    over_time.set_ylabel("share of the time of a step")
    over_time.legend(frameon=False, loc="upper right", reverse=True)
    return figure


def _spans(looks: Sequence[Look]) -> list[tuple[int, int, dict[str, float]]]:
    """From a look to the next: first step, last step, seconds by part."""
    spans = []
    step, before = 0, dict.fromkeys(looks[0]["seconds"], 0.0)
    for look in looks:
        now = look["seconds"]
        # A resumed fit counts from 0 again.
        goes_on = sum(now.values()) >= sum(before.values())
        passed = {part: now[part] - (before[part] if goes_on else 0.0) for part in now}
        spans.append((step, look["step"], passed))
        step, before = look["step"], now
    return spans


def split_figure(split: BlockSplit) -> Figure:
    """Draw both curves of ``split`` over the block size, their crossing and the choice."""
    from matplotlib.figure import Figure

    share_colour, speed_colour, quiet = "#1b6ca8", "#c8553d", "#555555"
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(split.candidates, split.shares, "o-", color=share_colour, label="factors that lose less than 1 %")
    axes.plot(split.candidates, split.speeds, "s-", color=speed_colour, label="speed of inversion (size 1 is 1)")
    axes.axvline(split.crossing, color=quiet, linewidth=1, linestyle=":")
    axes.axvline(split.block_size, color=quiet, linewidth=6, alpha=0.2)
    axes.set_xscale("log", base=2)
    # The widest factor may be hardly wider than the last power of two: their labels would overlap.
    ticks = [size for size in split.candidates if size == split.candidates[-1] or size * 1.4 < split.candidates[-1]]
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, max(1.0, *split.speeds) * 1.05)
    axes.set_xlabel("block size")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    of = f"{split.n_factors} factors on {split.device}"
    title = f"Block size {split.block_size}: the curves cross at {split.crossing:.0f} ({of})"
    axes.set_title(title, loc="left", fontsize=11)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _log2_x(axes: Axes) -> None:
    """Let x be powers of two, written out."""
    from matplotlib.ticker import StrMethodFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))


def _in_per_cent(axes: Axes) -> None:
    """Let y be shares from 0 on."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _short(name: str) -> str:
    """>>> _short("encoder.layers.11.attention.output.dense")
    '…s.11.attention.output.dense'
    """
    return name if len(name) <= 28 else f"…{name[-27:]}"
