"""Small networks of the distillation tests."""

from __future__ import annotations

import torch
from torch import nn


def network(seed: int, width: int = 10, grid_stride: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, grid_stride, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def built(seed: int, width: int = 10, grid_stride: int = 1) -> nn.Sequential:
    model = network(seed, width, grid_stride)
    model(torch.zeros(1, 3, 8, 8))
    return model
