"""Sequences are compared along their length, also where their lengths are squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import knowiso_train as ki
from knowiso_train.errors import LayoutError

CHANNELS = 4


class Signals(nn.Module):
    """Network whose layer outputs a sequence (N, C, L) that a function computes from its input."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Conv1d(CHANNELS, CHANNELS, 1, bias=False)
        self.layer.weight.data = torch.eye(CHANNELS)[:, :, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.function(x))  # type: ignore[operator]


def signals(images: int, length: int) -> Tensor:
    """Return sequences of neighbors that are correlated."""
    noise = torch.randn(images, CHANNELS, length + 4, generator=torch.Generator().manual_seed(0))
    return F.avg_pool1d(noise, 5, stride=1) * 5**0.5


def pooled_with_noise(x: Tensor) -> Tensor:
    """Return the mean of every four steps, with noise that follows from the input."""
    return F.avg_pool1d(x, 4) + 0.1 * torch.sin(1000 * x[:, :, ::4])


def unexplained_of_regression(x: Tensor, y: Tensor) -> float:
    """Return the unexplained share of a regression with intercept over all positions."""
    rows, targets = (t.movedim(1, 2).flatten(0, 1).double().numpy() for t in (x, y))
    rows = np.c_[rows, np.ones(len(rows))]
    residual = targets - rows @ np.linalg.lstsq(rows, targets, rcond=None)[0]
    return float((residual**2).sum() / ((targets - targets.mean(0)) ** 2).sum())


@pytest.mark.parametrize(("length", "shorter"), [(400, 100), (404, 101), (144, 36)])
def test_a_longer_sequence_is_pooled_along_its_length(length: int, shorter: int) -> None:
    x = signals(96, length)
    source, target = Signals(lambda x: x), Signals(pooled_with_noise)
    report = ki.measure(source, target, [x], "layer", order=0, noise_floor=False, bootstrap=0, progress=False)
    expected = unexplained_of_regression(F.avg_pool1d(x, 4), pooled_with_noise(x))
    assert expected < 0.05
    assert report.pairs[0].target_grid == (1, shorter)
    assert report.pairs[0].unexplained == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("length", [400, 404])
def test_the_loss_of_sequences_is_that_of_a_regression_along_their_length(length: int) -> None:
    x = signals(96, length)
    source, target = Signals(lambda x: x), Signals(pooled_with_noise)
    expected = unexplained_of_regression(F.avg_pool1d(x, 4), pooled_with_noise(x))
    with ki.IsomorphismLoss(source, target, "layer", scale="linear", weight=1, ridge=1e-3, example=x[:4]) as iso:
        for _ in range(30):
            source(x)
            loss = iso()
    assert float(loss) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("length", [100, 101])
def test_a_kernel_of_three_steps_explains_a_shift_of_one_step(length: int) -> None:
    x = signals(96, length)
    source, target = Signals(lambda x: x), Signals(lambda x: x.roll(1, 2))
    report = ki.measure(
        source, target, [x], "layer", order=0, kernel_size=3, noise_floor=False, bootstrap=0, progress=False
    )
    # The first step alone has no predecessor
    assert report.pairs[0].unexplained < 0.02


def test_a_line_and_a_feature_map_raise() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(CHANNELS, CHANNELS, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.unflatten(2, (10, 10)))  # type: ignore[no-any-return]

    x = signals(64, 100)
    networks = Signals(lambda x: x), Maps()
    for pair in (networks, networks[::-1]):
        with pytest.raises(LayoutError, match=r"tokens form no grid.*10 × 10"):
            ki.measure(*pair, [x], "layer", order=0, bootstrap=0, progress=False)
    layouts = {"layer": "ncl:10x10"}
    with pytest.raises(LayoutError, match=r"4 axes|needs 3 axes"):
        ki.measure(*networks, [x], "layer", order=0, bootstrap=0, progress=False, layout=layouts)
