"""What benchmarks measure with: clocks, quantiles, and the most memory that was allocated at one time."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import profile

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def peak_allocated_bytes(watched: profile) -> int:
    """The most that was allocated at one time under a profiler, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    most = now = 0
    for change in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        now += change["args"]["Bytes"]
        most = max(most, now)
    return most
