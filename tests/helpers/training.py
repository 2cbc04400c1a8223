"""Small training loop with a callback, for tests of callbacks."""

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
SHARES = ["iso/val/2-to-2/share", "iso/val/5-to-5/share"]


def network(seed: int, width: int = 6) -> nn.Sequential:
    """Build a network that an extra forward pass disturbs: batch norm, dropout, an in-place activation."""
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
    """Return a loader of random images."""
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
    callback: Callable[[], Any] | None = None,
    position: str = "end",
) -> dict[str, Tensor]:
    """Train the student and return its weights, the loss's state, the momenta and the random state.

    Args:
        student: Network in training.
        teacher: Frozen network.
        steps: Number of steps.
        start: Index of the first step, which seeds its batch.
        taught: Add the isomorphism loss.
        callback: Function to call in every step. Default: none.
        position: "end" of the step, or "middle": between the student's forward pass and the loss.
    """
    iso = IsomorphismLoss(student, teacher, LAYERS, weight="balanced", refresh=2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    student.train()
    torch.manual_seed(99)
    with iso:
        for step in range(start, start + steps):
            x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            loss = F.cross_entropy(student(x), torch.arange(16) % 4)
            if callback and position == "middle":
                callback()
            if taught:
                loss = loss + iso()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if callback and position == "end":
                callback()
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    state = {
        **student.state_dict(),
        **{f"iso.{name}": value for name, value in iso.state_dict().items()},
        "rng": torch.get_rng_state(),
    }
    return state | {f"momentum.{i}": value for i, value in enumerate(momentum)}


def count_hooks(*models: nn.Module) -> int:
    """Count the hooks that the library has registered."""
    tables = [
        table
        for model in models
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]
    return sum(isinstance(hook, DetachedOnCopyHook) for table in tables for hook in table.values())
