"""Time and peak memory of `ki.measure` over images, channels, kernel size and layer pairs.

    python -m benchmarks.measure.bench_measure     # 5 minutes on two CPU cores

The baseline stores every feature and calls `torch.linalg.lstsq`. Each case runs in its own process, the two methods in
turn. The networks only slice the input, so the time is that of the measurement. A case that is too large shows the
error.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common.results import record, table
from knowiso_train import KnowisoError, measure

BASE = {"images": 512, "channels": 64, "grid": 14, "kernel_size": 1, "pairs": 1, "order": 0}
CASES = [
    *({**BASE, "images": n} for n in (256, 1024, 4096)),
    *({**BASE, "channels": c, "grid": 7} for c in (16, 256, 1024, 2048)),
    *({**BASE, "kernel_size": 3, "channels": c, "grid": 7} for c in (64, 256, 512)),
    *({**BASE, "pairs": p} for p in (4, 16)),
    *({**BASE, "order": k, "channels": 32} for k in (1, 2)),
]
TOO_LARGE = {**BASE, "kernel_size": 3, "channels": 4096, "grid": 7}


class NoiseImages(Dataset[Tensor]):
    """Correlated noise that is generated on access, so that the data take no memory."""

    def __init__(self, case: dict[str, int]) -> None:
        self.case = case

    def __len__(self) -> int:
        return self.case["images"]

    def __getitem__(self, i: int) -> Tensor:
        c, g = self.case["channels"], self.case["grid"]
        x = torch.randn(2 * c, g, g, generator=torch.Generator().manual_seed(i))
        x[c:] += x[:c]
        return x


class ChannelSlice(nn.Module):
    """Network that returns a slice of the channels through `pairs` layers."""

    def __init__(self, part: slice, pairs: int) -> None:
        super().__init__()
        self.part, self.taps = part, nn.ModuleList(nn.Identity() for _ in range(pairs))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, self.part]
        for tap in self.taps:
            x = tap(x)
        return x


def peak_memory_mib() -> float:
    """Return the peak memory of the process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB


def run_ours(case: dict[str, int]) -> float:
    """Return the unexplained share, measured with the library."""
    c = case["channels"]
    options: dict[str, Any] = {
        "order": case["order"],
        "kernel_size": case["kernel_size"],
        "ridge": 1e-4,
        "noise_floor": False,
        "progress": False,
    }
    source, target = ChannelSlice(slice(0, c), case["pairs"]), ChannelSlice(slice(c, None), case["pairs"])
    return (
        measure(source, target, DataLoader(NoiseImages(case), batch_size=64), "taps.*", **options).pairs[0].unexplained
    )


def run_stored_features(case: dict[str, int]) -> float:
    """Return the unexplained share, from stored features and least squares. Order 0 only."""
    c, k, unexplained = case["channels"], case["kernel_size"], 0.0
    stored: list[list[Tensor]] = [[] for _ in range(2 * case["pairs"])]
    for batch in DataLoader(NoiseImages(case), batch_size=64):
        for pair in range(case["pairs"]):
            stored[2 * pair].append(
                nn.functional.unfold(batch[:, :c], k, padding=k // 2).transpose(1, 2).reshape(-1, c * k * k)
            )
            stored[2 * pair + 1].append(batch[:, c:].permute(0, 2, 3, 1).reshape(-1, c))
    for pair in range(case["pairs"]):
        x, y = torch.cat(stored[2 * pair]), torch.cat(stored[2 * pair + 1])
        fit = int(0.8 * len(x))
        x, y = x - x[:fit].mean(0), y - y[:fit].mean(0)
        w = torch.linalg.lstsq(x[:fit], y[:fit]).solution
        unexplained = float((y[fit:] - x[fit:] @ w).var(0).sum() / y[fit:].var(0).sum())
    return unexplained


def run_case(kind: str, case: dict[str, int]) -> None:
    """Run one case in this process and print its result as JSON."""
    torch.set_num_threads(2)
    before, began = peak_memory_mib(), time.perf_counter()
    try:
        unexplained: float | str = (run_ours if kind == "ours" else run_stored_features)(case)
    except KnowisoError as error:
        unexplained = f"{type(error).__name__}: {error}"
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - began,
                "MiB above start": peak_memory_mib() - before,
                "unexplained": unexplained,
            }
        )
    )


def main() -> None:
    if len(sys.argv) == 3:
        run_case(sys.argv[1], json.loads(sys.argv[2]))
        return
    rows = []
    for case in CASES:
        row: dict[str, Any] = dict(case)
        for kind in ("ours", "store + lstsq"):
            if kind != "ours" and (case["order"] or case["channels"] * case["kernel_size"] ** 2 > 3000):
                row |= {f"{kind}: seconds": "-", f"{kind}: MiB": "-"}
                continue
            process = subprocess.run(
                [sys.executable, "-m", "benchmarks.measure.bench_measure", kind.split()[0], json.dumps(case)],
                capture_output=True,
                text=True,
                check=True,
            )
            result = json.loads(process.stdout.splitlines()[-1])
            row |= {f"{kind}: seconds": result["seconds"], f"{kind}: MiB": result["MiB above start"]}
        rows.append(row)
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure.bench_measure", "ours", json.dumps(TOO_LARGE)],
        capture_output=True,
        text=True,
        check=True,
    )
    refused = json.loads(process.stdout.splitlines()[-1])
    print(TOO_LARGE, "->", refused)
    record("measure", rows, too_large={**TOO_LARGE, **refused})


if __name__ == "__main__":
    main()
