"""Bounded samples, hashes, and residual statistics with bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from knowiso_train.disentangle._closed_form import ClosedFormMaps, predict_component
from knowiso_train.disentangle._readouts import columns_by_feature, order_moments
from knowiso_train.regression import FeatureSample, ResidualStatistics, batch_moments, sample_positions
from knowiso_train.regression.explained_variance import poisson_weights
from knowiso_train.utils.hashing import Stream, hash_unit


def offered(sample: FeatureSample, x: torch.Tensor, y: torch.Tensor, order: np.ndarray, step: int = 7) -> None:
    for start in range(0, len(order), step):
        ids = order[start : start + step]
        sample.add(x[ids], y[ids], ids.astype(np.int64))


def test_sample_is_bounded_and_does_not_depend_on_the_order_of_images() -> None:
    x, y = torch.randn(100, 3, 4, 4), torch.randn(100, 2, 4, 4)
    results = []
    for order in (np.arange(100), np.random.default_rng(0).permutation(100)):
        sample = FeatureSample(max_rows=320, expected_images=100, kernel_size=1, halo=0, seed=1)
        offered(sample, x, y, order)
        results.append(sample.result())
    assert results[0].rows == 320
    assert torch.equal(results[0].x, results[1].x)
    assert torch.equal(results[0].y, results[1].y)


def test_whole_images_where_they_fit() -> None:
    x, y = torch.randn(10, 3, 12, 9), torch.randn(10, 2, 12, 9)
    sample = FeatureSample(max_rows=10_000, expected_images=10, kernel_size=3, halo=2)
    offered(sample, x, y, np.arange(10))
    kept = sample.result()
    assert kept.inside is None
    assert torch.equal(kept.x, x)


def test_scattered_positions_keep_source_and_target_together() -> None:
    x = torch.arange(50 * 400.0).view(50, 1, 20, 20)
    sample = FeatureSample(max_rows=1000, expected_images=50, kernel_size=1, halo=0)
    offered(sample, x, -x, np.arange(50))
    kept = sample.result()
    assert kept.rows == 1000
    assert torch.equal(kept.x, -kept.y)
    assert len(kept.x.unique()) == 1000


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("order", [1, 2])
def test_hidden_maps_on_crops_equal_those_on_whole_images(kernel_size: int, order: int) -> None:
    """With margin and mask a crop sees what the whole image's zero padding would show it, at every layer."""
    grid = (24, 20)
    x = torch.randn(6, 3, *grid, dtype=torch.float64)
    maps = ClosedFormMaps(3, 2, order, kernel_size, hidden=4).double()
    with torch.no_grad():
        maps.center.normal_()
        maps.scale.uniform_(0.5, 2)
    whole = maps.components(x)[order]
    where = torch.arange(grid[0] * grid[1], dtype=torch.float64).view(1, 1, *grid).expand(6, 1, *grid)
    sample = FeatureSample(
        max_rows=6 * 256, expected_images=6, kernel_size=kernel_size, halo=(order + 1) * (kernel_size // 2)
    )
    sample.add(x, torch.cat([whole, where], 1), np.arange(6))
    kept = sample.result()
    assert kept.inside is not None
    assert kept.y.shape[2:] == (16, 16)
    truth = kept.with_target(kept.y[:, :2])
    torch.testing.assert_close(predict_component(maps, order, truth), truth.y)
    moments = order_moments(maps, order, truth)
    regressors = torch.cat(maps.features(x, order), 1)
    positions = kept.y[:, 2].flatten(1).long()
    expected = batch_moments(regressors, whole, kernel_size, positions)
    columns = columns_by_feature([3, *[4] * order], kernel_size)
    torch.testing.assert_close(moments.xx, expected.xx[columns][:, columns])
    torch.testing.assert_close(moments.xy, expected.xy[columns])


def test_positions_are_distinct_and_cover_the_grid() -> None:
    positions = sample_positions(np.arange(400), num_positions=36, count=5, seed=2)
    assert all(len(set(row)) == 5 for row in positions.tolist())
    counts = positions.flatten().bincount(minlength=36).double()
    assert 0.5 < float(counts.min() / counts.mean()) <= float(counts.max() / counts.mean()) < 1.6


def test_hash_is_uniform_and_seeds_and_streams_are_independent() -> None:
    index = np.arange(20_000)
    draws = [hash_unit(index, seed, stream) for seed in range(4) for stream in Stream]
    assert len(draws) == 28
    for draw in draws:
        assert abs(draw.mean() - 0.5) < 0.01
        np.testing.assert_allclose(np.histogram(draw, 10, (0, 1))[0] / 2000, 1, atol=0.12)
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.03


def test_poisson_weights() -> None:
    weights = poisson_weights(np.arange(2000), 200, seed=0)
    assert abs(weights.mean() - 1) < 0.01
    assert abs(weights.var() - 1) < 0.02
    assert abs(np.corrcoef(weights[0], weights[1])[0, 1]) < 0.1
    np.testing.assert_array_equal(weights[:, 5:7], poisson_weights(np.array([5, 6]), 200, seed=0))


def test_residual_statistics_equal_numpy_and_do_not_depend_on_batches() -> None:
    y = torch.randn(40, 3, 4, 4, dtype=torch.float64) * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1) + 5
    parts = [y * 0.5 + 0.1 * torch.randn_like(y), 0.2 * y]
    estimates = []
    for step in (40, 9):
        statistics = ResidualStatistics(2, y.mean((0, 2, 3)) + 0.3, bootstrap=200, seed=1)
        for start in range(0, 40, step):
            part = slice(start, start + step)
            statistics.update(y[part], [p[part] for p in parts], np.arange(40)[part])
        estimates.append(statistics.estimate())
    total = y.var((0, 2, 3), correction=0).sum()
    for k, left in enumerate((y - parts[0], y - parts[0] - parts[1])):
        assert estimates[0].unexplained[k] == pytest.approx(float(left.var((0, 2, 3), correction=0).sum() / total))
        assert estimates[0].component_variances[k] == pytest.approx(
            float(parts[k].var((0, 2, 3), correction=0).sum() / total)
        )
    assert sum(estimates[0].shares) + estimates[0].unexplained[-1] == pytest.approx(1)
    np.testing.assert_allclose(estimates[0].interval, estimates[1].interval)


