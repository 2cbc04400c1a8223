"""Shared by all tests: fixed seeds, one thread for each process, the example namespace, and the marker for real data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: also for the processes that tests start
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # the same bits on every machine; tests of other devices say so

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # zoo.py: real networks and images, shared with the benchmarks

import pretended  # noqa: E402, F401  # where a device is to be pretended, PyTorch hears of it before anything else
import zoo  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> Iterator[None]:
    """accelerate keeps one state for the process, precision included."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("data") and not (zoo.DATA / "README.md").exists():
            item.add_marker(pytest.mark.skip(reason=f"real data not found at {zoo.DATA}; set KNOWISO_DATA"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
