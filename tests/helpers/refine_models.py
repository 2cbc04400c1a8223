"""Networks with a known overlap: a signal that all of them share, and private noise of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIGNAL, NOISE, NETWORKS = 3, 9, 4
WIDTH = SIGNAL + NOISE


def images(
    count: int, classes: int = 3, *, seed: int = 0, separation: float = 1.5, noise: float = 0.75
) -> tuple[Tensor, Tensor]:
    """Return images (count, SIGNAL + NETWORKS * NOISE, 1, 1) and labels, with class centers on the axes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    signal = separation * nn.functional.one_hot(labels, SIGNAL).float() + 0.5 * torch.randn(
        count, SIGNAL, generator=generator
    )
    private = noise * torch.randn(count, NETWORKS * NOISE, generator=generator)
    return torch.cat([signal, private], 1)[:, :, None, None], labels


class SignalNet(nn.Module):
    """A classifier on an invertible mixture of the signal and one network's noise, with timm's layer names."""

    def __init__(self, which: int, classes: int = 3, *, has_signal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(100 + which)
        self.trunk = nn.Conv2d(SIGNAL + NETWORKS * NOISE, WIDTH, 1, bias=False)
        self.global_pool = nn.Flatten()
        self.fc = nn.Linear(WIDTH, classes)
        projection = torch.zeros(WIDTH, SIGNAL + NETWORKS * NOISE)
        projection[:SIGNAL, :SIGNAL] = torch.eye(SIGNAL) * has_signal
        start = SIGNAL + which * NOISE
        projection[SIGNAL:, start : start + NOISE] = torch.eye(NOISE)
        self.mixing = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
        with torch.no_grad():
            self.trunk.weight.copy_((self.mixing @ projection)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.global_pool(self.trunk(x)))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def features(self, x: Tensor) -> Tensor:
        return self.global_pool(self.trunk(x)).detach()


def with_best_classifier(
    model: SignalNet, x: Tensor, y: Tensor, *, logit_scale: float, order: tuple[int, ...] = (0, 1, 2)
) -> SignalNet:
    """Set the least-squares classifier of some images, with classes in an order and logits scaled."""
    features = model.features(x)
    best = torch.linalg.lstsq(
        torch.cat([features, torch.ones(len(x), 1)], 1), nn.functional.one_hot(y, 3).float()[:, order]
    ).solution
    with torch.no_grad():
        model.fc.weight.copy_(logit_scale * best[:-1].T)
        model.fc.bias.copy_(logit_scale * best[-1])
    return model


def batches(x: Tensor, y: Tensor | None = None, size: int = 64) -> list[object]:
    """Split images, with labels or without, into batches."""
    return [x[i : i + size] if y is None else (x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
