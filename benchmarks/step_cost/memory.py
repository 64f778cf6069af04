"""How much memory a training takes beyond its model and batch: a process of its own for each optimizer.

On a CPU the growth of the process's resident memory: its peak over a few steps (refreshes among them), less what it was
before the model was built, less the model's parameters. On a GPU the same of what torch has allocated there.

    python -m benchmarks.step_cost.memory --workload gpt --optimizer thor      # prints bytes
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.environment import use
from benchmarks.common.models import small_resnet
from benchmarks.step_cost.workloads import WORKLOADS, Workload, images, runner

STEPS = 4


def growth(workload: str, optimizer: str, scale: str, threads: int | None = None) -> int | None:
    """Bytes, measured in a new process; None where the operating system does not tell."""
    if scale == "cpu" and not Path("/proc/self/status").is_file():
        return None
    command = [
        sys.executable,
        "-m",
        "benchmarks.step_cost.memory",
        f"--workload={workload}",
        f"--optimizer={optimizer}",
    ]
    command += [f"--optimizer={optimizer}", f"--scale={scale}"] + ([] if threads is None else [f"--threads={threads}"])
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{ended.stderr}")
    return int(ended.stdout.split()[-1])


def resident(kind: str) -> int:
    """Bytes of this process's memory: ``"VmRSS"``, now, or ``"VmHWM"``, its peak.

    Not getrusage's ``ru_maxrss``: that begins at the size of the process that started this one.
    """
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found.group(1))


def measure(workload: str, optimizer: str, scale: str) -> int:
    """The growth in this process."""
    device = use(scale)
    chosen = WORKLOADS[scale][workload]
    inputs, targets = (part.to(device) for part in chosen.batch())
    warm_up(device)
    before = torch.cuda.memory_allocated() if scale == "gpu" else resident("VmRSS")
    one = runner(optimizer, chosen, device)
    for _ in range(STEPS):
        one.step(inputs, targets)
    peak = torch.cuda.max_memory_allocated() if scale == "gpu" else resident("VmHWM")
    return peak - before - sum(p.numel() * p.element_size() for p in one.model.parameters())


def warm_up(device: torch.device) -> None:
    """A few steps of a tiny network: the code of torch's libraries is not memory that an optimizer takes."""
    tiny = Workload(lambda: small_resnet(2), images(2), "tiny")
    one, batch = runner("thor", tiny, device), tiny.batch()
    for _ in range(2):
        one.step(*(part.to(device) for part in batch))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the growth in bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS["cpu"], required=True)
    parser.add_argument("--optimizer", choices=("sgd", "adamw", "thor", "thor_staggered"), required=True)
    parser.add_argument("--scale", choices=WORKLOADS, default="cpu")
    parser.add_argument("--threads", type=int)
    said = parser.parse_args(arguments)
    if said.threads is not None:
        torch.set_num_threads(said.threads)
    print(measure(said.workload, said.optimizer, said.scale))


if __name__ == "__main__":
    main()
