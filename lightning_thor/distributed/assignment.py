"""Who computes what: costs in multiplications, and one greedy assignment by them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lightning_thor.factors.layout import FactorShapes
from lightning_thor.linalg import matrix_sign
from lightning_thor.linalg.block_diagonal import BlockPartition

MULTIPLICATIONS_PER_NUMBER = 30.0
"""Multiplications of a matrix product that take as long as reading a number a few times (a core of an AMD EPYC)."""


def assign_greedily(costs: Sequence[float], n_owners: int, allowed: Sequence[Sequence[int]] = ()) -> list[int]:
    """Assign each task to the owner with the least load so far, the first of equal ones.

    Args:
        costs: cost of each task, ``[n_tasks]``.
        n_owners: number of owners.
        allowed: the owners that may have each of the first tasks. These are assigned first, in their order; then the
            others, the most expensive first, to any owner.

    Returns:
        The owner of each task, from 0, ``[n_tasks]``.

    >>> assign_greedily([4.0, 1.0, 3.0, 2.0], 2)
    [0, 0, 1, 1]
    >>> assign_greedily([1.0, 1.0, 1.0, 2.0], 3, allowed=[[2], [1, 2]])
    [2, 1, 1, 0]
    """
    loads, owners = [0.0] * n_owners, [0] * len(costs)
    for task, candidates in enumerate(allowed):
        owners[task] = min(candidates, key=loads.__getitem__)
        loads[owners[task]] += costs[task]
    heap = [(load, owner) for owner, load in enumerate(loads)]
    heapq.heapify(heap)
    for task in sorted(range(len(allowed), len(costs)), key=lambda task: -costs[task]):
        load, owners[task] = heap[0]
        heapq.heapreplace(heap, (load + costs[task], owners[task]))
    return owners


def inversion_cost(blocks: BlockPartition | None) -> float:
    """Multiplications that inverting a factor's ``blocks`` takes, about; 0 for None.

    A Cholesky factorisation and the inverse from it run at about a third of the rate of a matrix product.
    """
    return 0.0 if blocks is None else 3.0 * blocks.groups * blocks.n_blocks * blocks.size**3


def refresh_costs(shapes: Sequence[FactorShapes], n_rows: Sequence[float], n_numbers: Sequence[float]) -> list[float]:
    """Multiplications that refreshing each layer takes, about, ``[n_layers]``: its covariances, its inversions, and
    passes over inputs and gradients, which are most of a norm's cost.

    Args:
        shapes: blocks of each layer's factors, ``[n_layers]``.
        n_rows: rows of which each layer takes covariances, ``[n_layers]``.
        n_numbers: numbers in each layer's inputs and gradients, ``[n_layers]``.
    """
    return [
        sum(_covariance_cost(blocks, rows) + inversion_cost(blocks) for blocks in factors)
        + MULTIPLICATIONS_PER_NUMBER * numbers
        for factors, rows, numbers in zip(shapes, n_rows, n_numbers, strict=True)
    ]


def _covariance_cost(blocks: BlockPartition | None, n_rows: float) -> float:
    return 0.0 if blocks is None else blocks.groups * blocks.n_blocks * n_rows * blocks.size**2


def product_cost(factors: FactorShapes) -> float:
    """Multiplications that the products of a layer's matrix with the blocks of its ``factors`` take.

    >>> product_cost((BlockPartition(1, 8, 2, 4), BlockPartition(1, 6, 1, 6))) == 6 * 8 * (4 + 6)
    True
    """
    A, G = factors
    width, size = (1, 0) if A is None else (A.width, A.size)
    return float(G.groups * G.width * width * (G.size + size))


def sign_cost(factors: FactorShapes) -> float:
    """Multiplications that `matrix_sign.msign` takes of the parts of a layer's matrix, which has the widths of its
    ``factors``.

    They are a part's Gram matrix and, for each polynomial, either one product of the small side's square matrices and
    two with the whole part, or four of square ones.

    >>> sign_cost((BlockPartition(1, 8, 2, 4), BlockPartition(1, 6, 1, 6))) == 4 * 6**2 * (2 * 8 + 6)
    True
    >>> sign_cost((BlockPartition(1, 16, 2, 8), BlockPartition(1, 6, 1, 6))) == 6**2 * (2 * 16 + 13 * 6)
    True
    """
    A, G = factors
    width = 1 if A is None else A.width
    side, large = (G, width) if A is None or G.width <= width else (A, G.width)
    small, n = matrix_sign.part_length(side.width, side.n_blocks, side.size), matrix_sign.STEPS
    each = 2 * large + (4 * n - 3) * small if matrix_sign.is_wide(small, large) else n * (2 * large + small)
    return float(G.groups * side.width * small * each)
