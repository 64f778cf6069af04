"""The memory of a training beyond its model and batch, measured in a process of its own for each optimizer.

On a CPU: growth of the process's resident memory, from before the model is built to the peak over a few steps
(refreshes among them), less the model's parameters. On a GPU: the same of the memory that torch allocated there.

    python -m benchmarks.step_cost.memory --workload gpt --optimizer thor      # prints bytes
"""

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.environment import prepare_device
from benchmarks.common.models import small_resnet
from benchmarks.common.workloads import Workload, images
from benchmarks.step_cost.workloads import WORKLOADS, make_runner

STEPS = 4
TRIES = 5
"""Processes whose median is taken on a CPU: memory that its allocator keeps for later differs between processes."""


def median_growth(workload: str, optimizer: str, scale: str, threads: int | None = None) -> float | None:
    """The median of `growth` over ``TRIES`` processes, on a GPU one; None where the operating system does not tell."""
    tries = [growth(workload, optimizer, scale, threads) for _ in range(TRIES if scale == "cpu" else 1)]
    found = [n_bytes for n_bytes in tries if n_bytes is not None]
    return statistics.median(found) if found else None


def growth(workload: str, optimizer: str, scale: str, threads: int | None = None) -> int | None:
    """Bytes of a training in a new process (options as of ``main``); None where the operating system does not tell."""
    if scale == "cpu" and not Path("/proc/self/status").is_file():
        return None
    command = [sys.executable, "-m", "benchmarks.step_cost.memory", f"--workload={workload}"]
    command += [f"--optimizer={optimizer}", f"--scale={scale}"] + ([] if threads is None else [f"--threads={threads}"])
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{ended.stderr}")
    return int(ended.stdout.split()[-1])


def resident_bytes(kind: str) -> int:
    """Memory of this process in bytes: ``"VmRSS"``, now, or ``"VmHWM"``, its peak.

    Not ``ru_maxrss`` of getrusage, which begins at the size of the parent process.
    """
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))


def measure(workload: str, optimizer: str, scale: str) -> int:
    """Measure the growth in this process; arguments as of `growth`. Returns bytes."""
    device = prepare_device(scale)
    chosen = WORKLOADS[scale][workload]
    inputs, targets = (part.to(device) for part in chosen.batch())
    warm_up(device)
    before = torch.cuda.memory_allocated() if scale == "gpu" else resident_bytes("VmRSS")
    one = make_runner(optimizer, chosen, device)
    for _ in range(STEPS):
        one.step(inputs, targets)
    peak = torch.cuda.max_memory_allocated() if scale == "gpu" else resident_bytes("VmHWM")
    return peak - before - sum(p.numel() * p.element_size() for p in one.model.parameters())


def warm_up(device: torch.device) -> None:
    """Take a few steps of a tiny network: the code of torch's libraries is not memory of an optimizer."""
    tiny = Workload(lambda: small_resnet(2), images(2), "tiny")
    one, batch = make_runner("thor", tiny, device), tiny.batch()
    for _ in range(2):
        one.step(*(part.to(device) for part in batch))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the growth in bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS["gpu"], required=True)
    parser.add_argument("--optimizer", choices=("sgd", "adamw", "thor", "thor_staggered"), required=True)
    parser.add_argument("--scale", choices=WORKLOADS, default="cpu")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print(measure(args.workload, args.optimizer, args.scale))


if __name__ == "__main__":
    main()
