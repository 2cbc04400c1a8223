"""A small training that can be watched, for the tests of callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import IsomorphismLoss
from knowiso_train.features.hooks import DetachedOnCopyHook

LAYERS = {"2": "2", "5": "5"}
SHARES = ["iso/val/2→2/share", "iso/val/5→5/share"]


def network(seed: int, width: int = 6) -> nn.Sequential:
    """With everything that a forward could disturb: batch norm, dropout, an in-place activation."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Conv2d(width, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


def held_out(count: int = 90) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(7))), batch_size=30
    )


def train(
    student: nn.Module,
    teacher: nn.Module,
    steps: int,
    *,
    start: int = 0,
    taught: bool = True,
    watch: Callable[[], Any] | None = None,
    at: str = "end",
) -> dict[str, Tensor]:
    """Everything that training leaves behind. `watch` is called at the end of each step, or between the student's forward and iso()."""
    iso = IsomorphismLoss(student, teacher, LAYERS, weight="balanced", refresh=2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    student.train()
    torch.manual_seed(99)
    with iso:
        for step in range(start, start + steps):
            x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            loss = F.cross_entropy(student(x), torch.arange(16) % 4)
            if watch and at == "middle":
                watch()
            if taught:
                loss = loss + iso()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if watch and at == "end":
                watch()
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    left = {
        **student.state_dict(),
        **{f"iso.{name}": value for name, value in iso.state_dict().items()},
        "rng": torch.get_rng_state(),
    }
    return left | {f"momentum.{i}": value for i, value in enumerate(momentum)}


def own_hooks(*models: nn.Module) -> int:
    tables = [
        table
        for model in models
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]
    return sum(isinstance(hook, DetachedOnCopyHook) for table in tables for hook in table.values())
