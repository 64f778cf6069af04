"""What each rank's share of a model's inversions takes, on one thread, with nothing else running.

Inversions talk to nobody, so a rank's share takes what it takes here. Where more processes than cores invert at the
same time they also wait for each other's cores and caches; `benchmarks.communication.rank_times` times those.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_thor import Curvature
from lightning_thor.distributed.shared_inversions import assign_inversions
from lightning_thor.linalg.decompositions import damped_inverses

Problem = tuple[Tensor, Tensor]


def seconds_of(problems: Sequence[Problem]) -> float:
    """Processor time of inverting blocks, each with its damping."""
    began = time.thread_time()
    for blocks, damping in problems:
        damped_inverses(blocks, damping)
    return time.thread_time() - began


def some_problem(n_blocks: int, size: int) -> Problem:
    """Positive definite blocks ``[n_blocks, size, size]``, and what is to be added to their eigenvalues."""
    blocks = torch.randn(n_blocks, size, 2 * size)
    return blocks @ blocks.mT / size, torch.full((n_blocks,), 0.1)


def share_ms(model: nn.Module, ranks: Sequence[int], rounds: int) -> dict[str, list[float]]:
    """By the number of ranks, milliseconds of each rank's share: a median over rounds in which all take turns."""
    stacks = Curvature(model).factors.batches
    problems = {size: some_problem(len(stack.sums), size) for size, stack in stacks.items() if size > 1}
    n_blocks = {size: len(blocks) for size, (blocks, _) in problems.items()}
    shares: dict[str, list[list[Problem]]] = {}
    for n in ranks:
        owns = [assign_inversions(n_blocks, n, share).own for share in range(n)]
        shares[str(n)] = [
            [(problems[size][0][own], problems[size][1][own]) for size, own in by_size.items() if len(own)]
            for by_size in owns
        ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    took = [{n: [seconds_of(share) for share in all_shares] for n, all_shares in shares.items()} for _ in range(rounds)]
    torch.set_num_threads(threads)
    return {
        n: [round(1e3 * statistics.median(one[n][share] for one in took), 3) for share in range(len(all_shares))]
        for n, all_shares in shares.items()
    }


def inversion_rate(size: int = 64, n_blocks: int = 32) -> float:
    """10⁹ multiplications a second of processor time, at size³ for each inverse."""
    problem = some_problem(n_blocks, size)
    return n_blocks * size * size * size / statistics.median(seconds_of([problem]) for _ in range(5)) / 1e9