def planted_statistics(images: int, bootstrap: int, seed: int = 0) -> ResidualStatistics:
    """Accumulate two components of a target whose images have very different energies."""
    energy = torch.logspace(-3, 3, images, dtype=torch.float64).view(-1, 1, 1, 1)
    y = torch.randn(images, 2, 2, 2, dtype=torch.float64) * energy
    components = [0.7 * y, 0.1 * torch.randn_like(y) * energy]
    statistics = ResidualStatistics(2, y.mean((0, 2, 3)), bootstrap=bootstrap, seed=seed)
    statistics.update(y, components, np.arange(images))
    return statistics


@pytest.mark.parametrize("bootstrap", [1, 2, 200])
@pytest.mark.parametrize("seed", range(5))
def test_every_interval_contains_its_point_estimate(bootstrap: int, seed: int) -> None:
    """Few replicates and a few dominant images: percentiles alone would miss the point estimate."""
    estimate = planted_statistics(images=6, bootstrap=bootstrap, seed=seed).estimate()
    points = [*estimate.shares, *estimate.component_variances, estimate.unexplained[-1]]
    intervals = [*estimate.share_intervals, *estimate.component_intervals, estimate.interval]
    assert len(points) == len(intervals) == 5
    for point, (low, high) in zip(points, intervals, strict=True):
        assert low <= point <= high


def test_intervals_contain_the_planted_share_and_shrink_with_more_images() -> None:
    widths = []
    for images in (40, 4000):
        y = torch.randn(images, 3, 2, 2, dtype=torch.float64)
        statistics = ResidualStatistics(1, y.mean((0, 2, 3)), bootstrap=500)
        statistics.update(y, [0.5 * y + 0.2 * torch.randn_like(y)], np.arange(images))
        low, high = statistics.estimate().interval
        widths.append(high - low)
    # (1 - 0.5)² + 0.2²
    assert low < 0.29 < high
    # Ten times narrower, as 1 / √images
    assert 5 < widths[0] / widths[1] < 20


def test_without_a_bootstrap_intervals_are_nan() -> None:
    estimate = planted_statistics(images=6, bootstrap=0).estimate()
    assert np.isnan([*estimate.share_intervals, *estimate.component_intervals, estimate.interval]).all()
    assert len(estimate.share_intervals) == len(estimate.component_intervals) == 2


def test_a_target_without_variance_is_explained_by_its_mean() -> None:
    statistics = ResidualStatistics(2, torch.ones(3), bootstrap=50)
    y = torch.ones(8, 3, 2, 2)
    statistics.update(y, [y, 0 * y], np.arange(8))
    estimate = statistics.estimate()
    assert estimate.shares == (1.0, 0.0)
    assert estimate.unexplained == (0.0, 0.0)
