"""Devices, clocks, and where a figure was measured: figures without this cannot be compared."""

import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def environment(device: torch.device) -> dict[str, str | int]:
    """Date, versions, processor and threads of this process: plain types, ready for JSON."""
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
    """The processor's name according to the operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronise(device: torch.device) -> None:
    """Wait until ``device`` has finished its queued work, so that a clock read afterwards counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call of ``run``, work queued on ``device`` included."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def prepare_device(scale: str) -> torch.device:
    """The device of a scale, ``"cpu"`` or ``"gpu"``; on a GPU turns on TF32 products, as Lightning advises."""
    if scale == "gpu":
        torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if scale == "gpu" else "cpu")
