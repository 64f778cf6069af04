"""``python -m examples.demo``: train, print the tables, write the pictures and the figures."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples import pinn
from examples.demo.pictures import save_picture
from examples.demo.recipes import RECIPES
from examples.demo.tables import figures, pinn_figures, pinn_table, result_table
from examples.demo.training import Curve, keep_lightning_quiet, train, warm_up
from examples.demo.tuning import tune


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the demo, or the tuning; returns the figures that it also wrote (empty after tuning)."""
    parser = argparse.ArgumentParser(description="THOR, momentum SGD, AdamW and Muon, on digits and Burgers' equation.")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings per optimizer (default: %(default)s)")
    parser.add_argument(
        "--pinn-seconds", type=float, default=15, help="for Burgers' equation, per optimizer (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder to write into (default: %(default)s)"
    )
    parser.add_argument("--tune", action="store_true", help="rerun the search for the learning rates instead")
    options = parser.parse_args(arguments)

    keep_lightning_quiet()
    # So small a network gains nothing from more threads, and loses much when other programs want the cores.
    torch.set_num_threads(1)
    console = Console()
    if options.tune:
        tune(options.epochs, console)
        return {}

    warm_up()
    curves: dict[str, list[Curve]] = {name: [] for name in RECIPES}
    # Seed by seed rather than optimizer by optimizer: a machine that is slower for a while is slower for all.
    for seed in range(options.seeds):
        for name, recipe in RECIPES.items():
            console.print(f"seed {seed}: [bold]{name}[/bold], peak learning rate {recipe.lr:g}")
            curves[name].append(train(recipe, recipe.lr, seed, options.epochs))

    console.print("a physics-informed network")
    limits = (f"--seconds={options.pinn_seconds}", f"--out={options.out}")
    networks = pinn.main(["--equation=burgers", *limits, "--optimizers", "thor", "sgd", "adamw", "muon"])
    measured = figures(curves, options.epochs) | {"pinn": pinn_figures(networks)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "figures.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    save_picture(curves, options.out / "curves.png")
    console.print(result_table(curves, options.epochs))
    console.print(pinn_table(measured["pinn"], "Burgers' equation", options.pinn_seconds))
    console.print(f"Written into {options.out}: curves.png, pinn.png, figures.json")
    return measured


if __name__ == "__main__":
    main()
