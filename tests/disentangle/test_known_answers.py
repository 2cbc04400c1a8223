"""Shares of targets made from the source by a known map, which are known."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from knowiso_train import Report, measure
from knowiso_train.disentangle import Disentangler


class ChannelSlice(nn.Module):
    """Network that returns part of its input's channels, so that its features are known."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.part = part
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, self.part])


def report_on(x: Tensor, y: Tensor, **options: Any) -> Report:
    """Measure planted features through the whole instrument."""
    options = {"solver_options": {"rows_seen": 150_000}} | options if options.get("order", 2) else options
    joined, c = torch.cat([x, y], 1), x.shape[1]
    loader = DataLoader(TensorDataset(joined), batch_size=50)
    return measure(
        ChannelSlice(slice(0, c)),
        ChannelSlice(slice(c, None)),
        loader,
        "layer",
        layout="nchw",
        progress=False,
        **options,
    )


def source(n: int = 300, channels: int = 6, grid: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.einsum(
        "dc,nchw->ndhw", mix, torch.randn(n, channels, grid, grid, generator=generator, dtype=torch.float64)
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_permuted_and_orthogonally_mixed_sources_are_fully_explained(seed: int, kernel_size: int) -> None:
    x = source(seed=seed)
    for mix in (
        torch.eye(6, dtype=torch.float64)[torch.randperm(6)],
        torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0],
    ):
        pair = report_on(x, torch.einsum("dc,nchw->ndhw", mix, x), order=0, kernel_size=kernel_size, seed=seed).pairs[0]
        assert pair.shares[0] == pytest.approx(1, abs=1e-9)  # float64
        assert pair.unexplained < 1e-9


def test_float32_features_lose_no_more_than_their_rounding() -> None:
    x = source().float()
    mix = torch.linalg.qr(torch.randn(6, 6))[0]
    assert report_on(x, torch.einsum("dc,nchw->ndhw", mix, x), order=0).pairs[0].unexplained < 1e-9


@pytest.mark.parametrize("noise_share", [0.1, 0.5, 0.9])
def test_independent_noise_stays_unexplained_in_its_share(noise_share: float) -> None:
    x = source(n=600)
    signal = torch.einsum("dc,nchw->ndhw", torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0], x)
    noise = torch.randn_like(signal) * (noise_share / (1 - noise_share) * signal.var()).sqrt()
    pair = report_on(x, signal + noise, order=0).pairs[0]
    # 120 images, 25 positions, 6 channels: three standard errors
    assert pair.unexplained == pytest.approx(noise_share, abs=0.02)
    assert pair.interval[0] - 0.01 < noise_share < pair.interval[1] + 0.01


