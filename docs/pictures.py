"""Draws the pictures of how-it-works.md: ``python docs/pictures.py`` (needs scikit-learn and matplotlib)."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

from lightning_thor import Curvature, Thor

FOLDER = Path(__file__).parent / "pictures"
GREY, RED, BLUE = "#808080", "#c8553d", "#1b6ca8"  # legible on white and on black


def plain(axes: Axes, title: str) -> None:
    """Leave a title and a frame."""
    axes.set_title(title, color=GREY, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(GREY)


def valley() -> Figure:
    """30 steps of both in a quadratic of curvatures 1 and 25, turned by 30 degrees."""
    turn = np.array([[np.cos(0.52), -np.sin(0.52)], [np.sin(0.52), np.cos(0.52)]])
    H = turn @ np.diag([1.0, 25.0]) @ turn.T
    figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="none")
    grid = np.stack(np.meshgrid(np.linspace(-1.5, 3.5, 200), np.linspace(-1.6, 2.4, 200)), -1)
    loss = np.einsum("...i,ij,...j", grid, H, grid) / 2
    names = (("gradient descent: zigzag, then slow", 0.075 * np.eye(2), RED),
             ("natural gradient: straight, as fast in every direction", 0.35 * np.linalg.inv(H), BLUE))  # fmt: skip
    for axes, (title, step, colour) in zip(figure.subplots(1, 2), names, strict=True):
        path = [np.array([3.0, 1.0])]
        for _ in range(12):
            path.append(path[-1] - step @ H @ path[-1])
        axes.contour(grid[..., 0], grid[..., 1], loss, np.geomspace(0.05, 60, 10), colors=GREY, linewidths=0.6)
        axes.plot(*np.array(path).T, "o-", color=colour, markersize=3.5, linewidth=1.4)
        axes.plot(0, 0, "+", color=GREY, markersize=10)
        axes.set_facecolor("none")
        axes.set_aspect("equal")
        plain(axes, title)
    return figure


def blocks() -> Figure:
    """A of the second layer of a network that learnt to read digits: whole, in blocks, and their inverses."""
    torch.manual_seed(0)
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    curvature = Curvature(model, block_size=None, update_every_n_steps=1)
    optimizer = Thor(model.parameters(), preconditioner=curvature)
    for batch in torch.randperm(1797).split(64) * 3:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels[batch].float() / 16), labels[batch]).backward()
        optimizer.step()
    A = curvature.export()["2"]["A"][0, 0].numpy()
    order = np.argsort(np.linalg.eigh(A)[1][:, -1])  # so that the pattern shows
    A = A[np.ix_(order, order)]
    inside = np.kron(np.eye(4), np.ones((32, 32)))
    inverse = np.linalg.inv(A * inside + 0.2 * np.trace(A) / 128 * np.eye(128))
    figure = Figure(figsize=(9, 3.2), layout="constrained", facecolor="none")
    shown = ((A, "A = E[a aᵀ] of 128 inputs"), (A * inside, "its blocks of 32"), (inverse, "their damped inverses"))
    for axes, (matrix, title) in zip(figure.subplots(1, 3), shown, strict=True):
        limit = np.quantile(np.abs(matrix[inside > 0]), 0.98)
        axes.imshow(np.ma.masked_equal(matrix, 0), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none")
        axes.set_facecolor("none")
        plain(axes, title)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "lightning_thor"  # the same file each time
    FOLDER.mkdir(exist_ok=True)
    for make in (valley, blocks):
        make().savefig(FOLDER / f"{make.__name__}.svg", metadata={"Date": None})
