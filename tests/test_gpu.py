"""CPU = GPU, where a GPU is at hand."""

from __future__ import annotations

import pytest
import torch
from test_measure import network
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import measure
from knowiso_train.statistics import StreamingMoments

pytestmark = pytest.mark.gpu


def test_moments_on_the_gpu_equal_those_on_the_cpu_also_with_tf32_allowed() -> None:
    x, y = torch.randn(40, 6, 9, 7) + 3, torch.randn(40, 4, 9, 7)
    here, there = StreamingMoments(6, 4, 3), StreamingMoments(6, 4, 3, "cuda")
    here.update(x, y)
    torch.set_float32_matmul_precision("high")
    try:
        there.update(x.cuda(), y.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-3)


def test_measure_on_the_gpu_equals_measure_on_the_cpu_and_brings_the_networks_back() -> None:
    loader = DataLoader(TensorDataset(torch.randn(160, 3, 8, 8)), batch_size=40)
    a, b = network(1), network(2)
    reports = [measure(a, b, loader, ["0", "4"], order=1, device=d, progress=False, solver_options={"epochs": 5}) for d in ("cpu", "cuda")]
    assert next(a.parameters()).device.type == "cpu"
    for one, other in zip(*reports, strict=True):
        assert one.shares[0] == pytest.approx(other.shares[0], abs=1e-4)
        assert one.unexplained == pytest.approx(other.unexplained, abs=0.02)  # order 1 is trained: same recipe, other rounding