def test_a_hidden_layer_is_found_at_order_one() -> None:
    x = torch.randn(2000, 8, 3, 3)
    y = torch.einsum(
        "dc,nchw->ndhw", torch.randn(8, 8), torch.relu(torch.einsum("dc,nchw->ndhw", torch.randn(8, 8), x) - 0.3)
    )
    pair = report_on(x, y, order=1, hidden=16).pairs[0]
    assert pair.shares[1] > 0.1  # order 0 cannot
    assert pair.unexplained < 0.05
    assert sum(pair.shares) + pair.unexplained == pytest.approx(1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_unrelated_source_explains_no_more_than_the_noise_floor(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(400, c, 4, 4, generator=generator) for c in (12, 5))
    pair = report_on(x, y, order=1, seed=seed).pairs[0]
    assert pair.noise_floor is not None
    low, high = (1 - u for u in reversed(pair.interval))
    assert low - 0.01 <= pair.noise_floor <= high + 0.01
    assert abs(pair.explained) < 0.02


def test_noise_floor_sees_what_depends_on_the_position_alone() -> None:
    x = torch.randn(300, 4, 4, 4)
    ramp = torch.linspace(-2, 2, 4).view(1, 1, 4, 1)
    x[:, :1] += 3 * ramp
    y = ramp.expand(300, 2, 4, 4) + 0.1 * torch.randn(300, 2, 4, 4)
    pair = report_on(x, y, order=0).pairs[0]
    assert pair.noise_floor == pytest.approx(pair.explained, abs=0.02)
    assert pair.explained > 0.8


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_without_ridge_components_are_orthogonal_on_the_fitting_data(order: int, kernel_size: int) -> None:
    x = source(n=120, channels=4)
    y = torch.tanh(torch.einsum("dc,nchw->ndhw", torch.randn(3, 4, dtype=torch.float64), x)) + 0.1 * torch.randn(
        120, 3, 5, 5, dtype=torch.float64
    )
    maps = Disentangler(order=order, kernel_size=kernel_size, ridge=0.0, hidden=5, solver_options={"epochs": 5}).fit(
        x, y, select=0
    )
    components, residual = maps.split(x, y)
    rows = [part.transpose(0, 1).flatten(1) for part in (*components, residual)]
    rows = [part - part.mean(1, keepdim=True) for part in rows]
    total = float(y.var((0, 2, 3), correction=0).sum())
    for i in range(len(rows)):
        for j in range(i):
            assert float((rows[i] * rows[j]).mean(1).abs().sum()) < 1e-8 * total
    assert sum(float(part.square().mean(1).sum()) for part in rows) == pytest.approx(total, rel=1e-8)
    torch.testing.assert_close(torch.stack([*components, residual]).sum(0), y)


@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0])
def test_at_any_ridge_more_orders_leave_no_more_on_the_fitting_data(ridge: float) -> None:
    x = source(n=100, channels=4)
    y = torch.relu(torch.einsum("dc,nchw->ndhw", torch.randn(3, 4, dtype=torch.float64), x))
    components, _ = (
        Disentangler(order=2, ridge=ridge, hidden=6, solver_options={"epochs": 5}).fit(x, y, select=0).split(x, y)
    )
    left, energies = y, [float(y.var((0, 2, 3)).sum())]
    for part in components:
        left = left - part
        energies.append(float(left.var((0, 2, 3)).sum()))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(energies))
    assert energies[1] < energies[0]


def test_directions_differ_if_one_network_has_more_information() -> None:
    x = source(n=300, channels=6)
    both = report_on(x, x[:, :2], order=0, directions="both")
    assert both.forward[0].unexplained < 1e-9  # all of the few channels is in the many
    assert both.backward[0].unexplained > 0.1


def test_a_source_without_variance_and_a_target_without_variance() -> None:
    x, y = source(n=100), source(n=100, seed=1)
    with pytest.warns(UserWarning, match="without variance"):
        nothing = report_on(torch.ones_like(x), y, order=1).pairs[0]
    assert nothing.unexplained == pytest.approx(1, abs=0.01)
    # 0.1 and 1 / 3 have moments of rounding errors
    for constant in (1.0, 0.1, 1 / 3):
        with pytest.warns(UserWarning, match="6 of 6 target channel.*the shares have no meaning"):
            trivial = report_on(x, torch.full_like(y, constant), order=1).pairs[0]
        assert trivial.shares[0] == pytest.approx(1)
        assert trivial.unexplained == pytest.approx(0, abs=1e-9)
    dead = x.clone()
    dead[:, 2] = 4.0
    with pytest.warns(UserWarning, match=r"1 source channel\(s\) without variance"):
        assert report_on(dead, dead[:, :2], order=0).pairs[0].unexplained < 1e-9


def test_fewer_rows_than_channels_is_defined_and_warned_of() -> None:
    x, y = torch.randn(100, 64, 1, 1), torch.randn(100, 5, 1, 1)
    with pytest.warns(UserWarning, match="rows for 64 features"):
        pair = report_on(x, y, order=1).pairs[0]
    assert torch.isfinite(torch.tensor([*pair.shares, pair.unexplained, *pair.interval])).all()
    assert pair.unexplained > 0.5
