"""Fixtures of all tests: fixed seeds, one thread per process, and skips for missing data or GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, also for child processes
# Run on the CPU, where results are reproducible. Tests of other devices remove this.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import pytest
import torch

from benchmarks.common import models
from tests.helpers import fake_device  # noqa: F401  # registers the fake device before anything else uses torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _reset_accelerator() -> Iterator[None]:
    """Reset accelerate's process-wide state, which includes the precision."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=100, help="inputs of the fuzz tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("data") and not (models.DATA / "README.md").exists():
            item.add_marker(pytest.mark.skip(reason=f"real data not found at {models.DATA}; set KNOWISO_DATA"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
