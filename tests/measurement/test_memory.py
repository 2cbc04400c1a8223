"""Check of the available memory."""

from __future__ import annotations

import pytest
import torch

from knowiso_train.disentangle._closed_form_fit import ClosedFormFitter
from knowiso_train.disentangle.config import DisentangleConfig, MemoryEstimate
from knowiso_train.errors import CapacityError
from knowiso_train.measurement._pair import check_capacity

MIB = 2**20


def test_eighty_percent_of_the_free_memory_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knowiso_train.measurement._pair.free_bytes", lambda device: 100 * MIB)
    cpu = torch.device("cpu")
    # All pairs stream at the same time; they are solved one after the other
    fitting = {"a": MemoryEstimate(8, 20 * MIB, 39 * MIB), "b": MemoryEstimate(8, 20 * MIB, 10 * MIB)}
    check_capacity(fitting, cpu)
    too_large = fitting | {"c": MemoryEstimate(72, 2 * MIB, 0)}
    with pytest.raises(CapacityError, match=r"3 layer pair.*81 MiB on cpu, but 80 MiB can be used; the largest is a"):
        check_capacity(too_large, cpu)


def test_estimate_of_the_closed_form_is_the_size_of_its_moments() -> None:
    config = DisentangleConfig(order=0, kernel_size=3)
    estimate = ClosedFormFitter.estimate_memory(config, 16, 24, 2, expected_rows=1000)
    features = 16 * 9
    assert estimate.num_features == features
    assert estimate.streaming == 2 * 8 * features * (features + 2 * 24)
    projected = DisentangleConfig(order=0, kernel_size=3, source_channels=4)
    assert ClosedFormFitter.estimate_memory(projected, 16, 24, 2, 1000).num_features == 4 * 9


def test_sample_of_higher_orders_is_bounded_by_max_rows() -> None:
    estimates = [
        ClosedFormFitter.estimate_memory(DisentangleConfig(order=1, kernel_size=1, max_rows=500), 16, 24, 1, rows)
        for rows in (100, 500, 10_000, None)
    ]
    streaming = [estimate.streaming for estimate in estimates]
    assert streaming[0] < streaming[1] == streaming[2] == streaming[3]
