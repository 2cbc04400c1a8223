"""Clocks, quantiles and peak memory for the benchmarks."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import profile

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def quantile(values: list[float], q: float) -> float:
    """Compute a quantile of a list of numbers."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def peak_allocated_bytes(profiler: profile) -> int:
    """Compute the largest amount of memory that was allocated at one time under a profiler, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    peak = allocated = 0
    for change in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        allocated += change["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak
