"""Where a figure was measured: figures without this cannot be compared."""

import datetime
import os
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[1] / "results"


def environment(device: torch.device) -> dict[str, str | int]:
    """Date, versions, processor and threads of this process; plain types, ready for JSON."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        # glibc's malloc can dominate convolutions on small virtual machines: see MALLOC_TOP_PAD_ in mallopt(3).
        "malloc": " ".join(f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("MALLOC_")),
    }


def cpu_name() -> str:
    """The processor's name as the operating system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronise(device: torch.device) -> None:
    """Wait until ``device`` has done what it was told, so that a clock read afterwards is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def use(scale: str) -> torch.device:
    """The device of a scale, with products of float32 as users of such a device have them: on a GPU in TF32, as
    Lightning advises them."""
    if scale == "gpu":
        torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if scale == "gpu" else "cpu")
