"""Shared by all tests: fixed seeds, two threads at most, the example namespace, and the marker for real data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # zoo.py: real networks and images, shared with the benchmarks

import zoo  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("data") and not (zoo.DATA / "README.md").exists():
            item.add_marker(pytest.mark.skip(reason=f"real data not found at {zoo.DATA}; set KNOWISO_DATA"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
