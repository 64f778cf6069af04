"""A picture of what the host and the device do in steps of SGD and of THOR, from torch's profiler."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common.environment import synchronise
from benchmarks.common.pictures import save, subplots
from benchmarks.common.workloads import Batch, Workload
from benchmarks.step_cost.workloads import MEASURED_INTERVAL, Runner, make_runner

PHASES = {"forward and backward": "tab:blue", "optimizer": "tab:orange"}
"""Of a step, and their colours."""
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
SHORTEST_GAP = 0.02
"""Milliseconds: shorter pauses cannot be seen."""

Spans = list[tuple[float, float]]
"""Starts and lengths in milliseconds."""


class Timeline(NamedTuple):
    """One step: for each of ``PHASES``, when it keeps the host busy and when the device."""

    host: dict[str, Spans]
    device: dict[str, Spans]

    @property
    def end(self) -> float:
        """Milliseconds from the first call to the end of the last kernel."""
        spans = [span for lane in self for each in lane.values() for span in each]
        return max((start + length for start, length in spans), default=0.0)


def trace(workload: Workload, batches: Sequence[Batch], device: torch.device) -> dict[str, Timeline]:
    """Profile one step of each kind, with the profiler's own cost in it.

    Args:
        workload: a network.
        batches: of it, on the device.
        device: a GPU, or the CPU, which is host and device.

    Returns:
        Timelines by kind of step.
    """
    sgd, thor = make_runner("sgd", workload, device), make_runner("thor", workload, device)
    for one in (sgd, thor):
        for number in range(3 * MEASURED_INTERVAL):
            one.step(*batches[number % len(batches)])
    found = {"SGD": one_step(sgd, batches[0])}
    for _ in range(MEASURED_INTERVAL):
        kind = "THOR, refresh step" if thor.is_due() else "THOR, plain step"
        found[kind] = one_step(thor, batches[0])
    return found


def one_step(one: Runner, batch: Batch) -> Timeline:
    """Profile one step.

    Args:
        one: takes the step.
        batch: for it.
    """
    device = batch[0].device
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    synchronise(device)
    with profile(activities=activities) as profiler:
        with record_function("forward and backward"):
            one.backward(*batch)
        with record_function("optimizer"):
            one.optimizer.step()
        synchronise(device)
    one.optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return timeline(json.loads(file.read_text(encoding="utf-8"))["traceEvents"])


def timeline(events: Iterable[Mapping[str, Any]]) -> Timeline:
    """Arrange the events of a trace of one step.

    Args:
        events: of the trace, in microseconds.
    """
    events = list(events)
    phases = {
        event["name"]: (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in PHASES
    }
    first = min(start for start, _ in phases.values())

    def phase_at(time: float) -> str | None:
        return next((name for name, (start, stop) in phases.items() if start <= time <= stop), None)

    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    device: dict[str, Spans] = {name: [] for name in PHASES}
    for event in events:
        name = None
        if event.get("cat") in KERNELS:
            name = phase_at(launched.get(event["args"].get("correlation"), -1.0))
        if name is not None:
            device[name].append(((event["ts"] - first) / 1e3, event["dur"] / 1e3))
    host = {name: [((start - first) / 1e3, (stop - start) / 1e3)] for name, (start, stop) in phases.items()}
    return Timeline(host, {name: joined(spans) for name, spans in device.items()})


def joined(spans: Spans) -> Spans:
    """Spans in order, those together between which there is less than ``SHORTEST_GAP``.

    >>> joined([(2.0, 1.0), (0.0, 1.0), (1.01, 0.5)])
    [(0.0, 1.51), (2.0, 1.0)]
    """
    found: Spans = []
    for start, length in sorted(spans):
        if found and start - sum(found[-1]) < SHORTEST_GAP:
            found[-1] = found[-1][0], max(length + start - found[-1][0], found[-1][1])
        else:
            found.append((start, length))
    return found


def draw(timelines: Mapping[str, Timeline], words: str, path: Path) -> None:
    """Draw the timelines under each other.

    Args:
        timelines: by kind of step.
        words: description of the network.
        path: of the picture.
    """
    figure, ((axes,),) = subplots(1, 1, figsize=(10, 1 + 0.8 * len(timelines)))
    rows, labels = [], []
    for number, (kind, one) in enumerate(timelines.items()):
        for lane, (who, phases) in enumerate((("host", one.host), ("device", one.device))):
            rows.append(-(2.4 * number + lane))
            labels.append(f"{kind}: {who}" if not lane else who)
            for name, spans in phases.items():
                axes.broken_barh(spans, (rows[-1] - 0.4, 0.8), color=PHASES[name])
    axes.set_yticks(rows, labels)
    axes.set_xlim(0, max(one.end for one in timelines.values()))
    axes.set_xlabel("milliseconds, with the profiler's own cost")
    from matplotlib.patches import Patch

    axes.legend(handles=[Patch(color=color, label=name) for name, color in PHASES.items()], loc="upper right")
    save(figure, path, f"What keeps host and device busy in one step: {words}")
