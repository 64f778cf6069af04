"""The search for the learning rates of `examples.demo.recipes`."""

import statistics

from rich import box
from rich.console import Console
from rich.table import Table

from examples.demo.recipes import RECIPES
from examples.demo.training import train

TUNING_SEEDS = (100, 101)
TUNING_SPLIT_SEED = 1


def tune(epochs: int, console: Console) -> None:
    """Try every learning rate of every recipe's grid on the tuning seeds, and print the scores."""
    for name, recipe in RECIPES.items():
        scores, finals = {}, {}
        for lr in recipe.lr_grid:
            curves = [train(recipe, lr, seed, epochs, TUNING_SPLIT_SEED, progress=False) for seed in TUNING_SEEDS]
            scores[lr] = statistics.mean(statistics.mean(curve.accuracy) for curve in curves)
            finals[lr] = statistics.mean(curve.accuracy[-1] for curve in curves)
        best = max(scores, key=scores.__getitem__)
        table = Table("peak lr", "accuracy, mean over the training", "final accuracy", title=name, box=box.SIMPLE_HEAD)
        for lr, score in scores.items():
            table.add_row(f"{lr:g}", f"{score:.2%}", f"{finals[lr]:.2%}", style="bold" if lr == best else "")
        console.print(table)
