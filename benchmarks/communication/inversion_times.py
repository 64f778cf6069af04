"""Time of each rank's share of a model's inversions, on one thread, with nothing else running.

Inversions do not communicate, so a rank's share takes the same time alone. Where more processes than cores invert at
the same time they also wait for each other's cores and caches; `benchmarks.communication.rank_times` times those.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.communication.messages import block_counts
from lightning_thor import Curvature
from lightning_thor.distributed.shared_inversions import assign_inversions
from lightning_thor.linalg.decompositions import damped_inverses

Problem = tuple[Tensor, Tensor]
"""Blocks ``[n, size, size]`` and their damping ``[n]``."""


def seconds_of_inverting(problems: Sequence[Problem]) -> float:
    """Processor time of inverting all blocks."""
    began = time.thread_time()
    for blocks, damping in problems:
        damped_inverses(blocks, damping)
    return time.thread_time() - began


def some_problem(n_blocks: int, size: int) -> Problem:
    """Make ``n_blocks`` positive definite blocks of ``size``."""
    blocks = torch.randn(n_blocks, size, 2 * size)
    return blocks @ blocks.mT / size, torch.full((n_blocks,), 0.1)


def share_ms(curvature: Curvature, ranks: Sequence[int], rounds: int) -> dict[str, list[float]]:
    """Median milliseconds of each rank's share, by number of ranks; in each of ``rounds`` all ``ranks`` take turns."""
    n_blocks = {size: n for size, n in block_counts(curvature).items() if size > 1}
    problems = {size: some_problem(n, size) for size, n in n_blocks.items()}
    shares: dict[str, list[list[Problem]]] = {}
    for n in ranks:
        owns = [assign_inversions(n_blocks, n, rank).own for rank in range(n)]
        shares[str(n)] = [
            [(problems[size][0][own], problems[size][1][own]) for size, own in by_size.items() if len(own)]
            for by_size in owns
        ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = [{n: list(map(seconds_of_inverting, every)) for n, every in shares.items()} for _ in range(rounds)]
    torch.set_num_threads(threads)
    return {
        n: [round(1e3 * statistics.median(one[n][rank] for one in seconds), 3) for rank in range(len(every))]
        for n, every in shares.items()
    }


def inversion_rate(size: int = 64, n_blocks: int = 32) -> float:
    """10⁹ multiplications a second of processor time, at size³ for each of ``n_blocks`` inverses."""
    problem = some_problem(n_blocks, size)
    return n_blocks * size**3 / statistics.median(seconds_of_inverting([problem]) for _ in range(5)) / 1e9
