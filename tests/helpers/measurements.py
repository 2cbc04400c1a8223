"""Measurement of two small networks with few images, and its figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from knowiso_train import Report, measure


def network(seed: int, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2),
        nn.ReLU(),
    )


def run(loader: Any, **options: Any) -> Report:
    defaults: dict[str, Any] = {"order": 0, "progress": False, "bootstrap": 100, "split": (0.5, 0.2, 0.3)}
    return measure(network(1), network(2), loader, ["0", "4"], **defaults | options)


def figures(report: Report) -> list[tuple[float, ...]]:
    return [(*pair.shares, pair.unexplained, *pair.interval, pair.noise_floor or 0.0) for pair in report.pairs]


def assert_close(a: Report, b: Report, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(figures(a), figures(b), atol=tolerance)
