"""Who computes what: costs in multiplications, and one greedy assignment by them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lightning_thor.linalg import matrix_sign
from lightning_thor.linalg.block_diagonal import BlockPartition


def assign_greedily(costs: Sequence[float], n_steps: int) -> list[int]:
    """In which of the next ``n_steps`` steps (1, 2, ...) each cost is to fall, so that none has much more than others.

    The largest first, each to the step that has least so far.

    >>> assign_greedily([4.0, 1.0, 3.0, 2.0], 2)
    [1, 1, 2, 2]
    """
    loads = [(0.0, step) for step in range(1, n_steps + 1)]  # a heap: the least, and of equal ones the first, on top
    steps = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, steps[index] = loads[0]
        heapq.heapreplace(loads, (load + costs[index], steps[index]))
    return steps


FactorShapes = tuple[BlockPartition | None, BlockPartition]
"""How A and G of a layer are cut; A is None where there is no input factor."""


MULTIPLICATIONS_PER_NUMBER = 30.0
"""How many of them, in a matrix product, take the time of reading a number a few times over (a core of an AMD EPYC)."""


def inversion_cost(blocks: BlockPartition | None) -> float:
    """Of inverting the blocks of a factor.

    A Cholesky factorisation and the inverse from it run at a fraction of a matrix product's rate: about a third.
    """
    return 0.0 if blocks is None else 3.0 * blocks.groups * blocks.n_blocks * blocks.size**3


def refresh_costs(shapes: Sequence[FactorShapes], n_rows: Sequence[float], n_numbers: Sequence[float]) -> list[float]:
    """Of refreshing each layer: covariance of its rows, inversions, and passes over what the rows are taken from, by
    which alone a norm has its price.

    Args:
        cuts: of each layer.
        n_rows: rows that each layer's covariance is taken of.
        n_numbers: how many numbers its inputs and gradients had.
    """
    return [
        sum(_covariance_cost(blocks, rows) + inversion_cost(blocks) for blocks in shapes)
        + MULTIPLICATIONS_PER_NUMBER * numbers
        for shapes, rows, numbers in zip(shapes, n_rows, n_numbers, strict=True)
    ]


def _covariance_cost(blocks: BlockPartition | None, n_rows: float) -> float:
    return 0.0 if blocks is None else blocks.groups * blocks.n_blocks * n_rows * blocks.size**2


def product_cost(shapes: FactorShapes) -> float:
    """Of the products of a layer's matrix with the blocks of A and of G, or of their roots.

    >>> product_cost((BlockPartition(1, 8, 2, 4), BlockPartition(1, 6, 1, 6))) == 6 * 8 * (4 + 6)
    True
    """
    A, G = shapes
    width, size = (1, 0) if A is None else (A.width, A.size)
    return float(G.groups * G.width * width * (G.size + size))


def sign_cost(shapes: FactorShapes) -> float:
    """Of making a layer's matrix polar: its Gram matrix and, with each polynomial, either one product of the small
    side's square matrices and two with the whole one, or four of square ones (`matrix_sign.msign`).

    >>> sign_cost((BlockPartition(1, 8, 2, 4), BlockPartition(1, 6, 1, 6))) == 4 * 6**2 * (2 * 8 + 6)
    True
    >>> sign_cost((BlockPartition(1, 16, 2, 8), BlockPartition(1, 6, 1, 6))) == 6**2 * (2 * 16 + 13 * 6)
    True
    """
    A, G = shapes
    small, large = sorted((G.width, 1 if A is None else A.width))
    n = matrix_sign.STEPS
    each = 2 * large + (4 * n - 3) * small if matrix_sign.is_wide(small, large) else n * (2 * large + small)
    return float(G.groups * small**2 * each)
