"""The paper's disentangler and its training recipe as published, the baseline of `bench_fit.py`.

It shares no code with the library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class PublishedDisentangler(nn.Module):
    """Disentangler of arXiv 1908.01581, eq. 2-4.

    It has K + 1 bias-free 3×3 convolutions, K scalars p, and a per-sample σ without gradient.
    """

    def __init__(self, channels: int, order: int = 2, kernel_size: int = 3) -> None:
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False) for _ in range(order + 1)
        )
        self.q = nn.Parameter(torch.zeros(order))

    @staticmethod
    def normalize(h: Tensor) -> Tensor:
        """Divide by the standard deviation over positions, without gradient."""
        return h / (h.detach().flatten(2).std(-1)[:, :, None, None] + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        h = self.maps[0](x)
        for q, linear in zip(self.q, list(self.maps)[1:], strict=True):
            h = linear(x + torch.sigmoid(q) * torch.relu(self.normalize(h)))
        return h


@torch.no_grad()
def held_out_unexplained(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Compute Var(residual) / Var(target): means per channel, variances averaged over channels, as published."""
    residual = torch.cat([yb - net(xb) for xb, yb in zip(x.split(200), y.split(200), strict=True)])
    return float(residual.var((0, 2, 3)).sum() / y.var((0, 2, 3)).sum())


def train_epochs(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int = 1000,
    batch_size: int = 64,
    penalty: float = 0.1,
    seed: int = 0,
) -> Iterator[int]:
    """Train with the published recipe; yield after every epoch.

    The recipe is Adam with coupled weight decay 1e-4, learning rate 1e-4 → 1e-6 (logarithmic), batch size 64.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, weight_decay=1e-4)
    for epoch, lr in enumerate(torch.logspace(math.log10(1e-4), math.log10(1e-6), epochs).tolist()):
        optimizer.param_groups[0]["lr"] = lr
        for batch in torch.randperm(len(x), generator=generator).split(batch_size):
            loss = (y[batch] - net(x[batch])).square().mean() + penalty * torch.sigmoid(net.q).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield epoch
