"""Moments against NumPy, streamed and merged, and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from knowiso_train.errors import NonFiniteError, ShapeError
from knowiso_train.ops import conv_weight, patch_rows
from knowiso_train.regression import Moments, StreamingMoments, batch_moments
from knowiso_train.regression.explained_variance import ResidualStatistics

FIELDS = ("count", "mean_x", "mean_y", "xx", "xy", "yy")


def features(n: int = 12, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, 5, 4, dtype=dtype) + 7, torch.randn(n, 2, 5, 4, dtype=dtype) - 3


def assert_same(a: Moments, b: Moments, tolerance: float = 1e-10) -> None:
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(a, name).double(),
            getattr(b, name).double(),
            rtol=tolerance,
            atol=tolerance * 100,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_batch_moments_equal_numpy(kernel_size: int) -> None:
    x, y = features()
    m = batch_moments(x, y, kernel_size)
    pad = kernel_size // 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    rows = np.array(
        [
            padded[n, :, i : i + kernel_size, j : j + kernel_size].transpose(1, 2, 0).ravel()
            for n in range(12)
            for i in range(5)
            for j in range(4)
        ]
    )
    targets = y.numpy().transpose(0, 2, 3, 1).reshape(-1, 2)
    both = np.cov(np.concatenate([rows, targets], 1).T, bias=True) * len(rows)
    d = rows.shape[1]
    np.testing.assert_allclose(m.xx, both[:d, :d], atol=1e-8)
    np.testing.assert_allclose(m.xy, both[:d, d:], atol=1e-8)
    np.testing.assert_allclose(m.yy, np.diag(both)[d:], atol=1e-8)
    np.testing.assert_allclose(m.mean_x, rows.mean(0))


def test_patch_rows_times_weight_equal_a_convolution() -> None:
    x, weight = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)
    rows = patch_rows(x, 3) @ weight.permute(2, 3, 1, 0).reshape(27, 4)
    expected = torch.nn.functional.conv2d(x, weight, padding=1).permute(0, 2, 3, 1).reshape(-1, 4)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(conv_weight(weight.permute(2, 3, 1, 0).reshape(27, 4), 3), weight)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_streaming_equals_whole_batch_and_merged_halves_equal_the_whole(kernel_size: int) -> None:
    x, y = features()
    whole = batch_moments(x, y, kernel_size)
    stream, other = StreamingMoments(3, 2, kernel_size), StreamingMoments(3, 2, kernel_size)
    for start in (0, 1, 6):
        stream.update(x[start : {0: 1, 1: 6, 6: 9}[start]], y[start : {0: 1, 1: 6, 6: 9}[start]])
    other.update(x[9:], y[9:])
    assert_same(stream.value.merged(other.value), whole)


def test_moments_of_no_samples_change_nothing_in_a_merge() -> None:
    x, y = features()
    whole, empty = batch_moments(x, y), Moments.zeros(3, 2)
    assert_same(whole.merged(empty), whole)
    assert_same(empty.merged(whole), whole)
    assert_same(empty.merged(empty), empty)


def test_small_variance_on_a_large_mean_survives_float32() -> None:
    x = (torch.randn(64, 1, 8, 8, dtype=torch.float64) * 1e-2 + 100).float()
    stream = StreamingMoments(1, 1)
    for part in x.split(8):
        stream.update(part, part)
    expected = x.double().var(correction=0) * x.numel()
    torch.testing.assert_close(stream.value.xx[0, 0], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_positions_select_rows(k: int) -> None:
    x, y = (feature.requires_grad_() for feature in features(4))
    positions = torch.tensor([[0, 7], [3, 19], [1, 2], [5, 6]])

    def chosen(feature: Tensor, k: int) -> Tensor:
        return torch.cat([rows[p] for rows, p in zip(patch_rows(feature, k).chunk(4), positions, strict=True)])

    assert torch.equal(patch_rows(x, k, positions), chosen(x, k))
    upstream = torch.randn(8, 3 * k * k, dtype=x.dtype)
    by_index, by_rows = (torch.autograd.grad(rows, x, upstream) for rows in (patch_rows(x, k, positions), chosen(x, k)))
    torch.testing.assert_close(by_index, by_rows)
    expected = batch_moments(chosen(x, k)[:, :, None, None], chosen(y, 1)[:, :, None, None])
    assert_same(batch_moments(x, y, k, positions), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_full(dtype: torch.dtype) -> None:
    x, y = (f.to(dtype) for f in features(dtype=torch.float32))
    assert_same(batch_moments(x, y, 3), batch_moments(x.float(), y.float(), 3), 1e-6)


def test_autocast_does_not_change_the_products() -> None:
    x, y = features(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = batch_moments(x, y)
    assert_same(inside, batch_moments(x, y), 1e-6)


def test_gradients() -> None:
    x, y = (
        torch.randn(3, 2, 3, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 2, 3, 2, dtype=torch.float64, requires_grad=True),
    )

    def of(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        m = batch_moments(a, b, 3)
        return m.mean_x, m.mean_y, m.xx, m.xy, m.yy

    assert torch.autograd.gradcheck(of, (x, y))


def test_non_finite_features_raise_and_leave_the_moments_unchanged() -> None:
    x, y = features()
    stream = StreamingMoments(3, 2)
    stream.update(x, y)
    before = stream.value
    bad = x.clone()
    bad[3, 1, 2, 2] = float("nan")
    with pytest.raises(NonFiniteError):
        stream.update(bad, y)
    assert stream.value is before


def test_shapes_that_do_not_fit_raise() -> None:
    x, y = features()
    with pytest.raises(ShapeError, match="same N, H, W"):
        batch_moments(x, y[:, :, :4])
    with pytest.raises(ShapeError, match=r"expected source and target channels \(3, 2\), got \(2, 3\)"):
        StreamingMoments(3, 2).update(y, x)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_patches_of_few_channels(channels: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(6, channels, 5, 4, dtype=dtype) + 2, torch.randn(6, 2, 5, 4, dtype=dtype)
    rows = patch_rows(x.double(), 3), y.double().permute(0, 2, 3, 1).reshape(-1, 2)
    m, exact = batch_moments(x, y, 3), batch_moments(*(part[:, :, None, None] for part in rows))
    torch.testing.assert_close(m.xx.double(), exact.xx, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(m.xy.double(), exact.xy, rtol=1e-4, atol=1e-3)


def test_a_target_that_is_constant_on_the_report_images_has_the_share_of_order_0() -> None:
    for seed in range(40):
        value, count = torch.rand(3, generator=torch.Generator().manual_seed(seed)).double(), 7 + seed
        statistics = ResidualStatistics(1, center=value + 0.3, bootstrap=20, seed=0)
        target = value.view(1, 3, 1, 1).expand(count, 3, 2, 2)
        statistics.update(target, [target + 0.1 * torch.randn(count, 3, 2, 2).double()], np.arange(count))
        estimate = statistics.estimate()
        assert estimate.unexplained == (0.0,)
        assert estimate.shares == (1.0,)
        assert estimate.interval == (0.0, 0.0)
