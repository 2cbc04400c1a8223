"""Memory of the loss over a training."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from knowiso_train import IsomorphismLoss
from tests.helpers.timm_networks import hooks_of


@pytest.fixture
def _collected() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


# Without another loss four images a step leave few directions of six channels
@pytest.mark.filterwarnings("ignore:1. the student's features have collapsed")
@pytest.mark.usefixtures("_collected")
@pytest.mark.parametrize(
    "options", [{}, {"solver": "learned", "order": 1}, {"weight": "balanced"}], ids=["moment", "learned", "balanced"]
)
def test_memory_is_flat_over_hundreds_of_steps(options: dict[str, Any]) -> None:
    def tiny() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, 2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
        )

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        return len(tensors), sum(tensor.numel() for tensor in tensors)

    torch.manual_seed(0)
    student, teacher = tiny(), tiny()
    iso = IsomorphismLoss(student, teacher, "1", example=torch.zeros(1, 3, 9, 9), **options)
    optimizer = torch.optim.SGD([*student.parameters(), *iso.parameters()], lr=0.01)
    with iso:
        for step in range(301):
            optimizer.zero_grad()
            (student(torch.randn(4, 3, 9, 9)).square().mean() + iso()).backward()
            optimizer.step()
            if step == 100:
                early = alive()
        assert alive() == early
    assert hooks_of(student, teacher) == 0
