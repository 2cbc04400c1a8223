"""Known answers from sources with channels that are active in a few images only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from knowiso_train import Disentangler

NOISE_SHARE = 0.2
TRAINING = {"rows_seen": 60_000}
SEEDS = range(3)


def features(num_dead: int, seed: int = 0, images: int = 700) -> tuple[Tensor, Tensor]:
    """Return a source whose last channels are active in every hundredth image, and a target of the live channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 6 + num_dead, 4, 4, generator=generator)
    x[:, 6:] *= 0.03 * (torch.arange(images) % 100 == 0)[:, None, None, None]
    hidden = torch.relu(torch.einsum("dc,nchw->ndhw", torch.randn(12, 6, generator=generator), x[:, :6]) - 0.5)
    signal = torch.einsum("dc,nchw->ndhw", torch.randn(5, 12, generator=generator), hidden)
    noise = torch.randn(signal.shape, generator=generator)
    return x, signal + noise * (NOISE_SHARE / (1 - NOISE_SHARE) * signal.var()).sqrt()


def held_out_residual(x: Tensor, y: Tensor, seed: int, kernel_size: int) -> Tensor:
    """Fit order 1 to 500 images and return the residual of the others relative to the variance of the target."""
    maps = Disentangler(order=1, kernel_size=kernel_size, hidden=48, seed=seed, solver_options=TRAINING).fit(
        x[:500], y[:500]
    )
    residual = maps.split(x[500:], y[500:])[1]
    return (residual - residual.mean((0, 2, 3), keepdim=True)).square().mean((1, 2, 3)) / y.var((0, 2, 3)).mean()


@pytest.mark.parametrize(("kernel_size", "estimation_error"), [(1, 0.05), (3, 0.1)])
def test_nearly_dead_channels_change_no_figure(kernel_size: int, estimation_error: float) -> None:
    x, y = features(num_dead=12)
    residuals = [held_out_residual(x, y, seed, kernel_size) for seed in SEEDS]
    shares = torch.stack(residuals).mean(1)
    without = held_out_residual(x[:, :6], y, 0, kernel_size).mean()
    assert float(shares.max() - shares.min()) < 0.01
    assert float((shares - without).abs().max()) < 0.02
    assert NOISE_SHARE - 0.01 < float(shares.max()) < NOISE_SHARE + estimation_error
    # No image holds more of the residual than a few of the 200 images would
    assert max(float(r.max() / r.sum()) for r in residuals) < 0.02
